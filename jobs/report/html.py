"""Write the report of one run, or of several compared: pictures, and one HTML page that contains them all."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from fnet_dist.run.run_dir import write_atomically
from jobs.report import compare, plots, prediction_plots, statistics
from jobs.report.run_data import RunData
from jobs.report.statistics import confusion, per_class, run_stats, summarize
from jobs.report.style import to_png
from jobs.text import duration, number


def write_report(run: RunData) -> Path:
    """Write the pictures and index.html of one run, and return the page's path.

    A picture that has nothing to show yet is left out.
    """
    figures: dict[str, Figure] = {}
    if run.steps["step"].size:
        figures["loss"] = plots.draw_loss(run)
    if run.epochs:
        figures["accuracy"] = plots.draw_accuracy(run)
    if run.windows["last_step"].size:
        figures["throughput"] = plots.draw_throughput(run)
    classes = None
    if run.predictions is not None:
        names = run.predictions.class_names
        classes = per_class(confusion(run.predictions.true, run.predictions.predicted, len(names)), names)
        figures["confusion"] = prediction_plots.draw_confusion(run, run.predictions)
        if len(run.predictions.thumbnails):
            figures["images"] = prediction_plots.draw_images(run, run.predictions)
    stats = run_stats(run)
    return _write(
        run.dir.report, "index.html", figures, run=run, stats=stats, summary=summarize(run, stats), classes=classes
    )


def write_comparison(runs: list[RunData]) -> Path:
    """Write compare.html and its two pictures into the first run's report, and return the page's path."""
    dataset, labels = compare.all_datasets(runs), compare.curve_labels(runs)
    figures: dict[str, Figure] = {}
    if any(run.steps["step"].size for run in runs):
        figures["compare_loss"] = plots.compare_loss(runs, labels, dataset)
    if any(run.epochs for run in runs):
        figures["compare_accuracy"] = plots.compare_accuracy(runs, labels, dataset)
    return _write(
        runs[0].dir.report,
        "compare.html",
        figures,
        named_runs=list(zip(compare.run_names(runs), runs, strict=True)),
        dataset=dataset,
        columns=compare.comparison_table(runs),
        same_data=compare.have_same_data(runs),
    )


def _write(report: Path, page: str, figures: dict[str, Figure], **context: Any) -> Path:
    report.mkdir(exist_ok=True)
    pictures = {}
    for name, figure in figures.items():
        png = to_png(figure)
        write_atomically(report / f"{name}.png", png)
        pictures[name] = base64.b64encode(png).decode()
    # PackageLoader finds the templates of an installed wheel too, even inside a zip file.
    environment = Environment(
        loader=PackageLoader("jobs.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (duration, number, statistics.moment, statistics.percent, statistics.setting_text)
    environment.filters |= {function.__name__: function for function in filters}
    html = environment.get_template(f"{page}.j2").render(context, pictures=pictures)
    write_atomically(report / page, html.encode())
    return report / page
