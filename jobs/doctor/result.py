"""A check and its verdict, and how the checks of some nodes are shown."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

OK, WARN, MISS = "OK", "WARN", "MISS"
HERE = ""  # this machine, among the names of nodes
COLOURS = {OK: "green", WARN: "yellow", MISS: "bold red"}
SHOWN = 8  # names of nodes on a line


@dataclass(frozen=True)
class Check:
    """What was looked at, the verdict OK, WARN or MISS, what was found, and where it is not OK what mends it."""

    name: str
    verdict: str
    found: str
    fix: str = ""


Reports = Mapping[str, Sequence[Check]]


def show(reports: Reports, *, as_json: bool) -> int:
    """Print the checks of each node, as a table or as one JSON array; 1 if one of them is MISS, else 0."""
    if as_json:
        rows = [{"node": node or None, **asdict(check)} for node, checks in reports.items() for check in checks]
        print(json.dumps(rows, indent=2))
    elif sys.stdout.isatty():
        from rich.console import Console  # what has no rich to show with has no terminal's table
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, pad_edge=False)
        for verdict, name, words in rows_of(reports):
            table.add_row(Text(verdict, COLOURS[verdict]), Text(name), Text(words))
        Console(highlight=False).print(table)
    else:
        for verdict, name, words in rows_of(reports):
            print(f"{verdict:<5} {name:<12} {words}")
    return int(any(check.verdict == MISS for checks in reports.values() for check in checks))


def rows_of(reports: Reports) -> list[tuple[str, str, str]]:
    """Verdict, name and words: one row for all nodes that found the same. The nodes are named where something is not
    OK, or differs."""
    found: dict[str, dict[Check, list[str]]] = {}
    for node, checks in reports.items():
        for check in checks:
            found.setdefault(check.name, {}).setdefault(check, []).append(node)
    return [
        (check.verdict, name, f"{_where(check, nodes, len(each))}{check.found}{check.fix and f'; fix: {check.fix}'}")
        for name, each in found.items()
        for check, nodes in each.items()
    ]


def _where(check: Check, nodes: Sequence[str], kinds: int) -> str:
    if HERE in nodes or (check.verdict == OK and kinds == 1):
        return ""
    more = f" and {len(nodes) - SHOWN} more" if len(nodes) > SHOWN else ""
    return f"{', '.join(nodes[:SHOWN])}{more}: "
