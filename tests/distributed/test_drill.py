"""One case of each fault on two ranks, struck from outside: the run ends as one that nobody disturbed, to the bit."""

from pathlib import Path

import pytest

from fnet_dist.run_dir import RunDir
from jobs.__main__ import main
from jobs.prove import drill
from jobs.prove.faults import FAULTS
from jobs.prove.trial import TrialError

EVERY = 40
JOB = ["jobs/quickstart.toml", "--nproc-per-node", "2", "--data.dataset", "synthetic", "--parallel.timeout-s", "20"]
JOB += ["--run.max-steps", "600", "--checkpoint.every-steps", str(EVERY)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drill")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> RunDir:
    return drill.run_undisturbed(folder, JOB)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_ends_as_if_nothing_had_been(fault: str, folder: Path, undisturbed: RunDir) -> None:
    result = drill.drill(fault, folder, JOB, undisturbed, 200)
    if fault in ("preempt", "non-finite", "disk-full"):
        assert result.lost_steps == 0
    elif fault != "torn-checkpoint":  # there the last good one may be any number of steps back
        # A save that falls due while another is written is skipped: two intervals, and the window in which it struck.
        assert result.lost_steps is not None
        assert 0 <= result.lost_steps <= 4 * EVERY


def test_a_run_that_ends_otherwise_fails_the_drill(folder: Path, undisturbed: RunDir) -> None:
    other = [*JOB, "--run.seed", "1", "--run.max-steps", "81"]
    other = [word for place, word in enumerate(other) if place not in (other.index("600"), other.index("600") - 1)]
    with pytest.raises(TrialError, match="train line of step 1: loss"):
        drill.drill("preempt", folder / "other", other, undisturbed, 20)


def test_an_unknown_fault_names_all(repository: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(repository)
    with pytest.raises(SystemExit) as caught:
        main(["drill", "earthquake"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert all(fault in said for fault in FAULTS)
