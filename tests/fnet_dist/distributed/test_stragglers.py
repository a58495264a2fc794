"""Detection of a straggler: no rank in healthy windows, and a rank slowed by 20 ms a step within five windows.

healthy_windows.json is measured noise: each rank's compute time, ms, in successive windows of healthy training at 2 and
4 ranks on two cores, written by `python -m tests.benchmarks.blame`. Tests draw blocks of successive windows from it, so
that noise which lasts for some windows is kept. A test that fails prints its seed.
"""

import json
import random
import statistics
from itertools import chain
from pathlib import Path

import pytest

from fnet_dist.distributed.stragglers import (
    MAX_EXCESS,
    NOISE_MS,
    RECENT_WINDOWS,
    SLOW_RATIO,
    Straggler,
    StragglerStreak,
    detect_straggler,
)

NOISE = {
    (entry["world_size"], entry["global_batch_size"]): entry["own_ms"]
    for entry in json.loads((Path(__file__).parent / "healthy_windows.json").read_text())
}
BLOCK = 20  # windows that stay together, some ten seconds
SLOWED_MS = 20
# (ranks, step in ms) -> global batch whose noise to use: that of steps about as long. With 4 ranks on 2 cores none was
# measured for 100 ms, because windows of one or two steps are too noisy.
NOISE_OF = {(2, 2): 64, (2, 30): 4096, (2, 100): 16384, (4, 2): 64, (4, 30): 4096, (4, 100): 4096}


def draw(noise: list[list[float]], windows: int, randomness: random.Random) -> list[list[float]]:
    """Return `windows` windows, in blocks drawn from anywhere in `noise` (the block bootstrap)."""
    blocks = [randomness.randrange(len(noise) - BLOCK + 1) for _ in range(windows // BLOCK + 1)]
    return [*chain.from_iterable(noise[start : start + BLOCK] for start in blocks)][:windows]


def detections(windows: list[list[float]]) -> list[int | None]:
    """Return the rank that is detected at each window, or None."""
    return [
        detect_straggler(windows[max(0, end - RECENT_WINDOWS) : end]).slowest_rank for end in range(1, len(windows) + 1)
    ]


def test_the_noise_covers_two_and_four_ranks_in_hundreds_of_windows():
    assert {*NOISE} == {(ranks, batch) for (ranks, _), batch in NOISE_OF.items()}
    assert all(len(windows) >= 200 for windows in NOISE.values())
    assert {len(window) for windows in NOISE.values() for window in windows} == {2, 4}


@pytest.mark.parametrize(("ranks", "batch"), NOISE)
def test_no_rank_is_detected_in_10_000_healthy_windows(ranks, batch):
    seed = random.randrange(10**9)
    named = detections(draw(NOISE[ranks, batch], 10_000, random.Random(seed)))
    assert {*named} == {None}, f"seed {seed}: {len(named) - named.count(None)} windows"


@pytest.mark.parametrize(("ranks", "step_ms"), NOISE_OF)
def test_a_rank_slowed_by_20_ms_a_step_is_detected_within_5_windows_and_no_other_rank_is(ranks, step_ms):
    noise = NOISE[ranks, NOISE_OF[ranks, step_ms]]
    scale = step_ms / statistics.median(chain.from_iterable(noise))
    for _ in range(500):
        seed = random.randrange(10**9)
        randomness = random.Random(seed)
        windows = [[scale * ms for ms in window] for window in draw(noise, 15, randomness)]
        slow = randomness.randrange(ranks)
        for window in windows[5:10]:
            window[slow] += SLOWED_MS
        named = detections(windows)
        assert named[:5] == [None] * 5, f"seed {seed}"
        assert slow in named[5:10], f"seed {seed}"
        assert {*named[5:]} <= {None, slow}, f"seed {seed}"
        assert named[-1] is None, f"seed {seed}: still detected after 5 healthy windows"


def test_a_slow_rank_is_detected_in_its_fourth_window_and_cleared_in_its_first_healthy_one():
    healthy, slow = [10.0, 10.0], [10.0, 30.0]
    assert detections([healthy, healthy, *[slow] * 6, *[healthy] * 3]) == [None] * 5 + [1] * 3 + [None] * 3
    assert detections([slow] * 4) == [None, None, None, 1]


def test_one_healthy_window_between_slow_ones_does_not_prevent_detection():
    healthy, slow = [10.0, 10.0], [10.0, 30.0]
    assert detections([slow, slow, healthy, slow, slow])[-1] == 1


def test_single_slow_windows_are_not_detected_however_long():
    healthy, outlier = [10.0, 10.0], [10.0, 5000.0]
    assert {*detections([healthy, outlier, healthy, outlier, outlier, healthy])} == {None}
    assert 3 * MAX_EXCESS < RECENT_WINDOWS * SLOW_RATIO < 4 * MAX_EXCESS


def test_of_two_slow_ranks_the_slower_is_detected():
    assert detect_straggler([[10.0, 30.0, 31.0, 10.0]] * 5).slowest_rank == 2
    assert detect_straggler([[10.0, 30.0, 31.0, 10.0]] * 4 + [[10.0, 31.0, 30.0, 10.0]]).slowest_rank == 1


def test_a_difference_within_the_noise_of_a_step_is_ignored():
    assert detect_straggler([[1.0, 1.0 + NOISE_MS]] * 5) == Straggler(None, 1.0 + NOISE_MS)
    assert detect_straggler([[100.0, 100.0 + NOISE_MS + 11.0]] * 5).slowest_rank == 1
    assert detect_straggler([[100.0, 100.0 + NOISE_MS + 9.0]] * 5).slowest_rank is None


def test_the_ratio_is_to_the_median_rank_of_the_newest_window_of_two_ranks_to_the_faster():
    assert detect_straggler([[9.0, 9.0], [10.0, 15.0]]) == Straggler(None, 1.5)
    assert detect_straggler([[10.0, 20.0, 40.0]]) == Straggler(None, 2.0)
    assert detect_straggler([[0.0, 0.0]]).max_over_median == 0.0


def test_a_single_rank_has_no_result():
    assert detect_straggler([]) == detect_straggler([()]) == Straggler(None, None)


def told(windows: list[tuple[int | None, float]]) -> dict[int, int]:
    """Return {index of a window: first step that is told there}; each window has ten steps."""
    streak = StragglerStreak()
    steps = {index: streak.add(rank, 10 * index + 1, seconds) for index, (rank, seconds) in enumerate(windows)}
    return {index: step for index, step in steps.items() if step is not None}


def test_a_rank_that_all_windows_of_ten_minutes_name_is_told_once_with_the_first_step() -> None:
    assert told([(None, 0.5)] * 3 + [(2, 0.5)] * 3000) == {3 + 1199: 31}
    assert told([(2, 300.0), (2, 299.0)]) == {}
    assert told([(2, 300.0), (2, 300.0), (2, 300.0), (2, 300.0)]) == {1: 1}


def test_a_window_that_names_another_rank_or_none_begins_anew() -> None:
    for other in (None, 1):
        assert told([(2, 599.0), (other, 0.5), (2, 599.0)]) == {}
        assert told([(2, 599.0), (other, 0.5), (2, 300.0), (2, 300.0)]) == {3: 21}
    assert told([(2, 600.0), (1, 600.0), (2, 600.0)]) == {0: 1, 1: 11, 2: 21}
    assert told([(None, 600.0)] * 3) == {}
