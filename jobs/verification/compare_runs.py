"""Whether two runs came to the same end, to the bit: THE comparison, for drills and tests alike. No torch."""

from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from fnet_dist.checkpoint.storage import CorruptCheckpointError, checkpoint_steps, read_checkpoint
from fnet_dist.run import metrics_log
from fnet_dist.run.run_dir import RunDir

# What may differ between two runs of the same training: the clock, and how often it was taken up.
NOT_COMPARED = {"time", "seconds", "samples_per_second", "attempt"}
OF_RANKS = {"loss_per_rank", "loss_min", "loss_max", "worst_rank"}


def run_differences(one: RunDir, other: RunDir, same_ranks: bool = True) -> list[str]:
    """What differs between the ends of two runs: ledger, final weights, newest checkpoint; nothing if identical.

    At other numbers of ranks, what the ledger says of each of them is left out.
    """
    found = [
        *_ledgers(one, other, set() if same_ranks else OF_RANKS),
        *_files(one.model, other.model),
        *_checkpoints(one, other),
    ]
    return [f"{other.name}: {line}" for line in found]


def gaps(run: RunDir) -> list[str]:
    """The first step that the ledger lacks, as every reader sees it."""
    steps = [line["step"] for line in metrics_log.read(run.metrics_log) if line["kind"] == "train"]
    expected = list(range(steps[0], steps[0] + len(steps))) if steps else []
    wrong = next((pair for pair in zip(steps, expected, strict=True) if pair[0] != pair[1]), None)
    return [] if wrong is None else [f"{run.name}: the ledger has step {wrong[0]} where {wrong[1]} was expected"]


def _ledgers(one: RunDir, other: RunDir, free: set[str]) -> list[str]:
    for kind in ("train", "epoch", "hash"):
        pair = (_lines(one, kind, free), _lines(other, kind, free))
        for mine, theirs in zip_longest(*pair):
            if mine is None or theirs is None:
                return [f"{len(pair[1])} {kind} lines in the ledger, {len(pair[0])} expected"]
            if mine != theirs:
                keys = [key for key in mine if mine[key] != theirs.get(key)]
                return [
                    f"{kind} line of step {mine['step']}: "
                    + ", ".join(f"{key} {theirs.get(key)}, expected {mine[key]}" for key in keys)
                ]
    return []


def _lines(run: RunDir, kind: str, free: set[str]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in NOT_COMPARED | free}
        for line in metrics_log.read(run.metrics_log)
        if line["kind"] == kind
    ]


def _files(one: Path, other: Path) -> list[str]:
    missing = [path for path in (one, other) if not path.is_file()]
    if missing:
        return [f"{path} is missing" for path in missing]
    return _tensors(other.name, one.read_bytes(), other.read_bytes())


def _checkpoints(one: RunDir, other: RunDir) -> list[str]:
    steps = [checkpoint_steps(run)[:1] for run in (one, other)]
    if steps[0] != steps[1]:
        return [f"the newest checkpoint is of step {steps[1]}, expected {steps[0]}"]
    if not steps[0]:
        return []
    try:
        mine, theirs = (read_checkpoint(run.checkpoint(steps[0][0])) for run in (one, other))
    except CorruptCheckpointError as error:
        return [str(error)]
    free = ("run_id", "epoch_seconds", "files", "sha256")
    values = [key for key in mine.values if key not in free and mine.values[key] != theirs.values.get(key)]
    return [
        *(f"checkpoint: {key} {theirs.values.get(key)}, expected {mine.values[key]}" for key in values),
        *_tensors("checkpoint's model", mine.model, theirs.model),
        *_tensors("checkpoint's optimizer", mine.optimizer, theirs.optimizer),
    ]


def tensors_differ(one: Path, other: Path) -> list[str]:
    """The first tensor of weights and optimizer that differs between two checkpoints' directories."""
    mine, theirs = read_checkpoint(one), read_checkpoint(other)
    return [*_tensors("model", mine.model, theirs.model), *_tensors("optimizer", mine.optimizer, theirs.optimizer)]


def _tensors(what: str, one: bytes, other: bytes) -> list[str]:
    """The first tensor that differs, and how; the bytes decide."""
    if one == other:
        return []
    try:
        mine, theirs = load(one), load(other)
    except (SafetensorError, TypeError, KeyError):  # numpy knows no bfloat16
        return [f"{what} differs"]
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs:
            return [f"{what}: {name} is in one of them only"]
        a, b = mine[name], theirs[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return [f"{what}: {name} is {b.dtype} {b.shape}, expected {a.dtype} {a.shape}"]
        if a.tobytes() != b.tobytes():
            rows = [np.frombuffer(array.tobytes(), np.uint8).reshape(array.size, -1) for array in (a, b)]
            count = int((rows[0] != rows[1]).any(axis=1).sum())
            return [f"{what}: {name} differs in {count:,} of {a.size:,} numbers"]
    return [f"{what} differs in its header"]
