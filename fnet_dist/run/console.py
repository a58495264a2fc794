"""What a person sees on rank 0: a progress bar on a terminal, a few lines elsewhere, a table in the end."""

import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fnet_dist.errors import FnetError
from fnet_dist.processes import is_installed
from fnet_dist.run import metrics_log
from fnet_dist.run.metrics_log import EpochLine
from fnet_dist.run.run_dir import RunDir, read_json

LINE_EVERY_S = 10.0


class ProgressPrinter:
    """Shows progress on standard output: nothing here is read by a program, the ledger is."""

    def __init__(self, epochs: int, total_steps: int) -> None:
        self._console = _LastingConsole(highlight=False, soft_wrap=True)
        self._epochs = epochs
        self._total_steps = total_steps
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("step {task.completed:,}/{task.total:,} {task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=total_steps, figures="")
            self._bar.start()

    def say(self, text: str) -> None:
        """One line, above the bar if there is one; a log on a full disk goes without it."""
        with suppress(OSError):
            self._console.print(text, markup=False)

    def window(self, epoch: int, step: int, loss: float, samples_per_second: float) -> None:
        """A window has ended at `step`."""
        figures = f"loss {loss:.4f} · {samples_per_second:,.0f} samples/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=f"epoch {epoch}/{self._epochs}", figures=figures)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            self.say(f"epoch {epoch}/{self._epochs} · step {step:,}/{self._total_steps:,} · {figures}")

    def epoch(self, line: EpochLine) -> None:
        """The book's line, and what else an epoch gives."""
        self._last_line = time.monotonic()
        self.say(
            f"Training loss: {line['train_loss']:.4f}   (epoch {line['epoch']}/{self._epochs}, test accuracy "
            f"{line['test_accuracy']:.4f}, {line['samples_per_second']:,.0f} samples/s)"
        )

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


class _LastingConsole(Console):
    """rich's console, but a reader that has gone (`| head`) ends the output and not the training."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        mute(sys.stdout)


def mute(stream: TextIO) -> None:
    """Let what is still printed go nowhere: whoever read `stream` has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def final_table(run: RunDir) -> str:
    """The end of a finished run, from its directory alone; the last lines are the commands that show it."""
    manifest = read_json(run.manifest)
    epochs = [line for line in metrics_log.read(run.metrics_log) if line["kind"] == "epoch"]
    last, data = epochs[-1], manifest["dataset"]
    seconds = sum(line["seconds"] for line in epochs)
    trained = sum(line["samples_per_second"] * line["seconds"] for line in epochs)
    ranks = "1 rank" if manifest["world_size"] == 1 else f"{manifest['world_size']} ranks"
    rows = {
        "dataset": f"{data['name']}; {data['train_count']:,} training and {data['test_count']:,} test samples",
        "epochs": f"{last['epoch']}, {last['step']:,} steps",
        "loss": f"{last['train_loss']:.4f} training, {last['test_loss']:.4f} test",
        "test accuracy": f"{last['test_accuracy']:.4f} on {data['name']} ({last['test_correct']:,} correct)",
        "speed": f"{trained / seconds:,.0f} samples/s, {ranks} on {manifest['device']}",
        "run directory": str(_short(run.path)),
    }
    commands = [report_command(run)]
    tracking: dict[str, Any] = {}
    with suppress(OSError, FnetError):  # W&B's directory is nothing to fail for
        tracking = read_json(run.tracking) or {}
    if tracking.get("url"):
        rows["W&B"] = tracking["url"]
    if tracking.get("mode") == "offline":
        commands.append(sync_command(run))
    table = "\n".join(f"  {name:<14} {value}" for name, value in rows.items())
    return "\n".join([f"finished: {run.name}", table, *commands])


def report_command(run: RunDir) -> str:
    """The command that shows a run, as it works in this directory with this interpreter."""
    return f"{fnet_command()} report {_as_named(run)}"


def sync_command(run: RunDir) -> str:
    """The command that sends to W&B what it lacks of a run."""
    return f"{fnet_command()} sync {_as_named(run)}"


def later(run: RunDir) -> str:
    """What makes up for rows that W&B does not have."""
    return f"the ledger has every step, and `{sync_command(run)}` sends what is missing"


def next_commands(run: RunDir) -> str:
    """What a person may want of a run that is finished."""
    return (
        "a larger --run.epochs or --run.max-steps trains on; --checkpoint.resume never starts anew, as "
        f"{run.name}-2 or the next that is free"
    )


def resume_command(run: RunDir, ranks_per_node: int) -> str:
    """The command that goes on with a stopped run, however it was started."""
    return f"{fnet_command()} run {_short(run.config)} --nproc-per-node {ranks_per_node}"


def fnet_command() -> str:
    """Return how a person calls `fnet` in this directory: its script in this environment, else `python -m jobs`."""
    script = Path(sys.executable).with_name("fnet")
    if script.exists() and is_installed():  # else the script would run other code than this
        return _program(script)
    return f"{_program(Path(sys.executable))} -m jobs"


def _program(path: Path) -> str:
    """Return the name of `path` where PATH leads to it, else the path."""
    on_path = shutil.which(path.name)
    return path.name if on_path is not None and Path(on_path).absolute() == path else str(_short(path))


def _as_named(run: RunDir) -> str:
    return run.name if _short(run.path) == Path("runs") / run.name else str(_short(run.path))


def _short(path: Path) -> Path:
    path = path.absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
