"""python -m jobs verify RUN --replay [A:B]: train steps again, and compare them with what is on record. No torch."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fnet_dist.checkpoint.storage import checkpoint_steps
from fnet_dist.config.load import read_config
from fnet_dist.errors import ConfigError, FnetError
from fnet_dist.run import metrics_log
from fnet_dist.run.run_dir import RunDir, read_json
from jobs.verification.compare_runs import tensors_differ
from jobs.verification.supervised_run import SupervisedRun, SupervisedRunError, supervised

COMPARED = ("loss", "grad_norm", "lr", "samples")


def replay(run: RunDir, steps: str, nproc_per_node: int | None) -> str:
    """Train the steps A to B of `run` ("A:B"; all of them if "") again, from the nearest checkpoint before them.

    Gives a line that says "equal". Raises FnetError, one line, that names the first step and tensor that differ.
    """
    recorded = {line["step"]: line for line in metrics_log.read(run.metrics_log) if line["kind"] == "train"}
    if not recorded:
        raise ConfigError(f"{run.path} has recorded no step yet")
    first, last = _range(steps, max(recorded))
    world_size = read_json(run.manifest)["world_size"]
    invariant = read_config(run.config).parallel.numerics == "invariant"
    if nproc_per_node not in (None, world_size) and not invariant:
        raise ConfigError(
            f"--nproc-per-node {nproc_per_node}: only with parallel.numerics invariant are the bits those of "
            f"{world_size} ranks too"
        )
    start = max((step for step in checkpoint_steps(run) if step < first), default=0)
    job = [str(run.config), "--nproc-per-node", str(nproc_per_node or world_size), "--run.max-steps", str(last)]
    job += ["--tracking.wandb", "disabled", "--checkpoint.every-steps", "none"]
    if start:
        job += ["--checkpoint.resume", str(run.checkpoint(start))]
    with (
        tempfile.TemporaryDirectory(prefix="replay-") as folder,
        supervised(SupervisedRun(RunDir(Path(folder) / "r"), job)) as trial,
    ):
        try:
            trial.end(trial.start(), 0)
        except SupervisedRunError as error:
            said = [line for line in trial.output.read_text().splitlines() if line.startswith("error: ")]
            raise FnetError(f"the replay failed: {said[-1].removeprefix('error: ') if said else error}") from None
        print(f"trained steps {start + 1:,} to {last:,} again", file=sys.stderr)
        for step, difference in sorted(_differences(run, trial.run, first, last)):
            raise FnetError(
                f"{run.name} differs from its replay at step {step:,}: {difference}{_others(run, trial.run)}"
            )
    return f"equal: {run.name}, steps {first:,} to {last:,}"


def _others(run: RunDir, again: RunDir) -> str:
    """What of the receipts and conditions is not as it was, which may be why."""
    then, now = (read_json(each.manifest) for each in (run, again))
    names = [key for part in ("receipt", "conditions") for key in now[part] if then[part].get(key) != now[part][key]]
    return f" (others than then: {', '.join(names)})" if names else ""


def _range(text: str, most: int) -> tuple[int, int]:
    """A and B of "A:B"; either may be left out."""
    begin, colon, end = text.partition(":")
    try:
        first, last = int(begin or 1), int(end or most)
    except ValueError:
        first, last = 0, 0
    if (text and not colon) or not 0 < first <= last <= most:
        raise ConfigError(f"--replay {text}: expected steps A:B from 1 to {most:,}, those on record")
    return first, last


def _differences(run: RunDir, again: RunDir, first: int, last: int) -> Iterator[tuple[int, str]]:
    """The first step that differs of each kind of line, and what differs in it."""
    for kind in ("train", "hash"):
        theirs = {line["step"]: line for line in metrics_log.read(again.metrics_log) if line["kind"] == kind}
        for line in metrics_log.read(run.metrics_log):
            asked = line["kind"] == kind and first <= line["step"] <= last
            if asked and (difference := _difference(line, theirs.get(line["step"]))):
                yield line["step"], difference
                break
    if run.checkpoint(last).exists():
        for difference in tensors_differ(run.checkpoint(last), again.checkpoint(last)):
            yield last, difference


def _difference(line: dict[str, Any], theirs: dict[str, Any] | None) -> str | None:
    if theirs is None:
        return f"no {line['kind']} line"
    if line["kind"] == "hash":
        return next((name for name, value in line["weights"].items() if theirs["weights"].get(name) != value), None)
    return next((f"{key} {theirs[key]}, on record {line[key]}" for key in COMPARED if theirs[key] != line[key]), None)
