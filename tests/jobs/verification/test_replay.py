"""`jobs verify RUN --replay` trains steps again, also with another number of ranks, and compares them bit by bit."""

import json
import re

import pytest

from fnet_dist.errors import ConfigError, FnetError
from fnet_dist.run.run_dir import RunDir, read_json
from jobs.commands.verify import main
from jobs.verification.compare_runs import run_differences
from jobs.verification.replay import replay
from jobs.verification.supervised_run import run_undisturbed

JOB = ["jobs/dropout.toml", "--data.dataset", "synthetic", "--data.global-batch-size", "500", "--run.max-steps", "120"]
JOB += ["--parallel.numerics", "invariant", "--parallel.hash-every-steps", "20", "--checkpoint.every-steps", "40"]
JOB += ["--checkpoint.keep-last", "5", "--tracking.wandb", "disabled", "--nproc-per-node", "1"]

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run of one process, without the limit of threads that launchers set for several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        return run_undisturbed(tmp_path_factory.mktemp("replayed"), JOB)


def test_one_process_has_the_bits_of_two_ranks_although_only_two_get_a_thread_limit(run, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    other = run_undisturbed(tmp_path, [*JOB[:-1], "2"])
    assert run_differences(run, other, same_ranks=False) == []
    assert [read_json(each.manifest)["conditions"]["threads"] for each in (run, other)] == [1, 1]


def test_an_untouched_run_is_equal_at_another_number_of_ranks(run, capfd):
    assert main([str(run.path), "--replay", "50:120", "--nproc-per-node", "2"]) == 0
    printed = capfd.readouterr()
    assert printed.out == "equal: undisturbed, steps 50 to 120\n"
    assert printed.err == "trained steps 41 to 120 again\n"


def test_the_first_step_and_tensor_that_differ_are_named(run):
    """The hash of step 80 and the loss of step 90 are changed in the metrics log."""
    lines = [json.loads(line) for line in run.metrics_log.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "hash" and line["step"] == 80:
            line["weights"]["hidden2.bias"] = "0" * 64
        if line["kind"] == "train" and line["step"] == 90:
            line["loss"] += 1e-6
    forged = run.metrics_log.with_name("forged")
    forged.write_text("".join(json.dumps(line) + "\n" for line in lines))
    forged.replace(run.metrics_log)
    with pytest.raises(FnetError, match=r"undisturbed differs from its replay at step 80: hidden2.bias$"):
        replay(run, "", None)


def test_requests_that_cannot_be_replayed_are_refused_in_one_line(run):
    with pytest.raises(FnetError, match=r"the replay failed: parallel.logical_shards 8 cannot be shared by 3 ranks"):
        replay(run, "", 3)
    with pytest.raises(ConfigError, match=r"--nproc-per-node 2 is for --replay"):
        main([str(run.path), "--nproc-per-node", "2"])
    for steps in ("0:5", "7", "50:121", "a:b", "9:8"):
        with pytest.raises(ConfigError, match=rf"--replay {re.escape(steps)}: expected steps A:B from 1 to 120"):
            replay(run, steps, None)
    config = json.loads(run.config.read_text())
    config["parallel"]["numerics"] = "fast"
    run.config.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"without parallel\.numerics invariant, only 1 ranks give the same bits"):
        replay(run, "", 2)
