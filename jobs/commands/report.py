"""fnet report [RUN ...]: figures and one HTML page in RUN/report; several are compared, in the first one's (look 3)

The name of a sweep, or its job id, stands for all its runs.
"""

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.cells import find_runs
from jobs.report import compare
from jobs.report.run_data import RunData, read_run_data
from jobs.report.statistics import summarize
from jobs.runs import command_parser


def main(argv: list[str]) -> int:
    """Write the report of one run, or the comparison of several, and print its figures and the page's path.

    Raises ConfigError if a RUN does not exist.
    """
    parser = command_parser(__doc__)
    parser.add_argument("run", nargs="*", metavar="RUN", help="a run's name or directory; the newest if left out")
    asked = parser.parse_args(argv).run or [None]
    # A dict drops a run that is named twice, and keeps the order.
    runs = [read_run_data(run) for run in dict.fromkeys(run for text in asked for run in find_runs(text))]
    # Imported here because matplotlib takes a second: -h and a misspelt name answer at once.
    from jobs.report.html import write_comparison, write_report

    page = write_report(runs[0]) if len(runs) == 1 else write_comparison(runs)
    # Wide, because a figure that is folded cannot be read, nor a path be copied.
    console = Console(file=sys.stdout, width=1000)
    console.print(_summary_table(runs[0]) if len(runs) == 1 else _comparison_table(runs), Text(str(page)), sep="\n")
    return 0


def _summary_table(run: RunData) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for label, text in {"run": run.dir.name, **summarize(run)}.items():
        table.add_row(Text(label, style="dim"), Text(text))  # not str: rich would read "[...]" in a name as markup
    return table


def _comparison_table(runs: list[RunData]) -> Table:
    columns = compare.comparison_table(runs)
    title = Text(compare.all_datasets(runs).name)
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="")
    for column in columns:
        table.add_column(Text(column.heading.replace(" ", "\n").replace(".", ".\n")))
    for row in range(len(runs)):
        table.add_row(*(Text(column.cells[row] + (" ★" if row in column.best else "")) for column in columns))
    return table
