"""Command lines of all commands: torchrun's spelling of flags, refusals, dry runs without a cluster."""

import re
from pathlib import Path

import pytest

from fnet_dist.errors import ConfigError
from jobs.commands import sweep
from jobs.runs import command_parser
from tests.helpers.processes import JOBS_RUN, NO_NETWORK, start

JOB = "jobs/quickstart.toml"


@pytest.mark.parametrize("flag", ["--nproc_per_node", "--nproc-per-node", "--nproc_per-node"])
@pytest.mark.parametrize("equals", [True, False])
def test_a_flag_may_have_torchruns_underscores(flag, equals):
    parser = command_parser("fnet run JOBFILE: train (here)")
    parser.add_argument("--nproc-per-node")
    words = [f"{flag}=2_0"] if equals else [flag, "2_0"]
    args, rest = parser.parse_known_args([JOB, *words, "--data.global_batch_size", "64", "optim.max_grad_norm=1"])
    assert args.nproc_per_node == "2_0"
    assert rest == ["--data.global_batch_size", "64", "optim.max_grad_norm=1"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-parallel", "0"], "--max-parallel 0: expected a whole number from 1 on"),
        (["--pack", "-1"], "--pack -1: expected a whole number from 1 on"),
        (["--sample", "0"], "--sample 0: expected a whole number from 1 on"),
        (["--seed", "1"], "--seed is that of a draw: give --sample N with it, or sweep over run.seed=0,1"),
        (["--pack", "2", "-N", "2"], "--pack 2: runs share one node, and resources.nodes is 2; leave one out"),
        (["data.global-batch-size=1,64", "--nproc-per-node", "2"], "data.global_batch_size 1 is smaller than 2 ranks"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused_in_one_line(words, said):
    with pytest.raises(ConfigError, match=f"^{said}.*$"):
        sweep.main([JOB, "optim.lr=0.1,0.2", *words])


def test_a_dry_run_needs_no_cluster(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")  # submitit looks for srun
    words = [JOB, "optim.lr=0.1,0.2", "--run.root", str(tmp_path), "--data.dataset", "synthetic", "--dry-run"]
    assert sweep.main(words) == 0
    output = capsys.readouterr()
    assert "#SBATCH --array=0-1%2" in output.out
    assert output.err.startswith("not checked against a cluster: ")
    assert [*tmp_path.iterdir()] == []


def test_drawn_and_packed_runs_ask_for_the_room_of_all_of_them_in_a_task(tmp_path, monkeypatch, capsys):
    """Five in two tasks: of three each, not of four and one."""
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    words = [JOB, "optim.lr=log:1e-4:1e-1", "--run.root", str(tmp_path), "--data.dataset", "synthetic", "--dry-run"]
    words += ["--sample", "5", "--pack", "4", "--gpus-per-node", "2", "--resources.cpus-per-rank", "3"]
    assert sweep.main([*words, "--resources.mem-gb", "8", "--max-parallel", "1"]) == 0
    output = capsys.readouterr().out
    assert len(re.findall(r"^\S+ +--optim.lr \S+$", output, re.M)) == 5
    for line in ("array=0-1%1", "gpus-per-node=6", "cpus-per-task=18", "mem=24GB", "nodes=1", "ntasks-per-node=1"):
        assert f"#SBATCH --{line}\n" in output
    assert "export OMP_NUM_THREADS=3\n" in output


@pytest.mark.processes
def test_a_sweep_does_not_count_a_cell_that_was_trained_on_synthetic_data_once_the_real_data_is_there(
    tmp_path: Path, real_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("--run.root", str(tmp_path / "runs"), "--run.max-steps", "1", "--tracking.wandb", "disabled")
    empty = str(tmp_path / "empty")
    with start(*JOBS_RUN, JOB, *settings, "--run.seed", "1", FNET_DATA=empty, **NO_NETWORK) as started:
        ended = started.end()
    assert ended.code == 0, ended.err
    [cell] = (tmp_path / "runs").iterdir()
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    for root, mark in ((empty, "  (finished, 1 steps)"), (str(real_data), "")):
        monkeypatch.setenv("FNET_DATA", root)
        assert sweep.main([JOB, *settings, "run.seed=0,1", "--dry-run"]) == 0
        assert f"{cell.name:<39}  --run.seed 1{mark}\n" in capsys.readouterr().out
    assert [*(tmp_path / "runs").iterdir()] == [cell]  # a dry run renames nothing
