"""Compare runs in a table: the settings that differ, the results, and which run has the best."""

import json
from collections.abc import Container, Sequence
from typing import NamedTuple

from jobs.cells import cell_labels, differing_settings
from jobs.report.run_data import DatasetLabel, RunData
from jobs.report.statistics import run_stats, stat_text


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
    """Return each run's name for a picture, of a sweep's runs the settings that differ; and who used synthetic data."""
    names = cell_labels([run.config for run in runs]) or run_names(runs)
    mixed = len({run.dataset.is_synthetic for run in runs}) > 1
    return [
        f"{name} (synthetic data)" if mixed and run.dataset.is_synthetic else name
        for name, run in zip(names, runs, strict=True)
    ]


def all_datasets(runs: Sequence[RunData]) -> DatasetLabel:
    """Return one label for the data sets of all runs. It is synthetic if any of them is."""
    labels = dict.fromkeys(run.dataset for run in runs)
    return DatasetLabel("; ".join(label.name for label in labels), any(label.is_synthetic for label in labels))


def have_same_data(runs: Sequence[RunData]) -> bool:
    """Return whether all runs used the same data, so that their losses and metrics may be ranked."""
    return len({(run.dataset, json.dumps(run.manifest.get("dataset", {}).get("sha256"))) for run in runs}) == 1


def comparison_table(runs: Sequence[RunData]) -> list[Column]:
    """Build the table that compares `runs`, one row each; on different data, no loss or metric is marked as best."""
    stats = [run_stats(run) for run in runs]
    columns = [Column("run", run_names(runs), is_text=True)]
    if len({run.dataset for run in runs}) > 1:
        columns.append(Column("data set", [run.dataset.name for run in runs], is_text=True))
    differing = (Column(name, cells) for name, cells in differing_settings([run.config for run in runs]).items())
    columns += [Column("world size", [each["world size"] for each in stats]), *differing]
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
