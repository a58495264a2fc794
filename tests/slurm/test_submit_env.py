"""The environment of a submission: no variables of the job it is made from, and none that override the script."""

import os

from slurm.sbatch_options import Options
from slurm.submit_env import changed, submission_environment


def test_variables_that_override_the_script_are_removed_and_the_others_stay(monkeypatch):
    for name, value in {
        "SBATCH_TIMELIMIT": "1",
        "SBATCH_EXPORT": "NONE",
        "SBATCH_MEM_PER_CPU": "1G",
        "SBATCH_PARTITION": "mine",
        "SBATCH_DEBUG": "1",
        "PATH": "/bin",
    }.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with submission_environment(Options(partition="flag", qos="high")):
        assert not {"SBATCH_TIMELIMIT", "SBATCH_EXPORT", "SBATCH_MEM_PER_CPU"} & {*os.environ}
        found = {name: os.environ[name] for name in ("SBATCH_PARTITION", "SBATCH_QOS", "SBATCH_DEBUG", "PATH")}
    assert found == {"SBATCH_PARTITION": "flag", "SBATCH_QOS": "high", "SBATCH_DEBUG": "1", "PATH": "/bin"}
    assert dict(os.environ) == before


def test_inside_a_job_only_the_cluster_and_the_users_account_are_inherited(monkeypatch):
    inside = {
        "SLURM_JOB_ID": "7",
        "SLURM_CPU_BIND": "quiet",
        "SRUN_DEBUG": "1",
        "PMI_RANK": "0",
        "SBATCH_EXPORT": "NONE",
    }
    for name, value in {**inside, "SLURM_CONF": "/c", "SBATCH_ACCOUNT": "a", "WANDB_API_KEY": "k"}.items():
        monkeypatch.setenv(name, value)
    with submission_environment(Options()):
        assert {name for name in inside if name in os.environ} == set()
        assert (os.environ["SLURM_CONF"], os.environ["SBATCH_ACCOUNT"], os.environ["WANDB_API_KEY"]) == ("/c", "a", "k")


def test_changed_variables_are_restored(monkeypatch):
    monkeypatch.setenv("SLURM_CONF", "/site")
    with changed({"SLURM_CONF": "/private"}):
        assert os.environ["SLURM_CONF"] == "/private"
    assert os.environ["SLURM_CONF"] == "/site"
