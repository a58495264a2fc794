"""The rehearsal: a private Slurm, a preemption, a warning of the time limit, identical bits, and nothing left."""

import re
import tempfile

import pytest

from fnet_dist.errors import ConfigError
from jobs.commands import drill, rehearse
from jobs.verification.supervised_run import SupervisedRunError
from tests.helpers.slurm_commands import naming
from tests.helpers.submitted_runs import JOB, jobs

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("slurm_programs"), pytest.mark.timeout(200)]


def test_a_rehearsal_passes_and_leaves_nothing_behind(tmp_path):
    ended = jobs("rehearse", *JOB, "-N", "2", "-p", "gpu", "-A", "physics", TMPDIR=str(tmp_path), timeout_s=180)
    lines = ended.stdout.splitlines()
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.fullmatch(r"passed: quickstart-\w+ on Slurm is identical to the undisturbed run", lines[-1])
    table = [re.split(r"  +", line.strip(), maxsplit=1) for line in lines[2:-1]]
    assert [part for part, _ in table] == [
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


@pytest.mark.parametrize("words", [["--run.root", "x"], ["--run.name=x"], ["--checkpoint.resume", "new"]])
@pytest.mark.parametrize("command", [rehearse, drill])
def test_settings_that_the_runs_have_of_their_own_are_refused_in_one_line(command, words):
    job = ["kill-rank", *JOB] if command is drill else JOB
    with pytest.raises(ConfigError, match=r"^--[a-z.]+: these runs have their own, in a directory that is removed; "):
        command.main([*job, *words])


def test_a_part_that_fails_fails_the_rehearsal_and_the_runs_are_kept(tmp_path, monkeypatch, capsys):
    def failing(*arguments):
        yield "submitted", "job 1"
        raise SupervisedRunError("job 1 is COMPLETED before attempt 2")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(rehearse, "run_undisturbed", lambda folder, words: folder)
    monkeypatch.setattr(rehearse, "rehearse", failing)
    assert rehearse.main(JOB) == 1
    *_, submitted, failed, last = capsys.readouterr().out.splitlines()
    assert (submitted.split(), failed.split()[0]) == (["submitted", "job", "1"], "FAILED")
    (kept,) = tmp_path.glob("rehearsal-*")
    assert last == f"failed; the runs are in {kept}"


@pytest.mark.soak
def test_a_different_result_fails_the_rehearsal(tmp_path, monkeypatch, capsys):
    """Only the undisturbed run's seed is changed."""
    undisturbed = rehearse.run_undisturbed
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(
        rehearse, "run_undisturbed", lambda *given: undisturbed(given[0], [*given[1], "--run.seed", "1"])
    )
    assert rehearse.main([*JOB, "-N", "2"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"torn down +no process and no file is left\nFAILED +", re.sub(" +\n", "\n", out)), out
    assert naming(str(tmp_path)) == []
