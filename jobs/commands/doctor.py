"""fnet doctor: check this machine, or with --cluster the nodes: OK, WARN or MISS, with the fix (trust)

Until the packages are known to be there, nothing is imported that needs them.
"""

from collections.abc import Sequence

from jobs.doctor.python_env import packages, python
from jobs.doctor.result import HERE, MISS, show


def main(argv: Sequence[str]) -> int:
    """Check, and show what was found; 1 if something is MISS, else 0."""
    first = [python(), packages()]
    if any(check.verdict == MISS for check in first):
        return show({HERE: first}, as_json="--json" in argv)
    from jobs.doctor.run_checks import examine

    return examine(argv, first)
