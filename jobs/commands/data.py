"""fnet data fetch|verify: download or check Fashion-MNIST, on a machine with internet (start and end 6)"""

from pathlib import Path

from fnet_dist.config.environment import environment_settings
from fnet_dist.errors import DataError
from fnet_dist.processes import quoted
from fnet_dist.recipes.fashion_mnist.download import fetch
from fnet_dist.recipes.fashion_mnist.files import contents, verify
from fnet_dist.recipes.fashion_mnist.settings import DataConfig
from fnet_dist.run.console import fnet_command
from jobs.runs import command_parser
from slurm.site_config import read_site


def main(argv: list[str]) -> int:
    """Fetch or check the four files; print one line for each. Raises DataError if one is damaged or not there."""
    default = environment_settings().get("data.root") or read_site().data_root or DataConfig().root
    parser = command_parser(__doc__)
    parser.add_argument("do", choices=["fetch", "verify"], help="fetch downloads missing files; verify changes nothing")
    parser.add_argument("--root", metavar="DIR", default=default, help="where the data is (%(default)s)")
    args = parser.parse_args(argv)
    root = Path(args.root).expanduser().absolute()
    if args.do == "fetch":
        fetch(root)
    faults = verify(root)
    print(*(f"{path}: {fault or 'ok'}" for path, fault in faults.items()), sep="\n")
    wrong = sum(fault is not None for fault in faults.values())
    if wrong:
        raise DataError(
            f"{wrong} of {len(faults)} files are missing or damaged ({contents(root)}); move damaged ones away, "
            f"then run `{fnet_command()} data fetch --root {quoted(root)}` where there is internet"
        )
    print(f"all {len(faults)} files are the official ones; to train on them: export FNET_DATA={quoted(root)}")
    return 0
