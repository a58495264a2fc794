"""submit, sweep and cancel on a real Slurm: refusals before anything is written, arrays, one line each."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fnet_dist.errors import ConfigError
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import RunDir, read_json, write_json
from jobs.__main__ import main
from jobs.runs import find_run_or_job
from jobs.verification.supervised_slurm_run import SupervisedSlurmRun
from slurm import client
from slurm.sandbox.conf_files import LocalCluster
from slurm.submit_env import changed as environment
from tests.helpers.slurm_commands import ask, wait_for
from tests.helpers.submitted_runs import JOB, changed, jobs, place

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("slurm_programs"), pytest.mark.timeout(120)]


@pytest.fixture(scope="module", autouse=True)
def here(cluster: LocalCluster) -> Iterator[None]:
    """All that is asked here is asked of the private cluster."""
    with environment(cluster.environment):
        yield


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-p", "gpu"], "partition 'gpu' is not in this cluster; it has grace, high, low, main"),
        (["-N", "9"], "resources.nodes is 9, partition main has 3 nodes; ask for less, or another --partition"),
        (["--gpus-per-node", "8"], "resources.gpus_per_node is 8, partition main has 2 GPUs a node; ask for less, or"),
        (
            ["--resources.cpus-per-rank", "64"],
            "resources.cpus_per_rank x ranks a node is 64, partition main has 4 CPUs",
        ),
        (["--gpus-per-node", "2"], "parallel.device is cpu, so 2 GPUs a node would stand idle; use --parallel.device"),
        (["--parallel.numerics", "invariant", "-N", "3"], "parallel.logical_shards 8 cannot be shared by 3 ranks; use"),
        (["-t", "7", "--resources.signal-s", "120"], "resources.time (-t) 7 is 420 s, less than 4 x resources.signal"),
        (["--tracking.wandb", "online"], "tracking.wandb online: no API key for"),
        (["-A", "a\nb"], "account 'a\\nb': expected letters, digits and"),
        (["--data.dataset", "fashion-mnist", "--data.root", "/nowhere"], "data.root: /nowhere/FashionMNIST/raw/"),
        (["--run.root", "/proc/runs"], "/proc/runs/r cannot be written: /proc: No such file or directory; use another"),
        (["--sbatch", "reservation=none"], "sbatch refused: "),
        (["--optim.lr", "-1"], "optim.lr: got -1.0, expected a number > 0"),
    ],
)
def test_a_job_that_cannot_run_is_refused_in_one_line_and_writes_nothing(
    tmp_path, monkeypatch, capsys, repository, words, said
):
    monkeypatch.chdir(repository)
    job = [
        word
        for word in JOB
        if word not in ("--tracking.wandb", "disabled", "--data.dataset", "fashion-mnist", "synthetic")
    ]
    job += [] if "--data.dataset" in words else ["--data.dataset", "synthetic"]
    job += [] if "--tracking.wandb" in words else ["--tracking.wandb", "disabled"]
    where = ["--run.name", "r", *([] if "--run.root" in words else ["--run.root", str(tmp_path)])]
    assert main(["submit", *job, *where, *words]) in (1, 2)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1, told
    assert told[0].startswith(f"error: {said}"), told
    assert [*tmp_path.iterdir()] == []
    assert client.queue() == []


@pytest.fixture
def all_partitions(cluster):
    """A cluster without a default partition, whose plugin chooses for jobs that name none."""
    conf = Path(cluster.environment["SLURM_CONF"])
    before = conf.read_text()
    conf.write_text(f"{before.replace('Default=YES', 'Default=NO')}\nJobSubmitPlugins=all_partitions\n")
    ask(cluster, "scontrol", "reconfigure")
    yield
    conf.write_text(before)
    ask(cluster, "scontrol", "reconfigure")


@pytest.fixture
def hidden(cluster):
    ask(cluster, "scontrol", "create", "PartitionName=hidden", "Nodes=ALL", "Hidden=YES", "State=UP")
    yield
    ask(cluster, "scontrol", "delete", "PartitionName=hidden")


@pytest.mark.parametrize(
    ("words", "doubt", "needs"),
    [
        (["-p", "high", "-t", "2:00:00"], "resources.time is 120, partition high has 60 minutes", None),  # a QOS may do
        ([], "the cluster has no default partition", "all_partitions"),
        (["-p", "hidden"], None, "hidden"),
    ],
    ids=["limit", "plugin", "hidden"],
)
def test_what_slurm_accepts_is_submitted_whatever_our_checks_think(tmp_path, request, words, doubt, needs):
    if needs:
        request.getfixturevalue(needs)
    run = RunDir(tmp_path / "r")
    sent = jobs("submit", *JOB, *place(run), *words, "--sbatch", "begin=now+1hour")
    assert sent.returncode == 0, sent.stderr
    if doubt is None:
        assert sent.stderr == ""
    else:
        assert sent.stderr.startswith(f"WARNING: {doubt}")
        assert sent.stderr.endswith("; Slurm takes the job all the same, and may let it wait\n")
    again = jobs("submit", *JOB, *place(run), *words)
    assert (again.returncode, "is owned by Slurm job" in again.stderr) == (2, True)
    assert " queued " in jobs("status", str(run.path)).stdout
    assert "(pending) is cancelled" in jobs("cancel", str(run.path)).stdout


def test_a_dry_run_prints_the_script_that_submit_sends_and_writes_nothing(tmp_path, cluster):
    run = RunDir(tmp_path / "r")
    words = [*JOB, *place(run), "-N", "2", "--sbatch", "begin=now+1hour"]
    shown = jobs("submit", *words, "--dry-run")
    ended = jobs("submit", *words, "--dry-run", "--sbatch", "reservation=none")
    assert ended.returncode == 0, ended.stderr
    refused = ended.stdout.splitlines()[-1]
    assert refused.startswith("# Slurm, now: ")
    assert "eservation" in refused
    assert [*tmp_path.iterdir()] == []
    sent = json.loads(jobs("submit", *words, "--json").stdout)
    text, node = shown.stdout.split("\n# on each node: ")
    assert text == run.sbatch.read_text()
    node, start = node.splitlines()
    assert node == f"fnet run {run.config} --nproc-per-node 1"
    assert re.fullmatch(r"# Slurm, now: Job \d+ to start at \w+ \w+ .* 20\d\d using .*nodes node\[0-1\].*", start)
    assert jobs("cancel", str(run.path)).stdout == f"r: job {sent['job_id']} (pending) is cancelled\n"


def test_a_job_waits_for_runs_and_jobs_that_are_named(tmp_path, cluster):
    first, second, third = (RunDir(tmp_path / name) for name in ("first", "second", "third"))
    later = ["--sbatch", "begin=now+1hour"]
    ids = [json.loads(jobs("submit", *JOB, *place(run), *later, "--json").stdout)["job_id"] for run in (first, second)]
    assert jobs("submit", *JOB, *place(third), "--after", str(first.path), "--after-any", ids[1]).returncode == 0
    text = ask(cluster, "scontrol", "show", "job", read_json(third.job)["id"])
    assert f"Dependency=afterok:{ids[0]}(unfulfilled),afterany:{ids[1]}(unfulfilled)" in text
    for job_id in (read_json(third.job)["id"], *ids):
        client.cancel(job_id)
    fourth = [*JOB, *place(RunDir(tmp_path / "fourth")), "--dry-run"]
    for status, kind, told in (  # of a run whose job was cancelled in the queue
        ("", "--after", "is neither finished nor in a Slurm job that is to finish it"),
        ("stopped", "--after", "is neither finished nor in a Slurm job that is to finish it"),
        ("stopped", "--after-any", ""),
        ("finished", "--after", ""),
    ):
        if status:
            write_json(first.outcome, {"status": status})
        asked = jobs("submit", *fourth, kind, str(first.path))
        assert (asked.returncode, told in asked.stderr) == (2 if told else 0, True), asked.stderr
        assert "dependency" not in asked.stdout, "Slurm soon forgets a job"
    here = jobs("submit", *JOB, *place(third), "--after", str(second.path), "--cluster", "local")
    assert "--after and --after-any are Slurm's" in here.stderr
    both = jobs("submit", *JOB, *place(RunDir(tmp_path / "fourth")), "--after", "1", "--sbatch", "dependency=singleton")
    assert (both.returncode, "are the same option of sbatch" in both.stderr) == (2, True)


def test_the_wandb_key_is_in_no_script_pickle_or_settings(tmp_path):
    """And the pickle is no program: a function's name and a path."""
    run = RunDir(tmp_path / "r")
    ended = jobs("submit", *JOB, *place(run), "--sbatch", "begin=now+1hour", WANDB_API_KEY="c4n4ry" * 7)
    assert ended.returncode == 0, ended.stderr
    files = [path for path in run.path.rglob("*") if path.is_file() and run.code not in path.parents]
    assert {path.suffix for path in files} >= {".pkl", ".sh", ".json", ".sbatch"}
    assert [path for path in files if b"c4n4ry" in path.read_bytes()] == []
    (pickle,) = [path for path in files if path.suffix == ".pkl"]
    assert len(pickle.read_bytes()) < 1000
    client.cancel(read_json(run.job)["id"])


