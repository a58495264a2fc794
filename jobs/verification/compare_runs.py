"""Compare two runs bit by bit: metrics log, weights, newest checkpoint. Drills and tests use it. No torch."""

from itertools import count, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from fnet_dist.checkpoint.storage import NO_EVALUATION, CorruptCheckpointError, checkpoint_steps, read_checkpoint
from fnet_dist.run import metrics_log
from fnet_dist.run.run_dir import RunDir, read_json

# These may differ between two runs of the same training: times, and how many attempts it took.
NOT_COMPARED = {"time", "seconds", "samples_per_second", "attempt"}
PER_RANK = {"loss_per_rank", "loss_min", "loss_max", "worst_rank"}  # they depend on the number of ranks
# Identity and hashes of a run, times, and evaluations: a stop may have saved a step before its evaluation was counted.
NOT_COMPARED_IN_CHECKPOINTS = {"run_id", "epoch_seconds", "files", "sha256", *NO_EVALUATION}


def run_differences(one: RunDir, other: RunDir, same_ranks: bool = True) -> list[str]:
    """Return the differences between the results of two runs: metrics log, final weights, newest checkpoint.

    Return [] if they are identical. Without `same_ranks`, the per-rank values of the metrics log are not compared.
    """
    found = [
        *_compare_logs(one, other, set() if same_ranks else PER_RANK),
        *_compare_weights(one.model, other.model),
        *_compare_checkpoints(one, other),
        *([] if read_json(one.best) == read_json(other.best) else [f"best.json is {read_json(other.best)}"]),
    ]
    return [f"{other.name}: {line}" for line in found]


def gaps(run: RunDir) -> list[str]:
    """Return the first step that is missing in the metrics log, after the first one recorded; [] if none is."""
    steps = [line["step"] for line in metrics_log.read(run.metrics_log) if line["kind"] == "train"]
    for step, expected in zip(steps, count(*steps[:1]), strict=False):  # a run may begin from a checkpoint of another
        if step != expected:
            return [f"{run.name}: the metrics log has step {step} where {expected} was expected"]
    return []


def tensors_differ(one: Path, other: Path) -> list[str]:
    """Return the first tensor of the model and of the optimizer that differs between two checkpoint directories."""
    mine, theirs = read_checkpoint(one), read_checkpoint(other)
    model = _compare_tensors("checkpoint's model", mine.model, theirs.model)
    return model + _compare_tensors("checkpoint's optimizer", mine.optimizer, theirs.optimizer)


def _compare_logs(one: RunDir, other: RunDir, ignored: set[str]) -> list[str]:
    for kind in ("train", "eval", "epoch", "hash"):
        expected, found = (_lines(run, kind, ignored) for run in (one, other))
        if kind == "hash":  # how often weights are hashed follows from the speed
            common = {line["step"] for line in expected} & {line["step"] for line in found}
            expected, found = ([line for line in lines if line["step"] in common] for lines in (expected, found))
        for mine, theirs in zip_longest(expected, found):  # the first difference is shown, even if lines are missing
            if mine is None or theirs is None:
                return [f"{len(found)} {kind} lines in the metrics log, {len(expected)} expected"]
            if mine != theirs:
                keys = [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
                values = [f"{key} {theirs.get(key)}, expected {mine.get(key)}" for key in keys]
                return [f"{kind} line of step {mine['step']}: {', '.join(values)}"]
    return []


def _lines(run: RunDir, kind: str, ignored: set[str]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in NOT_COMPARED | ignored}
        for line in metrics_log.read(run.metrics_log)
        if line["kind"] == kind
    ]


def _compare_weights(one: Path, other: Path) -> list[str]:
    if missing := [path for path in (one, other) if not path.is_file()]:
        return [f"{path} is missing" for path in missing]
    return _compare_tensors(other.name, one.read_bytes(), other.read_bytes())


def _compare_checkpoints(one: RunDir, other: RunDir) -> list[str]:
    expected, found = (checkpoint_steps(run)[:1] for run in (one, other))  # older ones may have been pruned
    if expected != found:
        return [f"the newest checkpoint is of step {found}, expected {expected}"]
    if not expected:
        return []
    try:
        mine, theirs = (read_checkpoint(run.checkpoint(expected[0])) for run in (one, other))
    except CorruptCheckpointError as error:
        return [str(error)]
    changed = [
        f"checkpoint: {key} {theirs.values.get(key)}, expected {value}"
        for key, value in mine.values.items()
        if key not in NOT_COMPARED_IN_CHECKPOINTS and value != theirs.values.get(key)
    ]
    return changed + tensors_differ(one.checkpoint(expected[0]), other.checkpoint(expected[0]))


def _compare_tensors(name: str, one: bytes, other: bytes) -> list[str]:
    """Return the first tensor that differs in two safetensors files. Bytes are compared: -0.0 is not 0.0."""
    if one == other:  # the usual case, without parsing
        return []
    try:
        mine, theirs = load(one), load(other)
    except (SafetensorError, TypeError, KeyError):  # numpy has no bfloat16
        return [f"{name} differs"]
    for key in sorted(mine.keys() | theirs.keys()):
        if key not in mine or key not in theirs:
            return [f"{name}: {key} is in one of them only"]
        a, b = mine[key], theirs[key]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return [f"{name}: {key} is {b.dtype} {b.shape}, expected {a.dtype} {a.shape}"]
        if a.tobytes() != b.tobytes():
            rows = [np.frombuffer(array.tobytes(), np.uint8).reshape(array.size, -1) for array in (a, b)]
            changed = int((rows[0] != rows[1]).any(axis=1).sum())
            return [f"{name}: {key} differs in {changed:,} of {a.size:,} numbers"]
    return [f"{name} differs in its header"]
