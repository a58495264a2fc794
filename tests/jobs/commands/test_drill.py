"""After a fault on two ranks, the run's result is bit-identical to that of an undisturbed run.

`make soak` drills all eight faults; here is the one that no shorter test covers. A killed rank is in test_restarts.py,
preemption in test_stop_processes.py, a loss that is not finite in test_failures.py and test_restarts.py, a torn
checkpoint in tests/fnet_dist/checkpoint, a full disk in test_recorder.py, two owners in test_train.py.
"""

import shutil
from pathlib import Path

import pytest

from fnet_dist.run.run_dir import RunDir, read_json
from jobs.__main__ import main
from jobs.commands import drill
from jobs.verification import faults
from jobs.verification.faults import FAULTS, Result
from jobs.verification.supervised_run import SupervisedRunError

pytestmark = pytest.mark.processes

EVERY = 40
FAULTS_HERE = ["hang", *(pytest.param(fault, marks=pytest.mark.soak) for fault in ("disk-full", "two-owners"))]
JOB = ["jobs/quickstart.toml", "--nproc-per-node", "2", "--data.dataset", "synthetic", "--parallel.timeout-s", "10"]
JOB += ["--run.max-steps", "450", "--checkpoint.every-steps", str(EVERY)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drill")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> RunDir:
    return drill.run_undisturbed(folder, JOB)


@pytest.mark.parametrize("fault", FAULTS_HERE)
def test_a_fault_does_not_change_the_result(fault: str, folder: Path, undisturbed: RunDir) -> None:
    result = drill.drill(fault, folder, JOB, undisturbed, 150)
    if fault == "disk-full":
        assert result.lost_steps == 0
    else:
        # A save that is due while another is written is skipped: two intervals, and the window of the fault.
        assert result.lost_steps is not None
        assert 0 <= result.lost_steps <= 4 * EVERY
    if fault == "hang":
        assert read_json(RunDir(folder / fault).attempt(1) / "end.json")["reason"] == "hang"


def test_a_different_result_fails_the_drill(folder: Path, undisturbed: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(faults.FAULTS, "nothing", lambda supervised, step: Result(0, 0.0, "nothing"))
    other = RunDir(Path(shutil.copytree(undisturbed.path, folder / "elsewhere" / "nothing")))
    assert drill.drill("nothing", other.path.parent, JOB, undisturbed, 1).seen == "nothing"
    text = other.metrics_log.read_text()
    other.metrics_log.write_text(text.replace('"samples": 64,', '"samples": 65,', 1))
    with pytest.raises(SupervisedRunError, match="train line of step 1: samples 65, expected 64"):
        drill.drill("nothing", other.path.parent, JOB, undisturbed, 1)


def test_an_unknown_fault_names_all(repository: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(repository)
    assert main(["drill", "earthquake"]) == 2
    error = capsys.readouterr().err
    assert all(fault in error for fault in FAULTS)