def test_code_that_was_changed_since_is_not_run(tmp_path, cluster):
    run = RunDir(tmp_path / "r")
    sent = jobs("submit", *JOB, *place(run), "--sbatch", "begin=now+1hour")
    assert sent.returncode == 0, sent.stderr
    supervised = SupervisedSlurmRun(run, read_json(run.job)["id"])
    (code,) = run.code.iterdir()
    (code / "LICENSE").write_text("")
    ask(cluster, "scontrol", "update", f"JobId={supervised.job_id}", "StartTime=now")
    ended = supervised.wait_for_end()
    assert (ended.state, ended.exit_code) == ("FAILED", 2)
    told = (run.submitit / f"{supervised.job_id}_0_log.out").read_text()
    assert f"error: {code} is not the code that was submitted: it has changed since; submit again" in told
    assert supervised.ends() == []


def test_cluster_local_wait_runs_on_this_machine_and_returns_the_runs_exit_code(tmp_path):
    run = RunDir(tmp_path / "r")
    job = [*JOB, *place(run), "--cluster", "local", "--wait"]
    assert jobs("submit", *job, "-N", "2").stderr.startswith("error: resources.nodes is 2, this machine is one; use")
    ended = jobs("submit", *job, "--optim.lr", "1e30")
    assert (ended.returncode, read_outcome(run)["reason"]) == (1, "non_finite"), ended.stderr
    assert [path.name for path in run.path.glob("submitit/*.sh")] == []


