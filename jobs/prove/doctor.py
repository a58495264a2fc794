"""python -m jobs doctor: is this machine ready, or with --cluster are these nodes? OK, WARN or MISS, with the fix.

Until the packages are known to be there, nothing is imported that needs them.
"""

from collections.abc import Sequence

from jobs.prove.check import HERE, MISS, show
from jobs.prove.interpreter import packages, python


def main(argv: Sequence[str]) -> int:
    """Check, and show what was found; 1 if something is MISS, else 0."""
    first = [python(), packages()]
    if any(check.verdict == MISS for check in first):
        return show({HERE: first}, as_json="--json" in argv)
    from jobs.prove.examination import examine

    return examine(argv, first)
