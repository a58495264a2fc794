"""Compare runs in a table: the settings that differ, the results, and which run has the best."""

import json
from collections.abc import Container, Sequence
from typing import NamedTuple

from jobs.report.run_data import DatasetLabel, RunData
from jobs.report.statistics import run_stats, setting_text, stat_text
from jobs.text import NONE

# Names and paths differ between all runs; the data set has a column of its own.
NOT_COMPARED = {"run.name", "run.root", "data.dataset", "data.root", "tracking.name"}


class Column(NamedTuple):
    """A column of the comparison: one cell per run; `best` are the rows with the best value."""

    heading: str
    cells: Sequence[str]
    best: Container[int] = ()
    is_text: bool = False


def run_names(runs: Sequence[RunData]) -> list[str]:
    """Return each run's name, with its directory's parent if several runs have that name."""
    names = [run.dir.name for run in runs]
    return [
        name if names.count(name) == 1 else f"{run.dir.path.parent.name}/{name}"
        for name, run in zip(names, runs, strict=True)
    ]


def curve_labels(runs: Sequence[RunData]) -> list[str]:
    """Return each run's name for a picture, marked if it used synthetic data and others did not."""
    mixed = len({run.dataset.is_synthetic for run in runs}) > 1
    return [
        f"{name} (synthetic data)" if mixed and run.dataset.is_synthetic else name
        for name, run in zip(run_names(runs), runs, strict=True)
    ]


def all_datasets(runs: Sequence[RunData]) -> DatasetLabel:
    """Return one label for the data sets of all runs. It is synthetic if any of them is."""
    labels = dict.fromkeys(run.dataset for run in runs)
    return DatasetLabel("; ".join(label.name for label in labels), any(label.is_synthetic for label in labels))


def have_same_data(runs: Sequence[RunData]) -> bool:
    """Return whether all runs used the same data, so that their losses and metrics may be ranked."""
    return len({(run.dataset, json.dumps(run.manifest.get("dataset", {}).get("sha256"))) for run in runs}) == 1


def differing_settings(runs: Sequence[RunData]) -> list[Column]:
    """Return a column for each setting that is not the same in all runs, headed by its dotted name."""
    configs = [
        {"recipe": str(run.config.get("recipe", NONE))}
        | {
            f"{section}.{key}": setting_text(value)
            for section, keys in run.config.items()
            if isinstance(keys, dict)
            for key, value in keys.items()
        }
        for run in runs
    ]
    names = dict.fromkeys(name for config in configs for name in config if name not in NOT_COMPARED)
    columns = [Column(name, [config.get(name, NONE) for config in configs]) for name in names]
    return [column for column in columns if len(set(column.cells)) > 1]


def comparison_table(runs: Sequence[RunData]) -> list[Column]:
    """Build the table that compares `runs`, one row each; on different data, no loss or metric is marked as best."""
    stats = [run_stats(run) for run in runs]
    columns = [Column("run", run_names(runs), is_text=True)]
    if len({run.dataset for run in runs}) > 1:
        columns.append(Column("data set", [run.dataset.name for run in runs], is_text=True))
    columns += [Column("world size", [each["world size"] for each in stats]), *differing_settings(runs)]
    same_data = have_same_data(runs)
    metrics = {name: direction for run in runs for name, direction in run.metrics.items()}
    best = {"train loss": min, "test loss": min, "samples/s": max}
    best |= {f"test {name}": max if direction == "higher" else min for name, direction in metrics.items()}
    for heading in ("epochs", "train loss", "test loss", *(f"test {name}" for name in metrics), "samples/s"):
        values = [each.get(heading) for each in stats]
        present = [value for value in values if value is not None]
        marked: set[int] = set()
        if present and (heading == "samples/s" or (heading in best and same_data)):
            marked = {row for row, value in enumerate(values) if value == best[heading](present)}
        columns.append(Column(heading, [stat_text(heading, value) for value in values], marked))
    return columns