def test_a_sweep_is_one_array_with_a_run_for_each_combination(tmp_path, cluster):
    words = ["sweep", *changed(JOB, "--run.max-steps", "20"), "--run.root", str(tmp_path), "--max-parallel", "2"]
    words += ["optim.lr=0.001,0.003", "run.seed=0,1"]
    assert jobs(*words, "--dry-run").stdout.splitlines()[-1].startswith("# Slurm, now: Job ")
    ended = jobs(*words)
    assert ended.returncode == 0, ended.stderr
    submitted, after = ended.stdout.splitlines()[-2:]
    assert submitted.endswith("4 runs, up to 44 CPU-hours: 44 allocations of 60 min, if it is requeued that often")
    sweep = re.fullmatch(r"next: \S+ status (\S+) --watch; .*; to compare: \S+ report \1", after)[1]
    wait_for(lambda: client.queue() == [], 90)
    runs = [RunDir(path.parent) for path in tmp_path.glob("*/config.json")]
    found = {
        (read_json(run.config)["optim"]["lr"], read_json(run.config)["run"]["seed"]): read_outcome(run) for run in runs
    }
    assert {cell: outcome["status"] for cell, outcome in found.items()} == dict.fromkeys(
        [(0.001, 0), (0.001, 1), (0.003, 0), (0.003, 1)], "finished"
    )
    assert len({read_json(run.job)["id"].partition("_")[0] for run in runs}) == 1
    assert len({read_json(run.config)["tracking"]["group"] for run in runs}) == 1
    *again, last = jobs(*words).stdout.splitlines()
    assert [line.endswith("(finished, 20 steps)") for line in again] == [True] * 4
    assert last.endswith(f"report {sweep}")
    array = read_json(runs[0].job)["id"].partition("_")[0]
    cells = [f"seed {seed}, lr {lr}" for lr in (0.001, 0.003) for seed in (0, 1)]
    for named in (sweep, array):  # the sweep's directory, or its job's id
        shown = jobs("status", named, "--root", str(tmp_path)).stdout
        assert [re.split("  +", line)[:2] for line in shown.splitlines()][2:6] == [[cell, "finished"] for cell in cells]
    page = jobs("report", sweep)
    assert page.returncode == 0, page.stderr
    assert "optim.\nlr" not in page.stdout
    assert page.stdout.splitlines()[-1].endswith("report/compare.html")
    with pytest.raises(ConfigError, match=f"job {array} is of 4 runs: .*; name one of them"):
        find_run_or_job(array, tmp_path)
