"""Choosing online or offline: a key and a server that answers, found within seconds and without a prompt."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.wandb_server import WandbServer

ONE_WRITER = """
from pathlib import Path
from fnet_dist.tracking.mode import tracking_lock
from fnet_dist.run.run_dir import RunDir
run = RunDir(Path("."))
run.wandb.mkdir()
with tracking_lock(run, lambda: True) as first:
    with tracking_lock(run, lambda: True) as second:
        print(first, second)
with tracking_lock(run, lambda: True) as third:
    print(third)
"""
PROGRAM = """
import time
from fnet_dist.tracking.mode import why_not_online
began = time.monotonic()
print(why_not_online())
print(time.monotonic() - began)
"""
RENAMED = """
from wandb.sdk import wandb_setup
from wandb.sdk.lib import wbauth
from fnet_dist.errors import ConfigError
from fnet_dist.tracking.mode import missing_key, why_not_online
for module, name in ((wbauth, "authenticate_session"), (wandb_setup, "singleton")):
    function = getattr(module, name)
    delattr(module, name)
    try:
        print(why_not_online(), missing_key())
    except ConfigError as error:
        print(why_not_online(), error)
    setattr(module, name, function)
"""
DEAD_CORE = """
from fnet_dist.tracking.mode import describe_sdk_error, is_sdk_error
from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError
for error in (MailboxClosedError(), HandleAbandonedError(), BrokenPipeError("broken pipe"), KeyError("ours")):
    print(is_sdk_error(error), describe_sdk_error(error))
"""
DAMAGED = """
from pathlib import Path
from fnet_dist.config.schema import TrackingConfig
from fnet_dist.run.run_dir import RunDir
from fnet_dist.tracking.mode import choose_mode
for number, text in enumerate(["", '{"mode": "onl', '{"mode": "online"}', "[1]"]):
    run = RunDir(Path(str(number)))
    run.wandb.mkdir(parents=True)
    run.tracking.write_text(text)
    print(choose_mode(run, TrackingConfig(wandb="online")).mode, end=" ")
    (run.wandb / "offline-run-1").mkdir()
    (run.wandb / "offline-run-1" / "run-1.wandb").touch()
    run.tracking.write_text(text)
    print(choose_mode(run, TrackingConfig(wandb="online")).mode)
"""


def ask(server: WandbServer, **environment: str) -> tuple[str, float]:
    """Return why W&B cannot be used, and the seconds that took; standard input is not a terminal."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | server.environment() | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    words, seconds = done.stdout.splitlines()
    return words, float(seconds)


def no_fault(server: WandbServer) -> None:
    pass


def hang(server: WandbServer) -> None:
    server.hang = True


@pytest.mark.parametrize(
    ("trouble", "key", "words"),
    [
        (no_fault, None, "None"),
        (no_fault, "", "no API key for {url}"),
        (no_fault, "short", "WANDB_API_KEY invalid: API key must have 40+ characters, has 5."),
        (WandbServer.refuse, None, "{url} does not answer within 3 s"),
        (hang, None, "{url} does not answer within 3 s"),
    ],
    ids=["all is there", "no key", "no key's length", "refuses", "hangs"],
)
def test_the_reason_for_offline_is_known_within_three_seconds(
    trouble: Callable[[WandbServer], None], key: str | None, words: str
) -> None:
    with WandbServer() as server:
        trouble(server)
        answer, seconds = ask(server, **({} if key is None else {"WANDB_API_KEY": key}))
        assert answer == words.format(url=server.url)
        assert seconds < 3.5
        assert not any(kind == "graphql" for kind, _ in server.requests)


def test_where_the_sdk_has_renamed_what_is_private_its_own_init_decides_and_doctor_gets_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", RENAMED], capture_output=True, text=True, timeout=30, check=True)
    for line, name in zip(done.stdout.splitlines(), ("authenticate_session", "singleton"), strict=True):
        assert re.fullmatch(rf"None wandb [\d.]+ is another .*'{name}'.*; expected wandb\S+: pip install '\S+'", line)


def test_the_tracking_lock_is_exclusive_and_waiting_for_it_can_be_given_up(tmp_path: Path) -> None:
    words = [sys.executable, "-c", ONE_WRITER]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "True False\nTrue\n"


def test_a_damaged_tracking_json_is_written_anew_and_offline_rows_are_not_sent_again(tmp_path: Path) -> None:
    words = [sys.executable, "-c", DAMAGED]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "online offline\n" * 4


def test_whatever_the_sdk_raises_after_wandb_core_has_ended_is_described_as_that() -> None:
    done = subprocess.run([sys.executable, "-c", DEAD_CORE], capture_output=True, text=True, timeout=30, check=True)
    *of_core, ours = done.stdout.splitlines()
    assert of_core == ["True wandb-core, the SDK's process on this machine, has ended"] * 3
    assert ours == "False 'ours'"
