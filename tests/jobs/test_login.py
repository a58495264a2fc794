"""Commands on a laptop that run on a cluster, through a real sshd: what travels, what comes back, how they end."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fnet_dist.run.git import SNAPSHOT, git_state
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import RunDir, read_json
from slurm.sandbox.conf_files import LocalCluster
from tests.helpers.login_host import GIT, SSHD, Laptop, login_host
from tests.helpers.made_run import STARTED, Made, make_run
from tests.helpers.processes import all_gone, wait_until
from tests.helpers.slurm_commands import naming

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

LONG = (
    "--run.epochs",
    "1000",
    "--data.dataset",
    "synthetic",
    "--parallel.device",
    "cpu",
    "--tracking.wandb",
    "disabled",
)


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    if missing := [program for program in (SSHD, "ssh-keygen", "rsync") if shutil.which(program) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    with login_host(tmp_path_factory.mktemp("login")) as laptop:
        assert laptop.fnet("status").stderr.startswith("error: no run in "), "the first sync makes the directory"
        yield laptop


@pytest.fixture(scope="module")
def made(laptop: Laptop) -> RunDir:
    """A run on the cluster that has not ended: who watches it waits."""
    return make_run(laptop.there / "made", STARTED)


@contextmanager
def started(laptop: Laptop, *words: str, **streams: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start `fnet WORDS`; kill it at the end of the block."""
    command = subprocess.Popen(
        laptop.command(*words), cwd=laptop.checkout, env=laptop.environment, start_new_session=True, **streams
    )
    with command:
        try:
            yield command
        finally:
            command.kill()


def there_for(laptop: Laptop, *words: str) -> list[int]:
    """The processes on the cluster that run `fnet WORDS`."""
    return naming(f"{laptop.there}\0{chr(0).join(words)}\0")


def test_output_errors_and_exit_codes_are_those_of_the_command_there(laptop: Laptop, made: RunDir) -> None:
    shown = laptop.fnet("status", "--json", "--root", "made")
    assert (shown.returncode, shown.stderr) == (0, "")
    [status] = json.loads(shown.stdout)
    assert (status["run"], status["directory"]) == ("r", str(made.path))
    refused = laptop.fnet("status", "it's $HOME", "--root", "no where")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith('error: no run "it\'s $HOME": neither a name under ')
    assert "no where" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_files_here_are_files_there_and_what_was_never_here_stays(laptop: Laptop, made: RunDir) -> None:
    here, there = laptop.checkout, laptop.there
    own = [there / "runs" / "r" / "own", there / ".venv" / "own", there / "slurm" / "site.toml", there / "mine.toml"]
    for path in own:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("of the cluster")
    new = ("room/a file.py", "room/deep/other.py", "changed.py")
    for name in new:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("1")
    (here / "wandb").mkdir()
    (here / "wandb" / "ignored").write_text("")
    own[2].write_text("")
    assert laptop.fnet("status", str(made.path)).returncode == 0
    assert [(there / name).read_text() for name in new] == ["1"] * 3
    assert not (there / "wandb").exists()
    assert git_state(there) == git_state(here)
    assert git_state(there)["dirty"]

    (here / "changed.py").write_text("2")
    shutil.rmtree(here / "room")
    (here / "LICENSE").unlink()
    (there / "README.md").write_text("edited there")
    assert laptop.fnet("status", str(made.path)).returncode == 0
    assert (there / "changed.py").read_text() == "2"
    assert not (there / "room").exists()
    assert not (there / "LICENSE").exists()
    assert (there / "README.md").read_text() == (here / "README.md").read_text()
    assert [path.exists() for path in own] == [True] * 4
    subprocess.run([*GIT, "checkout", "-q", "LICENSE"], cwd=here, check=True)
    laptop.fnet("status", str(made.path))
    assert (there / "LICENSE").exists()


