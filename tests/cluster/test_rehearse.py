"""The rehearsal: a private Slurm, a preemption, a warning of the time limit, the same bits, and no trace left."""

import re
from pathlib import Path

import pytest

from tests.cluster.asking import naming
from tests.cluster.submitted import JOB, changed, jobs

pytestmark = [pytest.mark.usefixtures("unmeasured"), pytest.mark.timeout(200)]


def test_a_rehearsal_passes_and_leaves_nothing_behind(tmp_path):
    ended = jobs("rehearse", *JOB, "-N", "2", "-p", "gpu", "-A", "physics", TMPDIR=str(tmp_path), timeout_s=180)
    lines = ended.stdout.splitlines()
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.fullmatch(r"passed: quickstart-\w+ on Slurm is identical to the undisturbed run", lines[-1])
    table = [re.split(r"  +", line.strip(), maxsplit=1) for line in lines[2:-1]]
    assert [what for what, _ in table] == [
        "a private Slurm",
        "submitted",
        "preempted by a job above",
        "warned, as of its time limit",
        "finished",
        "torn down",
        "compared",
    ]
    assert table[1][1].endswith("the script that submit sends; left out, as not of this Slurm: partition, account")
    assert [path for path in tmp_path.iterdir() if not path.name.startswith("torchinductor")] == []  # torch's own cache
    assert naming(str(tmp_path)) == []


def test_a_run_that_is_over_before_it_could_be_disturbed_has_not_passed(tmp_path):
    ended = jobs("rehearse", *changed(JOB, "--run.max-steps", "8"), "-N", "1", TMPDIR=str(tmp_path), timeout_s=120)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert re.search(r"FAILED +job \d+ is COMPLETED before attempt 2; see ", ended.stdout)
    (kept,) = tmp_path.glob("rehearsal-*")
    assert ended.stdout.splitlines()[-1] == f"failed; the runs are in {kept}"
    assert Path(kept / "undisturbed").is_dir()
