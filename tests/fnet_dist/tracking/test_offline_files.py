"""The SDK's offline files, as the real SDK writes them: rows are counted, files repaired after a kill at any byte."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from wandb.util import get_core_path

from fnet_dist.run.run_dir import RunDir
from fnet_dist.tracking.offline_files import make_whole, mark_sent, offline_files, rows_written

ROWS = 400  # some 90 kB: records that lie across blocks of 32 KiB are among them
PROGRAM = f"""
import wandb
run = wandb.init(id="made", dir=".", mode="offline", settings=wandb.Settings(console="off", silent=True))
for step in range(1, {ROWS} + 1):
    run.log({{"trainer/step": step, "text": "x" * (step % 97)}})
run.finish()
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An offline file of `ROWS` rows."""
    folder = tmp_path_factory.mktemp("offline")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    words = [sys.executable, "-c", PROGRAM]
    subprocess.run(words, cwd=folder, env=environment, capture_output=True, timeout=60, check=True)
    return offline_files(RunDir(folder))[0]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    run = RunDir(tmp_path / "r")
    run.wandb.mkdir(parents=True)
    return run


def put(run: RunDir, name: str, content: bytes) -> Path:
    path = run.wandb / f"offline-run-{name}" / "run-made.wandb"
    path.parent.mkdir()
    path.write_bytes(content)
    return path


def records(path: Path) -> tuple[list[str], str]:
    """Return the records as the SDK reads them, and its error messages."""
    inspect = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", str(path)]
    done = subprocess.run(inspect, capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    read = [line for line in lines if "num" in json.loads(line)]
    return read, done.stderr + "".join(line for line in lines if line not in read)


def test_rows_are_counted_over_all_files_and_empty_files_count_zero(made: Path, run: RunDir) -> None:
    assert rows_written(run) == 0
    put(run, "20260101_000000-made", made.read_bytes())
    put(run, "20260102_000000-made", made.read_bytes()[:7])
    assert rows_written(run) == ROWS
    put(run, "20260103_000000-made", b"")
    put(run, "20260104_000000-made", made.read_bytes())
    assert rows_written(run) == 2 * ROWS
    assert [path.parent.name[12:20] for path in offline_files(run)] == ["20260101", "20260102", "20260103", "20260104"]


def test_a_file_cut_at_any_byte_keeps_exactly_its_whole_records(made: Path, run: RunDir) -> None:
    seed = 20261124
    chance, data = Random(seed), made.read_bytes()
    assert len(data) > 2 * 32768
    around = [block + offset for block in (32768, 65536) for offset in (-8, -7, -6, -1, 0, 1, 3, 7, 8)]
    for number, cut in enumerate([0, 3, 7, 8, *around, *chance.sample(range(len(data)), 20)]):
        path = put(run, f"{number}-made", data[:cut])
        torn, _ = records(path)
        make_whole(path)
        assert data.startswith(path.read_bytes()), f"seed {seed}, cut at {cut}"
        whole, complaint = records(path)
        assert whole == torn, f"seed {seed}, cut at {cut}"
        assert complaint == "" or cut <= 7, f"seed {seed}, cut at {cut}: {complaint}"


def test_a_whole_file_is_not_changed(made: Path, run: RunDir) -> None:
    path = put(run, "whole", made.read_bytes())
    make_whole(path)
    assert path.read_bytes() == made.read_bytes()


def test_a_sent_file_is_marked_as_the_sdk_does_it(made: Path, run: RunDir) -> None:
    path = put(run, "sent", made.read_bytes())
    mark_sent(run)
    assert path.with_name("run-made.wandb.synced").exists()