def test_no_file_there_is_removed_that_somebody_has_changed_or_that_lies_behind_a_link(
    laptop: Laptop, made: RunDir
) -> None:
    here, there = laptop.checkout, laptop.there
    for name in ("kept/result", "moved/result"):
        (here / name).parent.mkdir()
        (here / name).write_text("sent")
    (here / ".env").write_text("KEY=c4n4ry")
    assert laptop.fnet("status", str(made.path)).returncode == 0
    assert not (there / ".env").exists()
    (there / "kept" / "result").write_text("of a job there")
    (there / "moved").rename(laptop.home / "elsewhere")
    (there / "moved").symlink_to(laptop.home / "elsewhere")
    for name in ("kept", "moved"):
        shutil.rmtree(here / name)
    (here / ".env").unlink()
    assert laptop.fnet("status", str(made.path)).returncode == 0
    assert (there / "kept" / "result").read_text() == "of a job there"
    assert (laptop.home / "elsewhere" / "result").read_text() == "sent"
    shutil.rmtree(there / "kept")
    (there / "moved").unlink()


def test_a_project_of_ones_own_is_synced_beside_the_checkout_and_is_the_current_directory(laptop: Laptop) -> None:
    project = laptop.home.parent / "laptop" / "my lab"
    (project / "jobs").mkdir(parents=True)
    (project / "cats.py").write_text("from fnet_dist.recipes.fashion_mnist import *\n")
    (project / "jobs" / "a b.toml").write_text('recipe = "cats"\n[data]\ndataset = "synthetic"\n')
    subprocess.run([*GIT, "init", "-q"], cwd=project, check=True)
    words = ("--run.epochs", "1", "--run.max-steps", "2", "--tracking.wandb", "disabled", "--parallel.device", "cpu")
    trained = laptop.fnet("run", str(project / "jobs" / "a b.toml"), "--run.name", "mine", *words, cwd=project)
    assert trained.returncode == 0, trained.stderr
    run = RunDir(laptop.home / "my lab" / "runs" / "mine")
    assert read_json(run.config)["recipe"] == "cats"
    assert laptop.fnet("status", "--json", "--root", "../runs", cwd=project / "jobs").returncode == 0
    outside = laptop.home.parent / "laptop" / "x.toml"
    outside.write_text("")
    refused = laptop.fnet("run", "../x.toml", cwd=project)
    assert refused.returncode == 2
    assert (
        refused.stderr
        == f"error: ../x.toml is not in {laptop.checkout} or {project}, which login syncs; move it there\n"
    )

    home = outside.parent  # where a repository of dotfiles would send everything
    subprocess.run([*GIT, "init", "-q"], cwd=home, check=True)
    refused = laptop.fnet("run", "x.toml", cwd=home)
    assert refused.stderr == f"error: x.toml is not in {laptop.checkout}, which login syncs; move it there\n"
    shutil.rmtree(home / ".git")


def test_a_job_is_submitted_with_the_code_of_the_laptop_and_only_words_travel(
    laptop: Laptop, cluster: LocalCluster
) -> None:
    profile = laptop.home / ".bash_profile"
    profile.write_text(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}\necho welcome\nenv >$HOME/env\ncd /\n")
    (laptop.checkout / "new.py").write_text("")
    words = ["jobs/quickstart.toml", "--run.name", "sent", "--sbatch", "begin=now+1hour", *LONG]
    sent = laptop.fnet("submit", *words, "--json", WANDB_API_KEY="c4n4ry" * 7, FNET_DATA="/of/the/laptop")
    assert sent.returncode == 0, sent.stderr
    assert sent.stderr.splitlines()[0] == "welcome"
    job, run = json.loads(sent.stdout)["job_id"], RunDir(laptop.there / "runs" / "sent")
    [code] = run.code.iterdir()
    assert (code / "new.py").exists()
    assert read_json(code / SNAPSHOT)["commit"] == git_state(laptop.checkout)["commit"]
    assert not re.search("c4n4ry|/of/the/laptop", (laptop.home / "env").read_text())
    assert laptop.fnet("cancel", "sent").stdout == f"sent: job {job} (pending) is cancelled\n"
    profile.unlink()


