"""fnet doctor: check this machine, or with --cluster the nodes: OK, WARN or MISS, with the fix (trust 1)

With --cluster a short Slurm job does it, which `-N`, `--gpus-per-node` and `-p` size as those of `fnet submit`.
"""

from collections.abc import Sequence

from jobs.doctor.python_env import packages, python
from jobs.doctor.result import HERE, has_miss, show


def main(argv: Sequence[str]) -> int:
    """Run the checks and print them. Return 1 if one is MISS, else 0."""
    first = [python(), packages()]
    if has_miss({HERE: first}):
        return show({HERE: first}, as_json="--json" in argv)
    # Imported here: nothing that needs an installed package may come before the check of the packages.
    from jobs.doctor.run_checks import run_checks

    return run_checks(argv, first, __doc__)
