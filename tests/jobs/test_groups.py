"""A run that is its group's: real files of a real run, and a colleague who is another user of that group."""

import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import RunDir, read_json
from slurm.sandbox.conf_files import LocalCluster
from tests.conftest import REPOSITORY
from tests.helpers.processes import JOBS_RUN, TRAINER, start, torchrun, wait_until
from tests.helpers.slurm_commands import wait_for
from tests.helpers.submitted_runs import JOB, changed
from tests.helpers.wandb_server import WandbServer

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("bwrap") is None, reason="becomes another user: root, bwrap"),
]

GROUP = 4242
KEY = "c4n4ry00" * 5
TRAIN = ("jobs/quickstart.toml", "--data.dataset", "synthetic", "--parallel.device", "cpu")
SHORT = (*TRAIN, "--run.max-steps", "40", "--run.epochs", "1")
LONG = (*TRAIN, "--run.epochs", "1000", "--tracking.wandb", "disabled")


@pytest.fixture(scope="module")
def runs() -> Iterator[Path]:
    """The folder of all runs, which is a group's, beside the files of its site."""
    folder = Path(tempfile.mkdtemp(prefix="fnet-group-")).resolve()  # pytest's own is closed to other users
    try:
        folder.chmod(0o711)
        runs = folder / "runs"
        runs.mkdir()
        os.chown(runs, -1, GROUP)
        runs.chmod(0o2770)
        settings = f'run_root = "{runs}"\nrun_mode = "group"\nnotify = "true {KEY}"\n'
        (folder / "site.toml").write_text(settings)
        (folder / "both.toml").write_text(f'{settings}control = "group"\n')
        (folder / "home").mkdir()
        os.chown(folder / "home", nobody().pw_uid, -1)
        yield runs
    finally:
        shutil.rmtree(folder)


def nobody() -> pwd.struct_passwd:
    return pwd.getpwnam("nobody")


def site(runs: Path, name: str = "site") -> dict[str, str]:
    return {"FNET_SITE": str(runs.with_name(f"{name}.toml"))}