@pytest.mark.parametrize(
    ("number", "code", "reason"), [(signal.SIGINT, 130, "signal_int"), (signal.SIGTERM, 75, "signal_term")]
)
def test_a_signal_here_stops_a_run_there(laptop: Laptop, number: signal.Signals, code: int, reason: str) -> None:
    run = RunDir(laptop.there / "runs" / reason)
    words = ("run", "jobs/quickstart.toml", "--run.name", reason, *LONG)
    with started(laptop, *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        wait_until(lambda: run.metrics_log.exists() and run.metrics_log.read_bytes().count(b"\n") > 5)
        os.killpg(command.pid, number) if number == signal.SIGINT else command.send_signal(number)  # as a terminal does
        out, err = command.communicate(timeout=30)
    assert (command.returncode, read_outcome(run)["reason"]) == (code, reason), err
    assert f"as asked ({reason}), checkpointed" in out.decode()


def test_nothing_runs_on_there_once_the_command_here_or_its_reader_is_gone(laptop: Laptop, made: RunDir) -> None:
    silent, words = ("logs", "-f", "made/r"), ("status", "--watch", "--root", "made")
    with started(laptop, *silent) as command:
        pids = wait_until(lambda: there_for(laptop, *silent), 10)
        command.kill()
    assert all_gone(pids, 10)
    piped = subprocess.run(
        ["bash", "-c", '"$@" | head -n 1; exit $PIPESTATUS', "bash", *laptop.command(*words)],
        cwd=laptop.checkout,
        env=laptop.environment,
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert (piped.returncode, piped.stderr, piped.stdout.count(b"\n")) == (141, b"", 1)
    wait_until(lambda: not there_for(laptop, *words), 10)


def test_in_a_terminal_the_command_there_has_one(laptop: Laptop, made: RunDir) -> None:
    ours, its = pty.openpty()
    with started(laptop, "status", "--watch", "--root", "made", stdin=its, stdout=its, stderr=its) as command:
        os.close(its)
        shown = b""
        while b"\x1b[" not in shown or b"120 of 2,814" not in shown:
            shown += os.read(ours, 4096)
        os.write(ours, b"\x03")
        assert command.wait(20) == 0
    os.close(ours)


def test_what_a_login_lacks_is_said_in_one_line(laptop: Laptop, tmp_path: Path) -> None:
    def error(login: str, **environment: str) -> tuple[int, str]:
        ended = laptop.fnet("status", FNET_LOGIN=login, **environment)
        assert ended.stdout == ""
        assert ended.stderr.count("\n") == 1, ended.stderr
        return ended.returncode, ended.stderr

    code, said = error("nobody")
    assert (code, "was not sent to nobody: ssh: connect to host 127.0.0.1 port 1: Connection refused" in said) == (
        74,
        True,
    )
    code, said = error("-oProxyCommand=true")
    assert (code, "expected me@cluster, or me@cluster:DIRECTORY" in said) == (2, True)
    (tmp_path / "clone" / ".git").mkdir(parents=True)
    code, said = error(f"cluster:{tmp_path}/clone")
    assert (code, f"{tmp_path}/clone there is a git checkout of its own" in said) == (74, True)
    assert [path.name for path in (tmp_path / "clone").iterdir()] == [".git"]
    (tmp_path / "filled").mkdir()
    (tmp_path / "filled" / "README.md").write_text("mine")
    code, said = error(f"cluster:{tmp_path}/filled")
    assert (code, f"{tmp_path}/filled there has files that fnet has not sent; name a directory" in said) == (74, True)
    assert (tmp_path / "filled" / "README.md").read_text() == "mine"
    (laptop.there / ".fnet-synced.json").rename(tmp_path / "record")
    (laptop.there / ".fnet-synced.json").write_text('{"from": "/another/laptop", "files": {}}')
    code, said = error(f"cluster:{laptop.there}")
    assert (code, f"{laptop.there} there was sent from another directory" in said) == (74, True)
    (tmp_path / "record").replace(laptop.there / ".fnet-synced.json")
    (tmp_path / "site.toml").write_text("")
    code, said = error(f"cluster:{tmp_path}/new", FNET_SITE=str(tmp_path / "site.toml"))
    assert (code, f"error: no Python environment in cluster:{tmp_path}/new; make it: ssh cluster," in said) == (2, True)
    code, said = error("cluster", PATH=str(Path(shutil.which("git")).parent / "nowhere"))
    assert (code, said) == (2, "error: not installed here: git, rsync, ssh; login needs git, rsync and ssh\n")


def test_an_empty_variable_runs_commands_here(laptop: Laptop) -> None:
    make_run(laptop.checkout / "runs", Made(name="here"))
    command = [sys.executable, "-m", "jobs", "status", "--json"]
    environment = laptop.environment | {"FNET_LOGIN": ""}
    shown = subprocess.run(command, cwd=laptop.checkout, env=environment, capture_output=True, timeout=30, check=True)
    assert [status["run"] for status in json.loads(shown.stdout)] == ["here"]
