"""Format numbers and durations for tables and messages."""

from collections.abc import Mapping, Sequence

NONE = "–"


def number(value: float | None, digits: int = 0) -> str:
    """Return a figure with thousands separators, or a dash for None."""
    return NONE if value is None else f"{value:,.{digits}f}"


def figure(value: float) -> str:
    """Return an amount with three significant digits, and none after the point from a hundred on: 3.67, 1,234."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def describe_nodes(failures: Mapping[str, Sequence[str]]) -> str:
    """Return "n2 (2 failed attempts; attempt 1: ...; attempt 2: ...)" for each node, which has a line a failure."""
    return ", ".join(f"{node} ({len(lines)} failed attempts; {'; '.join(lines)})" for node, lines in failures.items())


def duration(seconds: float) -> str:
    """Return a duration in its two largest units: "45 s", "4 min 05 s", "3 h 12 min", "2 d 01 h"."""
    minutes, s = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days:,} d {hours:02d} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {s:02d} s" if minutes else f"{s} s"
