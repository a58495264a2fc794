"""Rank 0 records each step once, also on a full disk, and nothing once another process owns the run."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from fnet_dist.checkpoint.state import TrainState
from fnet_dist.checkpoint.storage import checkpoint_steps
from fnet_dist.errors import LostOwnershipError
from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import claim_attempt
from fnet_dist.run.notices import NoticeLog, read_notices
from fnet_dist.run.outcome import RunOutcomeWriter, end_attempt
from fnet_dist.run.run_dir import open_run, run_dir_of
from fnet_dist.run.stop import StopFlag
from fnet_dist.training.evaluation import Evaluation
from fnet_dist.training.recorder import open_recorder
from fnet_dist.training.window import OF_EACH_RANK, StepRecord, Window
from tests.helpers.config import FashionConfig

EVALUATION = Evaluation(0.5, {"accuracy": 1.0}, 1)


@pytest.fixture
def parts(tmp_path):
    """Return config, claimed attempt and a state whose counters the tests advance."""
    config = FashionConfig.model_validate(
        {"run": {"name": "r", "root": str(tmp_path)}, "tracking": {"wandb": "disabled"}}
    )
    attempt = claim_attempt(run_dir_of(config))
    open_run(config)
    model = torch.nn.Linear(2, 2)
    return config, attempt, TrainState(model, torch.optim.SGD(model.parameters()))


def advance(state: TrainState, last: int, save: bool = False) -> Window:
    """Advance `state` to step `last`, and return the window of these steps."""
    steps = tuple(
        StepRecord(step, 64 * step, 1 / step, (1 / step,), None, None, None, 0.1, None, 0.0)
        for step in range(state.step + 1, last + 1)
    )
    state.step = state.epoch_steps = last
    state.epoch_seconds += 1
    by_rank = dict.fromkeys(("busy_ms", *OF_EACH_RANK), torch.ones(1))
    return Window(1, steps, 64 * len(steps), 1.0, 1, 0.1, 1, "", save, None, by_rank)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Return a context in which no file can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def logged_steps(run) -> list[int]:
    return [line["step"] for line in metrics_log.read(run.metrics_log) if line["kind"] == "train"]


def wait_for_checkpoint(run, step: int) -> None:
    deadline = time.monotonic() + 10
    while checkpoint_steps(run)[:1] != [step]:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_on_a_full_disk_lines_wait_and_no_checkpoint_is_saved_before_they_are_written(parts, capsys):
    config, attempt, state = parts
    run = attempt.run
    with open_recorder(config, RunOutcomeWriter(attempt), state, "loss", 100, print) as recorder:
        recorder.record_window(advance(state, 10), state, StopFlag())
        written = run.metrics_log.read_bytes()
        recorder.saver.is_asked = True
        with full_disk(len(written) + 100):  # room for a part of a line
            recorder.record_window(advance(state, 20, save=True), state, StopFlag())
            assert not recorder.saver.is_asked, "`fnet ask save` is told so, and does not wait for room"
            recorder.record_window(advance(state, 30, save=True), state, StopFlag())
            assert run.metrics_log.read_bytes() == written
        assert checkpoint_steps(run) == []
        recorder.record_window(advance(state, 40, save=True), state, StopFlag())
        assert logged_steps(run) == list(range(1, 41))
        wait_for_checkpoint(run, 40)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert [line.count("metrics.jsonl not written: No space left on device; ") for line in warnings] == [1, 1]
    assert "; 22 lines wait" in warnings[1]


def test_save_now_writes_the_waiting_lines_first(parts):
    config, attempt, state = parts
    with open_recorder(config, RunOutcomeWriter(attempt), state, "loss", 100, print) as recorder:
        with full_disk(0):
            recorder.record_window(advance(state, 10), state, StopFlag())
            with pytest.raises(OSError, match="File too large"):
                recorder.save_now(state)
        recorder.save_now(state)
    assert (logged_steps(attempt.run), checkpoint_steps(attempt.run)) == (list(range(1, 11)), [10])


def test_a_replay_logs_no_step_twice_and_no_epoch_twice(parts):
    config, attempt, state = parts
    for _ in range(2):
        state.step = state.epoch_steps = 0
        with open_recorder(config, RunOutcomeWriter(attempt), state, "loss", 100, print) as recorder:
            recorder.record_window(advance(state, 10), state, StopFlag())
            recorder.record_evaluation(state, EVALUATION, ends_epoch=True)
            recorder.record_epoch(state)
    with open_recorder(config, RunOutcomeWriter(attempt), state, "loss", 100, print) as recorder:
        state.step = 5
        recorder.record_window(advance(state, 15), state, StopFlag())  # the first five are logged already
    lines = [
        (line["kind"], line.get("step", line.get("last_step"))) for line in metrics_log.read(attempt.run.metrics_log)
    ]
    first = [("train", step) for step in range(1, 11)] + [("window", 10), ("eval", 10), ("epoch", 10)]
    assert lines == [*first, *(("train", step) for step in range(11, 16)), ("window", 15)]


def test_after_another_process_has_claimed_the_run_nothing_is_written_and_all_ranks_stop(parts):
    config, attempt, state = parts
    with open_recorder(config, RunOutcomeWriter(attempt), state, "loss", 100, print) as recorder:
        recorder.record_window(advance(state, 10), state, StopFlag())
        before = attempt.run.metrics_log.read_bytes()
        end_attempt(attempt, "crash", 0, 1)
        claim_attempt(attempt.run)
        stop = StopFlag()
        recorder.record_window(advance(state, 20, save=True), state, stop)
        assert stop.look() == "lost_ownership"
        with pytest.raises(LostOwnershipError):
            recorder.record_evaluation(state, EVALUATION, ends_epoch=True)
        with pytest.raises(LostOwnershipError):
            recorder.record_epoch(state)
        with pytest.raises(LostOwnershipError):
            recorder.save_now(state)
    assert attempt.run.metrics_log.read_bytes() == before
    assert checkpoint_steps(attempt.run) == []


def test_a_kill_between_the_best_checkpoint_and_its_name_loses_neither(parts):
    config, attempt, state = parts
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"keep_best": True})})
    with open_recorder(config, RunOutcomeWriter(attempt), state, "loss", 100, print) as recorder:
        recorder.record_window(advance(state, 10), state, StopFlag())
        state.count_evaluation(0.5, is_better=True)
        recorder.record_evaluation(state, EVALUATION, ends_epoch=False)
    named = attempt.run.best.read_text()
    assert checkpoint_steps(attempt.run) == [10]
    attempt.run.best.unlink()
    with open_recorder(config, RunOutcomeWriter(attempt), state, "loss", 100, print):
        pass
    assert attempt.run.best.read_text() == named


def told(run) -> list[str]:
    return [notice["text"] for notice in read_notices(run)]


def noted(config, attempt, alerts: str):
    """Return settings with `alerts`, and the outcome writer of rank 0 with notices on."""
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"alerts": alerts})})
    return config, RunOutcomeWriter(attempt, owns=False, notices=NoticeLog(attempt))


@pytest.mark.parametrize("alerts", ["on", "best"])
def test_an_evaluation_better_than_all_before_is_told_if_asked_for_and_not_again_after_a_resume(parts, alerts):
    config, attempt, state = parts
    config, outcome = noted(config, attempt, alerts)

    def evaluate(values: dict[int, float]) -> None:
        with open_recorder(config, outcome, state, "loss", 100, print) as recorder:
            for step, value in values.items():
                recorder.record_window(advance(state, step), state, StopFlag())
                state.count_evaluation(value, is_better=state.best_value is None or value < state.best_value)
                recorder.record_evaluation(state, Evaluation(value, {}, 1), ends_epoch=False)

    evaluate({10: 0.5, 20: 0.4, 30: 0.45})
    state.step, state.best_value, state.best_step = 10, 0.5, 10  # as the checkpoint has them
    evaluate({20: 0.4, 30: 0.45, 40: 0.3})
    better = ["r has its best loss so far, 0.4000 after step 20", "r has its best loss so far, 0.3000 after step 40"]
    assert told(attempt.run) == (better if alerts == "best" else [])
    assert [(each["metric"], each["value"]) for each in read_notices(attempt.run)][:1] == [("loss", 0.4)] * (
        alerts == "best"
    )


def test_a_straggler_of_ten_minutes_is_told(parts):
    config, attempt, state = parts
    config, outcome = noted(config, attempt, "on")
    with open_recorder(config, outcome, state, "loss", 100, print) as recorder:
        for last in range(10, 120, 10):
            window = advance(state, last)
            by_rank = {**window.by_rank, "busy_ms": torch.tensor([10.0, 10.0, 10.0, 30.0])}
            recorder.record_window(replace(window, seconds=100.0, by_rank=by_rank), state, StopFlag())
    [line] = [line for line in metrics_log.read(attempt.run.metrics_log) if line.get("slowest_rank") == 3][:1]
    assert told(attempt.run) == [f"r has waited for rank 3 for 10 minutes, since step {line['first_step']}"]


def test_the_first_save_that_fails_after_a_good_one_is_told_and_the_run_goes_on(parts):
    config, attempt, state = parts
    run = attempt.run
    config, outcome = noted(config, attempt, "on")

    def save(recorder, step: int) -> None:
        recorder.record_window(advance(state, step, save=True), state, StopFlag())
        recorder.saver._join()

    with open_recorder(config, outcome, state, "loss", 100, print) as recorder:
        for step in (10, 20, 30):
            save(recorder, step)
            if step == 10:
                good = run.checkpoints.rename(run.path / "good")
                run.checkpoints.write_text("no directory")
        run.checkpoints.unlink()
        good.rename(run.checkpoints)
        save(recorder, 40)
        with full_disk(100):
            recorder.record_window(advance(state, 50), state, StopFlag())
            recorder.record_window(advance(state, 60), state, StopFlag())
        save(recorder, 70)
    assert checkpoint_steps(run) == [70, 40]
    assert told(run) == [
        "r cannot write the checkpoint of step 20 (File exists); its last checkpoint is of step 10",
        "r cannot write metrics.jsonl, and saves no checkpoint meanwhile (File too large); "
        "its last checkpoint is of step 40",
    ]


def test_nothing_is_noted_without_an_outlet(parts):
    config, attempt, state = parts
    with open_recorder(config, RunOutcomeWriter(attempt), state, "loss", 100, print) as recorder:
        attempt.run.checkpoints.write_text("no directory")
        recorder.record_window(advance(state, 10, save=True), state, StopFlag())
    assert not attempt.run.notices.exists()
