"""fnet report RUN ...: figures and one HTML page; several runs are compared (look)"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fnet_dist.run.run_dir import write_atomically
from jobs.report import compare
from jobs.report import html as page
from jobs.report.run_data import RunData, read_run_data
from jobs.report.statistics import confusion, data_set, per_class, run_stats
from jobs.runs import find_run_or_job


def main(argv: list[str]) -> int:
    """Write the report of one run, or the comparison of several; the last line printed is the page's path.

    Raises ConfigError where a RUN is not there.
    """
    parser = argparse.ArgumentParser(
        prog="fnet report",
        description="Pictures and one HTML page in RUN/report; several runs are compared, in the first one's.",
    )
    parser.add_argument("run", nargs="*", metavar="RUN", help="a run's name or directory; the newest if left out")
    asked = parser.parse_args(argv)
    runs = list(dict.fromkeys(find_run_or_job(text) for text in asked.run or [None]))
    records = [read_run_data(run) for run in runs]
    # Wide: a figure that is folded cannot be read, nor a path be copied.
    console = Console(file=sys.stdout, width=1000)
    if len(records) == 1:
        path = write_report(records[0])
        _print_facts(console, records[0])
    else:
        path = write_comparison(records)
        _print_comparison(console, records)
    console.print(Text(str(path)))
    return 0


def write_report(record: RunData) -> Path:
    """Write the pictures and index.html of one run; a picture that has nothing to show yet is left out."""
    # Here, not above: a wrong name and -h answer at once.
    from jobs.report import plots as curves
    from jobs.report import prediction_plots as grids
    from jobs.report.style import png

    report = record.run.report
    report.mkdir(exist_ok=True)
    figures = run_stats(record)
    body = page.head(record, figures)
    shown: list[tuple[str, bytes, str, bool]] = []
    if record.steps.step.size:
        shown.append(("loss", png(curves.draw_loss(record)), LOSS, False))
    if record.epochs:
        shown.append(("accuracy", png(curves.draw_accuracy(record)), ACCURACY, False))
    if record.windows.last_step.size:
        shown.append(("throughput", png(curves.draw_throughput(record)), THROUGHPUT, False))
    predictions = record.predictions
    if predictions is not None:
        shown.append(("confusion", png(grids.draw_confusion(record, predictions)), CONFUSION, True))
        if len(predictions.thumbnails):
            shown.append(("images", png(grids.draw_images(record, predictions)), IMAGES, True))
    for name, content, words, wide in shown:
        write_atomically(report / f"{name}.png", content)
        body.append(page.picture(content, words, wide))
    if predictions is None:
        body.append('<p class="grey">Predictions of the test images are written after the last evaluation.</p>')
    else:
        names = predictions.class_names
        counts = confusion(predictions.true, predictions.predicted, len(names))
        body += ["<h2>Each class</h2>", page.class_table(per_class(counts, names))]
    body += ["<h2>Settings</h2>", page.settings(record.config)]
    path = report / "index.html"
    write_atomically(path, page.document(f"{record.run.name} · {data_set(record).words}", body))
    return path


def write_comparison(records: list[RunData]) -> Path:
    """Write compare.html and its two pictures into the first run's report."""
    from jobs.report.compare_plots import draw_accuracy, draw_loss
    from jobs.report.style import png

    report = records[0].run.report
    report.mkdir(exist_ok=True)
    data = compare.data_of_all(records)
    named = list(zip(compare.labels_of(records), records, strict=True))
    shown: list[tuple[bytes, str]] = []
    if any(record.steps.step.size for record in records):
        shown.append((png(draw_loss(named, data)), "Training loss over steps: the mean over all ranks, smoothed."))
        write_atomically(report / "compare_loss.png", shown[-1][0])
    if any(record.epochs for record in records):
        shown.append((png(draw_accuracy(named, data)), "Accuracy on the test images after each epoch."))
        write_atomically(report / "compare_accuracy.png", shown[-1][0])
    path = report / "compare.html"
    write_atomically(path, compare.document(records, shown))
    return path


def _print_facts(console: Console, record: RunData) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row("run", Text(record.run.name))
    for label, words in page.describe(record, run_stats(record)).items():
        table.add_row(label, Text(words))
    console.print(table)


def _print_comparison(console: Console, records: list[RunData]) -> None:
    heads, rows, best = compare.rows(records)
    table = Table(box=None, pad_edge=False)
    for head in heads:
        table.add_column(Text(head.replace(" ", "\n").replace(".", ".\n")))
    for place, row in enumerate(rows):
        table.add_row(*(Text(f"{cell} ★" if place in best.get(i, ()) else cell) for i, cell in enumerate(row)))
    console.print(Text(compare.data_of_all(records).words))
    console.print(table)


LOSS = (
    "The mean over the global batch in black, each rank's share in colour; "
    "vertical lines mark epochs, dashed ones a new attempt."
)
ACCURACY = "Accuracy and loss on the test images after each epoch, beside the mean training loss of that epoch."
THROUGHPUT = "Samples trained per second, all ranks together, in each window between two exchanges of figures."
CONFUSION = (
    "Test images by true class (row) and predicted class (column): numbers count images, "
    "colour is the share of the row; small shares are lifted to be seen."
)
IMAGES = (
    "Test images and what the network takes them for; a thick frame and a cross mark a wrong one, with its true class."
)
