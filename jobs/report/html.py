"""Write the report of one run, or of several compared: pictures, and one HTML page that contains them all."""

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure

from fnet_dist.run.run_dir import write_atomically
from fnet_dist.run.sharing import share_files
from jobs.cells import setting_text
from jobs.report import compare, plots, prediction_plots, statistics
from jobs.report.run_data import RunData
from jobs.report.style import STYLE
from jobs.text import duration, number

FILTERS = (duration, number, statistics.moment, statistics.percent, setting_text)


def write_report(run: RunData) -> Path:
    """Write index.html of one run, with the pictures that have something to show, and return the page's path."""
    figures: dict[str, Figure] = {}
    if run.steps["step"].size:
        figures["loss"] = plots.draw_loss(run)
    if run.evaluations:
        figures["evaluation"] = plots.draw_evaluations(run)
    if run.windows["last_step"].size:
        figures["throughput"] = plots.draw_throughput(run)
    classes = None
    if (shown := run.predictions) is not None:
        names = shown.class_names
        classes = statistics.per_class(statistics.confusion(shown.true, shown.predicted, len(names)), names)
        figures["confusion"] = prediction_plots.draw_confusion(run, shown)
        if len(shown.thumbnails):
            figures["images"] = prediction_plots.draw_images(run, shown)
    summary = statistics.summarize(run)
    return _write(run.dir.report, "index.html", figures, run=run, summary=summary, classes=classes)


def write_comparison(runs: list[RunData]) -> Path:
    """Write compare.html and its two pictures into the first run's report, and return the page's path."""
    dataset, labels = compare.all_datasets(runs), compare.curve_labels(runs)
    figures: dict[str, Figure] = {}
    if any(run.steps["step"].size for run in runs):
        figures["compare_loss"] = plots.compare_loss(runs, labels, dataset)
    if any(run.evaluations for run in runs):
        figures["compare_metric"] = plots.compare_metric(runs, labels, dataset)
    named_runs = list(zip(compare.run_names(runs), runs, strict=True))
    table = {"columns": compare.comparison_table(runs), "same_data": compare.have_same_data(runs)}
    return _write(runs[0].dir.report, "compare.html", figures, named_runs=named_runs, dataset=dataset, **table)


def _write(report: Path, page: str, figures: dict[str, Figure], **context: Any) -> Path:
    share_files(report.parent)
    report.mkdir(exist_ok=True)
    pictures = {}
    for name, figure in figures.items():
        buffer = BytesIO()
        with rc_context(STYLE):  # ticks are made only now
            figure.savefig(buffer, format="png")
        write_atomically(report / f"{name}.png", buffer.getvalue())
        pictures[name] = base64.b64encode(buffer.getvalue()).decode()
    loader = PackageLoader("jobs.report")  # finds the templates of an installed wheel too
    blocks: dict[str, Any] = {
        "trim_blocks": True,
        "lstrip_blocks": True,
    }  # a line that holds only a block leaves no empty line
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, **blocks)
    environment.filters |= {function.__name__: function for function in FILTERS}
    html = environment.get_template(f"{page}.j2").render(context, pictures=pictures)
    write_atomically(report / page, html.encode())
    return report / page
