"""One sentence says where the time of the steps goes."""

from typing import Any

import pytest

from jobs.bottleneck import describe_bottleneck

COMPUTE = "compute-bound: 83 % of the step computes, 3 % waits for data"
INPUT = "input-bound: 62 % of the step waits for data"


def window(data: list[float], compute: list[float], exchange: list[float], step_ms: float = 100.0) -> dict[str, Any]:
    def spread(values: list[float]) -> dict[str, Any]:
        ordered = sorted(values)
        lower = ordered[(len(ordered) - 1) // 2]
        return {"min": ordered[0], "median": lower, "max": ordered[-1], "max_rank": values.index(ordered[-1])}

    line: dict[str, Any] = {"world_size": len(data), "step_ms": step_ms}
    return line | {"data_ms": spread(data), "compute_ms": spread(compute), "exchange_ms": spread(exchange)}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (window([1, 1, 62, 1], [30] * 4, [61, 61, 0.5, 61]), f"{INPUT}, worst on rank 2"),
        (window([62] * 4, [30] * 4, [1] * 4), f"{INPUT}, worst on rank 0"),
        (window([62], [30], [0]), INPUT),
        (window([1] * 8, [50] * 5 + [90] + [50] * 2, [41] * 5 + [1] + [41] * 2), "rank 5 computes 1.8x the median"),
        (window([1] * 4, [50] * 4, [40, 45, 44, 41]), "exchange-bound: 40 % of the step exchanges gradients"),
        (window([3, 2], [83, 84], [5, 4]), f"{COMPUTE}, 4 % exchanges gradients"),
        (window([3], [83], [0]), COMPUTE),
        (window([3, 2], [35, 36], [7, 8]), "53 % of the step is neither data, computation nor exchange: "
         "the optimizer, or other processes on the cores"),
    ],
)  # fmt: skip
def test_the_largest_loss_of_time_is_named(line: dict[str, Any], sentence: str) -> None:
    assert describe_bottleneck([line]) == sentence


def test_one_window_of_many_does_not_decide() -> None:
    usual, odd = window([3, 2], [83, 84], [5, 4]), window([90, 1], [5, 5], [1, 89])
    assert describe_bottleneck([usual, usual, odd]) == f"{COMPUTE}, 4 % exchanges gradients"


def test_an_older_log_has_no_times() -> None:
    assert describe_bottleneck([]) == describe_bottleneck([{}]) == ""
    assert describe_bottleneck([{"step_ms": 1.0, "data_ms": None}]) == ""
