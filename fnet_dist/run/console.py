"""Print rank 0's output for people: progress while it trains, a table and the next command at the end."""

import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fnet_dist.errors import FnetError
from fnet_dist.processes import is_installed, quoted
from fnet_dist.run import metrics_log
from fnet_dist.run.log import LOGGER, mute
from fnet_dist.run.metrics_log import EpochLine, EvalLine
from fnet_dist.run.run_dir import RunDir, read_json
from fnet_dist.run.sources import edited_sources, source_hashes

LINE_EVERY_S = 10.0  # without a terminal: a log of a long run stays short


class ProgressPrinter:
    """Rank 0's progress on standard output. It is for people; programs read the metrics log."""

    def __init__(self, epochs: int, total_steps: int) -> None:
        self._console = _PipeSafeConsole(highlight=False, soft_wrap=True)
        self._epochs = epochs
        self._total_steps = total_steps
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if self._console.is_terminal:
            steps = TextColumn("step {task.completed:,}/{task.total:,} {task.fields[figures]}")
            columns = (TextColumn("{task.description}"), BarColumn(), steps, TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=total_steps, figures="")
            self._bar.start()

    def window(self, epoch: int, step: int, loss: float, samples_per_second: float) -> None:
        """Show the progress at the end of a window, after `step`."""
        figures = f"loss {loss:.4f} · {samples_per_second:,.0f} samples/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=f"epoch {epoch}/{self._epochs}", figures=figures)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            LOGGER.info(f"epoch {epoch}/{self._epochs} · step {step:,}/{self._total_steps:,} · {figures}")

    def epoch(self, line: EpochLine, evaluation: EvalLine | None) -> None:
        """Print an epoch's line. It begins as the cookbook chapter prints it, so that both can be compared."""
        self._last_line = time.monotonic()
        figures = [f"epoch {line['epoch']}/{self._epochs}", *([] if evaluation is None else test_figures(evaluation))]
        speed = f"{line['samples_per_second']:,.0f} samples/s"
        LOGGER.info(f"Training loss: {line['train_loss']:.4f}   ({', '.join([*figures, speed])})")

    def evaluation(self, line: EvalLine) -> None:
        """Print an evaluation within an epoch."""
        self._last_line = time.monotonic()
        LOGGER.info(f"step {line['step']:,}/{self._total_steps:,} · {', '.join(test_figures(line))}")

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()


def test_figures(line: Mapping[str, Any]) -> list[str]:
    """Return "test accuracy 0.8637" and so on for each metric of an eval line; without metrics, the test loss."""
    values = line["metrics"] or {"loss": line["loss"]}
    return [f"test {name} {figure(value)}" for name, value in values.items()]


def figure(value: float | None) -> str:
    """Return a metric with four digits after the point, or four digits if it is large; a dash if it is not finite."""
    if value is None:
        return "–"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


class _PipeSafeConsole(Console):
    """A rich console whose reader may go (`| head`): that ends the output, not the training."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        mute(sys.stdout)


def final_table(run: RunDir) -> str:
    """Return the table of a finished run, read from its directory; its last lines are the commands to run next."""
    manifest = read_json(run.manifest)
    # From files alone: a start that finds the run finished prints the same table, without data or torch.
    kinds = ("eval", "epoch")  # at the end of the log: of a long run, the whole has hundreds of MB
    lines = metrics_log.tail(run.metrics_log, lambda lines: {*kinds} <= {line["kind"] for line in lines})
    evaluations, epochs = ([line for line in lines if line["kind"] == kind] for kind in kinds)
    if manifest is None or "dataset" not in manifest or not epochs or not evaluations:
        return f"finished: {run.name}; its results are not shown: {run.manifest} or {run.metrics_log.name} was removed"
    last, evaluation, data = epochs[-1], evaluations[-1], manifest["dataset"]
    ranks = "1 rank" if manifest["world_size"] == 1 else f"{manifest['world_size']} ranks"
    rows = {
        "dataset": f"{data['name']}; {data['train_count']:,} training and {data['test_count']:,} test samples",
        "epochs": f"{last['epoch']}, {last['step']:,} steps",
        "loss": f"{last['train_loss']:.4f} training, {evaluation['loss']:.4f} test",
        **{f"test {name}": f"{figure(value)} on {data['name']}" for name, value in evaluation["metrics"].items()},
        **_best(run),
        "speed": f"{last['samples_per_second']:,.0f} samples/s in the last epoch, {ranks} on {manifest['device']}",
        "run directory": str(short_path(run.path)),
        "weights": f'{short_path(run.model)} (README: "Your weights")',
    }
    commands = [command_for(run, "report")]
    with suppress(OSError, FnetError):  # a damaged tracking file must not hide the result
        tracking = read_json(run.tracking) or {}
        if tracking.get("url"):
            rows["W&B"] = tracking["url"]
        if tracking.get("mode") == "offline":
            commands.append(command_for(run, "sync"))
    table = "\n".join(f"  {name:<14} {value}" for name, value in rows.items())
    return "\n".join([f"finished: {run.name}", table, f"next: {'; '.join(commands)}"])


def _best(run: RunDir) -> dict[str, str]:
    with suppress(FnetError, LookupError):  # a damaged file must not hide the result
        best = read_json(run.best)
        return {"best": f"{best['monitor']} {figure(best['value'])} at step {best['step']:,}"} if best else {}
    return {}


def command_for(run: RunDir, verb: str) -> str:
    """Return `fnet VERB RUN` for `run`, as it works in this directory."""
    is_named = short_path(run.path) == Path("runs") / run.name  # where commands look for a name
    return f"{fnet_command()} {verb} {run.name if is_named else quoted(short_path(run.path))}"


def sync_hint(run: RunDir) -> str:
    """Return how to send the rows that W&B did not get."""
    return f"the metrics log has every step, and `{command_for(run, 'sync')}` sends what is missing"


def next_commands(run: RunDir, recipe: str) -> str:
    """Return how to train more, for a start that finds the run finished, and whether the code has changed since."""
    edited = edited_sources(read_json(run.manifest), source_hashes(recipe))
    return (f"{edited}\n" if edited else "") + (
        "to train longer, give a larger --run.epochs or --run.max-steps; to train again from scratch in a new "
        f"directory ({run.name}-2, or the next free name), --checkpoint.resume new"
    )


def resume_command(run: RunDir, ranks_per_node: int) -> str:
    """Return the command that resumes a stopped run, however it was started."""
    return f"{fnet_command()} run {quoted(short_path(run.config))} --nproc-per-node {ranks_per_node}"


def fnet_command() -> str:
    """Return how a person calls `fnet` in this directory: its script in this environment, else `python -m jobs`."""
    script = Path(sys.executable).with_name("fnet")
    if script.exists() and is_installed():  # else the script would run other code than this
        return _program(script)
    return f"{_program(Path(sys.executable))} -m jobs"


def _program(path: Path) -> str:
    """Return the name of `path` where PATH leads to it, else the path."""
    on_path = shutil.which(path.name)
    return path.name if on_path is not None and Path(on_path).absolute() == path else quoted(short_path(path))


def short_path(path: Path) -> Path:
    """Return `path` relative to the current directory if it lies in it, else absolute."""
    path = path.absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
