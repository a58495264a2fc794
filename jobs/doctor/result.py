"""One check's result, and how the results of one or more nodes are printed."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

OK, WARN, MISS = "OK", "WARN", "MISS"
HERE = ""  # this machine's key in Reports, beside the names of nodes
# ANSI codes and not rich: a missing rich is one of the things that doctor reports.
COLOURS = {OK: "\033[32m", WARN: "\033[33m", MISS: "\033[1;31m"}
MAX_NAMES = 8  # node names shown on one line


@dataclass(frozen=True)
class Check:
    """A check's name, its verdict (OK, WARN or MISS), what was found and, unless it is OK, how to fix it."""

    name: str
    verdict: str
    found: str
    fix: str = ""


Reports = Mapping[str, Sequence[Check]]


def show(reports: Reports, *, as_json: bool) -> int:
    """Print the checks of each node, as text or as one JSON array. Return 1 if a check is MISS, else 0."""
    if as_json:
        rows = [{"node": node or None, **asdict(check)} for node, checks in reports.items() for check in checks]
        print(json.dumps(rows, indent=2))
    for verdict, name, text in () if as_json else rows_of(reports):
        start, end = (COLOURS[verdict], "\033[0m") if sys.stdout.isatty() else ("", "")
        print(f"{start}{verdict:<5}{end} {name:<12} {text}")
    return int(has_miss(reports))


def has_miss(reports: Reports) -> bool:
    """Return True if a check of a node is MISS."""
    return any(check.verdict == MISS for checks in reports.values() for check in checks)


def rows_of(reports: Reports) -> list[tuple[str, str, str]]:
    """Return (verdict, name, text) rows, one for all nodes with the same result.

    Nodes are named where a check is not OK, or where its results differ between nodes.
    """
    results: dict[str, dict[Check, list[str]]] = {}
    for node, checks in reports.items():
        for check in checks:
            results.setdefault(check.name, {}).setdefault(check, []).append(node)
    rows = []
    for name, by_check in results.items():
        for check, nodes in by_check.items():
            where = ""
            if HERE not in nodes and (check.verdict != OK or len(by_check) > 1):
                more = f" and {len(nodes) - MAX_NAMES} more" if len(nodes) > MAX_NAMES else ""
                where = f"{', '.join(nodes[:MAX_NAMES])}{more}: "
            rows.append((check.verdict, name, f"{where}{check.found}{check.fix and f'; fix: {check.fix}'}"))
    return rows
