"""Train steps of a run again and compare them with its metrics log (`fnet verify RUN --replay A:B`). No torch."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fnet_dist.checkpoint.storage import checkpoint_steps
from fnet_dist.config.load import read_config
from fnet_dist.errors import ConfigError, FnetError
from fnet_dist.run import metrics_log
from fnet_dist.run.run_dir import RunDir, read_manifest
from jobs.verification.compare_runs import tensors_differ
from jobs.verification.supervised_run import SupervisedRun, SupervisedRunError, supervised, text_of

COMPARED = ("loss", "grad_norm", "lr", "samples")  # not times, which no two trainings share


def replay(run: RunDir, steps: str, nproc_per_node: int | None) -> str:
    """Train steps A to B of `run` ("A:B"; "" for all) again, from the newest checkpoint before them.

    Return a line that says "equal". Raises FnetError, one line, that names the first step and tensor that differ.
    """
    recorded = _lines(run, "train")
    if not recorded:
        raise ConfigError(f"{run.path} has recorded no step yet")
    first, last = _range(steps, max(recorded))
    world_size = read_manifest(run)["world_size"]
    invariant = read_config(run.config).parallel.numerics == "invariant"  # same bits at any number of ranks
    if nproc_per_node not in (None, world_size) and not invariant:
        raise ConfigError(
            f"--nproc-per-node {nproc_per_node}: without parallel.numerics invariant, only {world_size} ranks give "
            "the same bits"
        )
    start = max((step for step in checkpoint_steps(run) if step < first), default=0)  # 0: from the seed
    job = [str(run.config), "--nproc-per-node", str(nproc_per_node or world_size), "--run.max-steps", str(last)]
    job += ["--tracking.wandb", "disabled", "--checkpoint.every-steps", "none"]  # only the last step is saved
    if start:
        job += ["--checkpoint.resume", str(run.checkpoint(start))]
    with (
        tempfile.TemporaryDirectory(prefix="replay-") as folder,
        supervised(SupervisedRun(RunDir(Path(folder) / "r"), job)) as again,
    ):
        try:
            again.end(again.start(), 0)
        except SupervisedRunError as error:
            errors = [line for line in text_of(again.output).splitlines() if line.startswith("error: ")]
            raise FnetError(f"the replay failed: {errors[-1].removeprefix('error: ') if errors else error}") from None
        print(f"trained steps {start + 1:,} to {last:,} again", file=sys.stderr)
        for step, difference in sorted(_differences(run, again.run, first, last)):  # the earliest step comes first
            changed = _changed_conditions(run, again.run)
            raise FnetError(f"{run.name} differs from its replay at step {step:,}: {difference}{changed}")
    return f"equal: {run.name}, steps {first:,} to {last:,}"


def _changed_conditions(run: RunDir, again: RunDir) -> str:
    """Return the receipt and conditions in manifest.json that have changed, as they may explain the difference."""
    then, now = (read_manifest(each) for each in (run, again))
    names = [key for part in ("receipt", "conditions") for key in now[part] if then[part].get(key) != now[part][key]]
    return f" (changed since: {', '.join(names)})" if names else ""


def _range(text: str, most: int) -> tuple[int, int]:
    """Return A and B of "A:B", of which either may be left out."""
    begin, colon, end = text.partition(":")
    try:
        first, last = int(begin or 1), int(end or most)
    except ValueError:
        first, last = 0, 0  # refused below, with the same message
    if (text and not colon) or not 0 < first <= last <= most:
        raise ConfigError(f"--replay {text}: expected steps A:B from 1 to {most:,}, those on record")
    return first, last


def _lines(run: RunDir, kind: str) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in metrics_log.read(run.metrics_log) if line["kind"] == kind}


def _differences(run: RunDir, again: RunDir, first: int, last: int) -> Iterator[tuple[int, str]]:
    """Yield the first step that differs in each kind of line and in the last checkpoint, with the difference."""
    for kind in ("train", "hash"):
        replayed = _lines(again, kind)
        for step, line in _lines(run, kind).items():
            if first <= step <= last and (difference := _difference(line, replayed.get(step))):
                yield step, difference
                break
    if run.checkpoint(last).exists():
        for difference in tensors_differ(run.checkpoint(last), again.checkpoint(last)):
            yield last, difference


def _difference(line: dict[str, Any], replayed: dict[str, Any] | None) -> str | None:
    if replayed is None:
        return f"no {line['kind']} line"
    if line["kind"] == "hash":
        return next((name for name, digest in line["weights"].items() if replayed["weights"].get(name) != digest), None)
    changed = (key for key in COMPARED if replayed[key] != line[key])
    return next((f"{key} {replayed[key]}, on record {line[key]}" for key in changed), None)