def owner(runs: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `fnet WORDS` as this user, with a mask that is closed to the group."""
    return subprocess.run(
        [sys.executable, "-m", "jobs", *words],
        cwd=REPOSITORY,
        env={**os.environ, **site(runs), **environment},
        umask=0o077,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def colleague(runs: Path, *words: str, control: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `fnet WORDS` as another user of the group."""
    sandbox = ["bwrap", "--dev-bind", "/", "/", "--cap-add", "ALL"]
    python = Path(sys.base_prefix).resolve()
    closed = [path for path in python.parents if not path.stat().st_mode & stat.S_IXOTH]
    if closed:  # Python lies in root's home: show it in an open one
        sandbox += ["--perms", "0755", "--tmpfs", str(closed[-1])]
        for path in reversed(python.parents):
            sandbox += ["--perms", "0755", "--dir", str(path)] if closed[-1] in path.parents else []
        sandbox += ["--ro-bind", str(python), str(python)]
    ids = ["setpriv", f"--reuid={nobody().pw_uid}", f"--regid={nobody().pw_gid}", f"--groups={GROUP}"]
    home = {"HOME": str(runs.with_name("home")), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [*sandbox, "--", *ids, sys.executable, "-m", "jobs", *words],
        cwd=REPOSITORY,
        env={**os.environ, **home, **site(runs, "both" if control else "site"), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def check_modes(path: Path) -> None:
    """Check that everything below `path` is the group's to read and to write, and nobody else's.

    But scripts, which have the lines of the site, and what else submitit writes are the owner's alone.
    """
    closed = [*path.glob("*.sbatch"), *path.glob("submitit/*submission*.sh"), *path.glob("submitit/*.pkl")]
    closed = [each for each in closed if not each.name.endswith("_result.pkl")]  # which the job writes
    assert [f"{each}" for each in closed if each.stat().st_mode & 0o7777 != 0o600] == []
    for each in {path, *path.rglob("*")} - {*closed}:
        found = each.lstat()
        assert found.st_gid == GROUP, each
        if stat.S_ISLNK(found.st_mode):
            continue
        wanted = 0o2770 if each.is_dir() else 0o660
        assert found.st_mode & 0o7777 & ~(0 if each.is_dir() else 0o110) == wanted, f"{each}: {found.st_mode:o}"


ON_A_NODE = (*JOBS_RUN, *SHORT, "--run.name")
BY_TORCHRUN = (*torchrun(2), *TRAINER, "--config", *SHORT, "--run.mode", "group", "--run.name")
STARTS = {
    "r": [(*ON_A_NODE, "r", "--nproc-per-node", "2")],
    "nodes": [(*ON_A_NODE, "nodes", "--nnodes", "2", "--node-rank", rank) for rank in "01"],
    "torchrun": [(*BY_TORCHRUN, "torchrun")],
    "failed": [(*BY_TORCHRUN, "failed", "--optim.lr", "1e30")],
}


@pytest.mark.parametrize(
    "name", ["r", "torchrun", *(pytest.param(name, marks=pytest.mark.soak) for name in ("nodes", "failed"))]
)
def test_every_file_of_a_shared_run_is_the_groups_and_none_holds_a_key(runs: Path, name: str) -> None:
    netrc = runs.with_name("netrc")
    netrc.write_text(f"machine api.wandb.ai login user password {KEY}\n")
    environment = site(runs) | {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY, "NETRC": str(netrc)}
    root = ("--run.root", str(runs))  # torchrun reads no site file
    with ExitStack() as stack:
        started = [stack.enter_context(start(*words, *root, umask=0o077, **environment)) for words in STARTS[name]]
        for each in started:
            ended = each.end()
            assert (ended.code != 0) == (name == "failed"), ended.err
    run = RunDir(runs / name)
    assert owner(runs, "report", name).returncode == 0
    check_modes(run.path)
    files = [path for path in run.path.rglob("*") if path.is_file()]
    written = {".json", ".jsonl", ".log", ".wandb", ".png", ".html", ".error" if name == "failed" else ".safetensors"}
    assert {path.suffix for path in files} >= written
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_a_colleague_looks_reports_and_sends_it_to_wandb(runs: Path, server: WandbServer) -> None:
    run = RunDir(runs / "r")
    assert "finished" in colleague(runs, "status", "r").stdout
    assert "Training loss" in colleague(runs, "logs", "r").stdout
    assert "accuracy" in colleague(runs, "evaluate", "r").stdout
    reported = colleague(runs, "report", "r")
    assert reported.returncode == 0, reported.stderr
    folders = {f"WANDB_{name}_DIR": str(runs.with_name("home")) for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT")}
    sent = colleague(runs, "sync", "r", **server.environment() | folders)
    assert sent.returncode == 0, sent.stderr
    assert len(server.runs) == 1
    check_modes(run.path)
    assert owner(runs, "report", "r").returncode == 0


def test_stop_and_resume_are_the_owners_unless_the_site_gives_them_to_the_group(runs: Path) -> None:
    run = RunDir(runs / "long")
    words = ("-m", "jobs", "run", *LONG, "--run.name", "long")
    refusal = f"error: {run.path} belongs to root, and only root may stop, cancel, ask or resume it; use another "
    with start(*words, **site(runs)) as training:
        wait_until(lambda: run.metrics_log.exists() and b'"window"' in run.metrics_log.read_bytes())
        for command in (["stop", "long"], ["ask", "long", "stacks"]):
            refused = colleague(runs, *command)
            assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
            assert refused.stderr.startswith(refusal)
        asked = colleague(runs, "ask", "long", "stacks", control=True)
        assert asked.returncode == 0, asked.stderr
        stopped = colleague(runs, "stop", "long", control=True)
        assert stopped.returncode == 0, stopped.stderr
        assert training.end().code == 75
    assert read_outcome(run)["reason"] == "stop_file"
    step = read_outcome(run)["step"]
    again = ("run", *LONG, "--run.name", "long", "--run.max-steps", str(step + 20))
    refused = colleague(runs, *again)
    assert (refused.returncode, refused.stderr.startswith(refusal)) == (2, True)
    trained = colleague(runs, *again, control=True)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert read_outcome(run)["step"] == step + 20
    check_modes(run.path)


def test_a_job_on_slurm_writes_such_files_and_a_colleague_sees_it_and_cannot_cancel_it(
    runs: Path, cluster: LocalCluster
) -> None:
    job = [*changed(JOB, "--run.max-steps", "20"), "--run.root", str(runs)]
    conf = Path(cluster.environment["SLURM_CONF"])
    sent = owner(runs, "submit", *job, "--run.name", "sent", "-N", "2", **cluster.environment)
    waits = owner(runs, "submit", *job, "--run.name", "w", "--sbatch", "begin=now+1hour", **cluster.environment)
    assert (sent.returncode, waits.returncode) == (0, 0), sent.stderr + waits.stderr
    cluster.directory.chmod(0o711)
    conf.chmod(0o644)
    try:
        assert " queued " in colleague(runs, "status", "w", **cluster.environment).stdout
        assert "belongs to root" in colleague(runs, "cancel", "w", **cluster.environment).stderr
        refused = colleague(runs, "cancel", "w", control=True, **cluster.environment)
    finally:
        conf.chmod(0o600)
        cluster.directory.chmod(0o700)
    assert refused.returncode == 1
    assert "permission denied; only root or an operator cancels this job; `" in refused.stderr
    assert refused.stderr.endswith("stop w` saves and ends it\n".replace(" w`", f" {runs}/w`"))
    assert owner(runs, "cancel", "w", **cluster.environment).returncode == 0
    run = RunDir(runs / "sent")
    wait_for(lambda: read_outcome(run) is not None and any(run.submitit.glob("*_result.pkl")), 60)
    assert read_outcome(run)["status"] == "finished"
    again = [*changed(job, "--run.max-steps", "21"), "--run.name", "sent", "--sbatch", "reservation=none"]
    refused = owner(runs, "submit", *again, **cluster.environment)
    assert "sbatch refused" in refused.stderr
    assert [*run.submitit.glob(".submission*.sh")] != []
    check_modes(run.path)
    assert read_json(run.config)["run"]["mode"] == "group"
    holding = {path.suffix for path in run.path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()}
    assert holding == {".sbatch", ".sh"}, "which are closed"
