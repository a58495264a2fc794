"""Train one rank: torchrun --standalone --nproc-per-node=2 -m fnet_dist.train --config jobs/quickstart.toml

The door: settings, signals and "is it finished already?" come before torch is imported; every end leaves by its exit
code, and torchrun's error file names the rank that failed.
"""

import sys
import traceback
from collections.abc import Sequence

from fnet_dist.attempt import check_run
from fnet_dist.console import final_table
from fnet_dist.errors import FnetError, StorageError
from fnet_dist.run_dir import run_of
from fnet_dist.runtime import Runtime, read_runtime, tell_torchrun
from fnet_dist.settings import load_config
from fnet_dist.settings_text import settings_help
from fnet_dist.stopping import install_handlers


def main(argv: Sequence[str]) -> int:
    """Train this rank and return its exit code (see fnet_dist/README.md)."""
    if {"-h", "--help"} & set(argv):
        print(settings_help())
        return 0
    runtime = Runtime()
    try:
        runtime = read_runtime()
        config = load_config(argv)
        stop = install_handlers()
        if check_run(config) is not None:
            if runtime.is_main:
                print(f"finished before, nothing is trained now: {run_of(config).path}")
        else:
            from fnet_dist.trainer import train  # imports torch: seconds

            train(config, runtime, stop)
        if runtime.is_main:
            print(final_table(run_of(config)))
        return 0
    except FnetError as error:
        if runtime.local_rank == 0:
            print(f"error: {error}", file=sys.stderr)
        tell_torchrun(runtime, str(error), str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        traceback.print_exc()
        tell_torchrun(runtime, f"{type(error).__name__}: {error}", traceback.format_exc())
        return StorageError.exit_code if isinstance(error, OSError) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
