"""A loss that is not finite, or weights that differ: the steps are repeated once, which tells data from machine."""

import re
from pathlib import Path
from typing import Any

import pytest

from fnet_dist.run.attempt import list_attempts
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import RunDir, read_json
from jobs.verification.compare_runs import gaps, run_differences
from tests.helpers.processes import JOBS_RUN, Ended, start

pytestmark = pytest.mark.processes

# Sample 41 may be NaN. Once in all attempts, in its 30th training batch, rank 1 may flip a bit of a weight.
RECIPE = """
import os
from pathlib import Path

import torch
from torch import nn

from fnet_dist.recipe import Classification, DataConfig as Base, DatasetInfo, InMemoryDataset
from fnet_dist.recipe import Section, setting

metrics = Classification()


class DataConfig(Base):
    nan: bool = setting("sample 41 is NaN", False)


class ModelConfig(Section):
    flips: int | None = setting("the bit that flips", None)


def build_dataset(config, split, device):
    inputs = torch.randn(160, 4, generator=torch.Generator().manual_seed(0))
    if config.nan and split == "train":
        inputs[41] = float("nan")
    info = DatasetInfo("numbers", "1", class_names=("even", "odd"))
    return InMemoryDataset(inputs, torch.arange(160) % 2, device, info)


class Model(nn.Module):
    def __init__(self, bit):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.bit, self.batches, self.flipped = bit, 0, Path(os.environ["FLIPPED"])

    def forward(self, x):
        self.batches += self.training
        is_due = self.bit is not None and self.batches == 30 and os.environ["RANK"] == "1"
        if is_due and not self.flipped.exists():
            self.flipped.touch()
            with torch.no_grad():
                self.layer.weight.view(torch.int32)[0, 0] ^= 1 << self.bit
        return self.layer(100 * x)


def build_model(config, train_data):
    return Model(config.flips)
"""


def train(folder: Path, *options: str) -> tuple[RunDir, Ended]:
    """Train three ranks for 200 steps, with a checkpoint at each tenth and hashes at each fifth."""
    (folder / "faulty.py").write_text(RECIPE)
    job = folder / "job.toml"
    job.write_text(
        f'recipe = "faulty"\nrun = {{root = "{folder}/runs", name = "r", epochs = 10}}\n'
        "data = {global_batch_size = 8}\n"
        'parallel = {device = "cpu", hash_every_steps = 5}\ncheckpoint = {every_steps = 10}\n'
    )
    words = (*JOBS_RUN, str(job), "--nproc-per-node", "3", *options)
    with start(*words, PYTHONPATH=str(folder), FLIPPED=str(folder / "flipped")) as launcher:
        return RunDir(folder / "runs" / "r"), launcher.end(90)


def end_of(run: RunDir, number: int) -> Any:
    return read_json(run.attempt(number) / "end.json")


def test_nan_in_the_data_fails_again_and_the_message_names_step_rank_and_samples(tmp_path: Path) -> None:
    run, ended = train(tmp_path, "--data.nan", "true")
    outcome = read_outcome(run)
    assert outcome is not None
    assert (ended.code, outcome["status"], outcome["reason"]) == (1, "failed", "non_finite")
    assert len(list_attempts(run)) == 2
    failures = [end_of(run, number)["failure"] for number in (1, 2)]
    assert failures[0] == failures[1]
    found = re.match(
        r"loss is nan at step (\d+) on rank ([012]); .*; its global batch has the samples ([\d, ]+)$",
        failures[0]["message"],
    )
    assert found, failures[0]["message"]
    assert (int(found[1]), int(found[2])) == (failures[0]["step"], failures[0]["rank"])
    samples = [int(text) for text in found[3].split(", ")]
    assert len(samples) == 8
    assert 41 in samples
    assert samples[failures[0]["rank"] :: 3].count(41) == 1, "of the rank's own part"
    assert read_json(run.attempt(2) / "rank_0.error")["samples"] == samples
    assert [end_of(run, number)["replay"] for number in (1, 2)] == [None, "failed again"]
    assert f"repeating the steps up to step {failures[0]['step']}, at which attempt 1 failed" in ended.out
    assert (
        "the same error as in attempt 1, after the same step: the data or the settings are the cause, not the machine"
    ) in ended.err


def test_without_the_replay_the_run_ends_at_once(tmp_path: Path) -> None:
    run, ended = train(tmp_path, "--data.nan", "true", "--parallel.replay-on-failure", "false")
    assert (ended.code, len(list_attempts(run))) == (1, 1)


@pytest.mark.parametrize(
    ("bit", "reason", "message"),
    [
        (30, "non_finite", "is (nan|inf) at step 30 on rank 1; "),
        (10, "desync", "after step 30 rank 1 has other weights"),
    ],
    ids=["exponent", "mantissa"],
)
def test_a_bit_that_flips_once_is_the_machines_fault_and_training_goes_on(
    tmp_path: Path, bit: int, reason: str, message: str
) -> None:
    """The highest bit of the exponent makes the loss infinite; a low bit only shows when weights are compared."""
    run, ended = train(tmp_path, "--model.flips", str(bit))
    assert ended.code == 0, ended.err
    first, second = end_of(run, 1), end_of(run, 2)
    assert (first["reason"], first["restarts"], second["reason"]) == (reason, True, "finished")
    assert re.search(message, first["failure"]["message"])
    assert (first["failure"]["rank"], first["failure"]["node"], second["replay"]) == (1, None, "passed")
    said = "is trained without an error this time: in attempt 1 the machine was the cause, on rank 1, not the data"
    assert said in ended.out
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "flipped").touch()
    undisturbed, _ = train(tmp_path / "again", "--model.flips", str(bit))
    assert run_differences(undisturbed, run) == []
    assert gaps(run) == []
