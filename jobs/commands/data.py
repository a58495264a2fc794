"""fnet data fetch|verify: download or check the data set, on a machine with internet (start and end)"""

import argparse
import sys
from pathlib import Path

from fnet_dist.config.environment import environment_settings
from fnet_dist.config.schema import DataConfig
from fnet_dist.data.fashion_mnist import fetch, verify
from fnet_dist.errors import DataError
from fnet_dist.run.console import fnet_command


def main(argv: list[str]) -> int:
    """Fetch or check the four files; print one line for each.

    Raises DataError where a file is damaged or cannot be fetched.
    """
    default = environment_settings().get("data.root") or DataConfig().root
    parser = argparse.ArgumentParser(
        prog="fnet data", description="Fetch the four files of Fashion-MNIST, or check those that are there."
    )
    parser.add_argument(
        "what", choices=["fetch", "verify"], help="fetch downloads what is missing; verify changes nothing"
    )
    parser.add_argument("--root", metavar="DIR", default=default, help="where the data is (%(default)s)")
    args = parser.parse_args(argv)
    root = Path(args.root).expanduser().absolute()
    if args.what == "fetch":
        fetch(root)
    faults = verify(root)
    sys.stdout.write("".join(f"{path}: {fault or 'ok'}\n" for path, fault in faults.items()))
    wrong = sum(fault is not None for fault in faults.values())
    if wrong:
        raise DataError(
            f"{wrong} of {len(faults)} files are missing or damaged; move damaged ones away, then run "
            f"`{fnet_command()} data fetch --root {root}` where there is internet"
        )
    sys.stdout.write(f"all {len(faults)} files are the official ones; to train on them: export FNET_DATA={root}\n")
    return 0
