"""1,024 ranks on 128 nodes, in one process and without the computation: within bounds of memory and time."""

import json
import threading
import time
import tracemalloc
from contextlib import closing

import pytest
import torch
from rich.console import Console

from fnet_dist.data.sampler import GlobalBatchSampler
from fnet_dist.distributed.stragglers import detect_straggler
from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import claim_attempt, heartbeat_thread
from fnet_dist.tracking.rows import RowBuilder
from fnet_dist.training.window_lines import window_lines
from jobs.commands import status
from jobs.launcher.rendezvous import check_connection, open_listening_socket, wait_for_attempt
from tests.helpers.made_run import NOTHING, make_run
from tests.helpers.simulated_ranks import WORST, close_window_of_many, steps_of

RANKS, NODES, BATCH, SAMPLES, EVERY = 1024, 128, 4096, 60_000, 50


@pytest.fixture
def within():
    """Limit a test's time and Python memory (without tensors)."""
    tracemalloc.start()
    began = time.monotonic()
    yield
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - began < 60
    assert most < 200e6


def windows(count=4, steps=100):
    """Yield windows of steps from 1 on, closed as rank 0 closes them."""
    for first in range(1, count * steps, steps):
        yield close_window_of_many(RANKS, steps_of(first, steps, BATCH), EVERY)


@pytest.mark.usefixtures("within")
def test_the_local_batches_of_all_ranks_are_the_epoch():
    ranks = [
        GlobalBatchSampler(range(SAMPLES), global_batch_size=BATCH, rank=rank, world_size=RANKS).steps()
        for rank in range(RANKS)
    ]
    order = GlobalBatchSampler(range(SAMPLES), global_batch_size=BATCH).permutation()
    for step in range(-(-SAMPLES // BATCH)):
        microbatches = [next(steps).microbatches[0] for steps in ranks]
        samples = torch.cat([microbatch.indices[: microbatch.samples] for microbatch in microbatches])
        assert {microbatch.samples for microbatch in microbatches} <= ({4} if step < SAMPLES // BATCH else {2, 3})
        assert torch.equal(samples.sort().values, order[step * BATCH : (step + 1) * BATCH].sort().values)


@pytest.mark.usefixtures("within")
def test_windows_metrics_log_status_and_tracker_rows(tmp_path, capsys):
    run = make_run(tmp_path, NOTHING)
    for closed in windows():
        metrics_log.append(run.metrics_log, window_lines(closed, 1, detect_straggler([closed.by_rank["busy_ms"]] * 5)))
    lines = list(metrics_log.read(run.metrics_log))
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 401))
    mean = 1 + (sum(rank / 1000 for rank in range(RANKS)) - WORST / 1000 + 99) / RANKS
    assert [line["loss"] for line in train] == pytest.approx([mean] * 400, rel=1e-12)
    assert [line["step"] for line in train if line["loss_per_rank"]] == list(range(EVERY, 401, EVERY))
    assert all(len(line["loss_per_rank"] or range(RANKS)) == RANKS for line in train)
    other = train[0]
    assert (other["loss_min"], other["loss_max"], other["worst_rank"]) == (1.0, 100.0, WORST)
    assert train[EVERY - 1]["loss_max"] is None  # never both

    rows = RowBuilder(EVERY)
    shown = [row for row in map(rows.add, lines) if row] + [rows.pending_row()]
    assert [row["trainer/step"] for row in shown] == list(range(EVERY, 401, EVERY))
    assert {(row["loss/min"], row["loss/max"], row["loss/worst_rank"]) for row in shown} == {(1.0, 100.0, WORST)}
    assert {row["trainer/world_size"] for row in shown} == {RANKS}
    assert {len(row) for row in shown[1:]} == {len(shown[1])}
    assert len(shown[1]) < 40

    assert run.metrics_log.stat().st_size / len(train) < 1000  # bytes a step; all losses of each would be 12,000
    status.one_run(run, Console(width=120))
    assert status.main([str(run.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 400


@pytest.mark.usefixtures("within")
def test_an_evaluation_between_two_rows_gets_a_row_with_what_its_step_has():
    line = {"kind": "train", "step": 7, "epoch": 1, "samples": 7, "loss": 2.0, "loss_per_rank": None, "loss_min": 1.0}
    line |= {"loss_max": 3.0, "worst_rank": 5, "lr": 0.1, "grad_norm": None, "time": 7.0, "attempt": 1}
    rows = RowBuilder(EVERY)
    rows.add({"kind": "window", "samples_per_second": 1.0, "step_ms": 1.0, "max_memory_gib": 1.0, "world_size": RANKS}
             | {"first_step": 1, "last_step": 6, "slowest_rank": None, "max_over_median": None}
             | {"attempt": 1})  # fmt: skip
    rows.add(line)
    rows.add({"kind": "eval", "step": 7, "loss": 1.0, "metrics": {"accuracy": 0.5}})
    row = rows.add({"kind": "epoch", "step": 7, "train_loss": 2.0})
    assert (row["loss/min"], row["loss/max"], row["loss/worst_rank"]) == (1.0, 3.0, 5)
    assert row["trainer/world_size"] == RANKS


@pytest.mark.usefixtures("within")
def test_128_nodes_rendezvous(tmp_path):
    """All wait for node 0's attempt and then connect to its listening socket at once."""
    run = make_run(tmp_path, NOTHING)
    found = []

    def node():
        attempt = wait_for_attempt(run, 0, 0, 30, lambda: False, None)
        check_connection(json.loads(attempt.begin.read_text())["address"], lambda: False)
        found.append(attempt.number)

    nodes = [threading.Thread(target=node) for _ in range(NODES - 1)]
    with closing(open_listening_socket("lo", None)) as listening:
        for each in nodes:
            each.start()
        attempt = claim_attempt(run, address="{}:{}".format(*listening.getsockname()))
        with heartbeat_thread(attempt):
            for each in nodes:
                each.join(40)
    assert found == [attempt.number] * (NODES - 1)
