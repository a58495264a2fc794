"""Several runs side by side: one table, two plots."""

import json
from html import escape

from jobs.report import html as page
from jobs.report.run_data import RunData
from jobs.report.statistics import DataSet, data_set, percent, run_stats
from jobs.text import number

NOT_COMPARED = (("run", "name"), ("run", "root"), ("data", "dataset"), ("data", "root"), ("tracking", "name"))


def names_of(records: list[RunData]) -> list[str]:
    """What to call each run: its name, with its directory's parent where two are named alike."""
    names = [record.run.name for record in records]
    return [
        name if names.count(name) == 1 else f"{record.run.path.parent.name}/{name}"
        for name, record in zip(names, records, strict=True)
    ]


def labels_of(records: list[RunData]) -> list[str]:
    """The names as pictures say them: where data sets are mixed, a stand-in says so itself."""
    mixed = len({data_set(record).is_synthetic for record in records}) > 1
    return [
        f"{name} (stand-in data)" if mixed and data_set(record).is_synthetic else name
        for name, record in zip(names_of(records), records, strict=True)
    ]


def differing(records: list[RunData]) -> dict[str, list[str]]:
    """The settings that are not the same in all runs: dotted name -> each run's value."""
    flat = [
        {
            f"{section}.{key}": value
            for section, values in record.config.items()
            for key, value in values.items()
            if (section, key) not in NOT_COMPARED
        }
        for record in records
    ]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    return {
        key: [page.show(settings[key]) if key in settings else "–" for settings in flat]
        for key in keys
        if len({json.dumps(settings.get(key, [])) for settings in flat}) > 1
    }


def data_of_all(records: list[RunData]) -> DataSet:
    """The data sets of all runs; a stand-in among them is never left out."""
    found = list(dict.fromkeys(data_set(record) for record in records))
    return DataSet("; ".join(data.words for data in found), any(data.is_synthetic for data in found))


def same_data(records: list[RunData]) -> bool:
    """Whether losses and accuracies may be compared at all."""
    return (
        len(
            {
                json.dumps([data_set(record).words, record.manifest.get("dataset", {}).get("sha256")])
                for record in records
            }
        )
        == 1
    )


def rows(records: list[RunData]) -> tuple[list[str], list[list[str]], dict[int, set[int]]]:
    """The table that compares: heads, one row of cells a run, and for each column the rows with the best value.

    The data set has a column where it is not the same for all; losses are ranked only where it is.
    """
    figures = [run_stats(record) for record in records]
    given: dict[str, list[str]] = {"run": names_of(records)}
    if len({data_set(record) for record in records}) > 1:
        given["data set"] = [data_set(record).words for record in records]
    given["world size"] = [each.world_size for each in figures]
    measured = {
        "epochs": [number(each.epochs) for each in figures],
        "train loss": [number(each.train_loss, 4) for each in figures],
        "test loss": [number(each.test_loss, 4) for each in figures],
        "test accuracy": [percent(each.test_accuracy) for each in figures],
        "samples/s": [number(each.samples_per_second) for each in figures],
    }
    columns = given | differing(records) | measured
    heads = list(columns)
    best = {heads.index("samples/s"): _best([each.samples_per_second for each in figures], highest=True)}
    if same_data(records):
        best[heads.index("train loss")] = _best([each.train_loss for each in figures], highest=False)
        best[heads.index("test loss")] = _best([each.test_loss for each in figures], highest=False)
        best[heads.index("test accuracy")] = _best([each.test_accuracy for each in figures], highest=True)
    return heads, [list(row) for row in zip(*columns.values(), strict=True)], best


def _best(values: list[float | None], highest: bool) -> set[int]:
    there = [value for value in values if value is not None]
    wanted = (max(there) if highest else min(there)) if there else None
    return {place for place, value in enumerate(values) if value is not None and value == wanted}


def document(records: list[RunData], pictures: list[tuple[bytes, str]]) -> bytes:
    """The page that compares `records`; `pictures` are PNG and sentence."""
    heads, cells, best = rows(records)
    body: list[str] = [f"<h1>{len(records)} runs compared</h1>"]
    body.append(f'<p class="grey">{escape(data_of_all(records).words)}</p>')
    for data in dict.fromkeys(data_set(record) for record in records):
        if data.is_synthetic:
            on = [name for name, record in zip(names_of(records), records, strict=True) if data_set(record) == data]
            which = "" if len(on) == len(records) else ": " + ", ".join(on)
            body.append(f'<p class="notice">{escape(data.words + which)}</p>')
    words = "★ marks the best value."
    if not same_data(records):
        words = "The data sets differ, so no loss or accuracy is called the best. ★ marks the highest throughput."
    words_in = {column for column, head in enumerate(heads) if head in ("run", "data set")}
    body.append(page.table(heads, cells, text=words_in, best=best))
    body.append(f'<p class="grey">{words} Only settings that differ are shown.</p>')
    body += [page.picture(png, words) for png, words in pictures]
    return page.document(" · ".join(names_of(records)), body)
