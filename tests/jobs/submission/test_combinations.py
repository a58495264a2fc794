"""The runs of a sweep: all combinations of values, or as many as are wanted from ranges, always the same."""

import math
import re
from itertools import pairwise

import pytest

from fnet_dist.errors import ConfigError
from jobs.submission.combinations import combinations, sample
from tests.helpers.config import FashionConfig

KEYS = [
    "optim.lr=log:1e-4:1e-1",
    "model.dropout=0:0.5",
    "data.global-batch-size=log:32:256",
    "model.activation=relu,tanh",
]


def drawn(*words: str, number: int = 300, seed: int = 0) -> list[dict[str, str]]:
    cells = sample(words, FashionConfig, number, seed)
    return [dict(zip(cell[::2], cell[1::2], strict=True)) for cell in cells]


def test_values_are_combined_in_the_order_in_which_they_are_given():
    found = combinations(["optim.lr=0.001,3e-3", "model.activation=relu,tanh"], FashionConfig)
    assert [" ".join(words) for words in found] == [
        "--optim.lr 0.001 --model.activation relu",
        "--optim.lr 0.001 --model.activation tanh",
        "--optim.lr 3e-3 --model.activation relu",
        "--optim.lr 3e-3 --model.activation tanh",
    ]


def test_a_key_that_is_mistyped_is_named_with_the_nearest_one():
    for given in ({"number": 8}, {"number": 1}):
        with pytest.raises(ConfigError, match=r"optim\.lrr: unknown setting; nearest: optim\.lr"):
            drawn("optim.lrr=log:1e-4:1e-1", **given)


def test_a_draw_is_the_same_for_ever_and_a_larger_one_begins_with_it():
    assert [" ".join(words) for words in sample(KEYS[:3], FashionConfig, 2, 0)] == [
        "--optim.lr 0.0007822 --model.dropout 0.1464 --data.global-batch-size 111",
        "--optim.lr 0.00056 --model.dropout 0.171 --data.global-batch-size 88",
    ]
    cells = sample(KEYS, FashionConfig, 20, 0)
    assert sample(KEYS, FashionConfig, 10, 0) == cells[:10]
    assert sample(KEYS, FashionConfig, 20, 1)[0] != cells[0]


def test_numbers_fill_their_range_evenly_and_are_short_and_of_the_settings_type():
    cells = drawn(*KEYS)
    for name, least, most, scale in (
        ("--optim.lr", 1e-4, 1e-1, math.log),
        ("--model.dropout", 0, 0.5, float),
        ("--data.global-batch-size", 32, 256, math.log),
    ):
        numbers = sorted(float(cell[name]) for cell in cells)
        assert least <= numbers[0] < numbers[-1] <= most
        gaps = [scale(after) - scale(before) for before, after in pairwise(numbers)]
        assert max(gaps) < (scale(most) - scale(least)) / 20
    assert {cell["--model.activation"] for cell in cells} == {"relu", "tanh"}
    assert all(cell["--data.global-batch-size"].isdigit() for cell in cells)
    assert (
        max(
            len(text.replace("-", "").replace(".", "").lstrip("0").partition("e")[0])
            for text in (cell["--optim.lr"] for cell in cells)
        )
        <= 4
    )


def test_both_ends_of_whole_numbers_are_drawn_as_often_as_the_others():
    seeds = [drawn("run.seed=0:2", number=1, seed=seed)[0]["--run.seed"] for seed in range(300)]
    assert {text: 70 < seeds.count(text) < 130 for text in seeds} == {"0": True, "1": True, "2": True}


def test_a_colon_in_a_setting_that_is_no_number_is_part_of_its_value():
    assert combinations(["resources.time=1:00:00"], FashionConfig) == [["--resources.time", "1:00:00"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.lr=log:0:1"], "optim.lr=log:0:1: expected numbers A:B with A below B, or log:A:B with A above 0"),
        (["optim.lr=0.1:0.01"], "optim.lr=0.1:0.01: expected numbers"),
        (["optim.lr=0.1:0.1"], "optim.lr=0.1:0.1: expected numbers"),
        (["optim.lr=a:b"], "optim.lr=a:b: expected numbers"),
        (["optim.lr=0:inf"], "optim.lr=0:inf: expected numbers"),
        (["optim.lr=nan:1"], "optim.lr=nan:1: expected numbers"),
        (["optim.lr=0:1:2"], "optim.lr=0:1:2: expected numbers"),
        (["optim.lr=0:1,2"], "optim.lr=0:1,2: expected numbers"),
        (["run.seed=0.5:3"], "run.seed=0.5:3: expected whole numbers A:B with"),
        (["run.seed=0:2", "run.seed=5"], "a key is swept over twice: run.seed, run.seed; give all its values at once"),
        ([], "nothing to sweep over: expected KEY=VALUE,VALUE, like optim.lr=0.001,0.003, or with --sample a range"),
        (["run.seed=0:2"], "--sample 4: only 3 different runs are in run.seed=0:2; draw fewer"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(words, said):
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}.*$"):
        sample(words, FashionConfig, 4, 0)


def test_without_a_number_of_runs_a_range_is_refused():
    with pytest.raises(
        ConfigError, match=r"^optim.lr=0:1 is a range; give --sample N, how many runs to draw from it, or"
    ):
        combinations(["run.seed=1,2", "optim.lr=0:1"], FashionConfig)
