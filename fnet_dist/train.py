"""Train one rank: torchrun --standalone --nproc-per-node=2 -m fnet_dist.train --config jobs/quickstart.toml

The door: settings, signals, "is it finished already?" and "was it only asked to stop?" come before torch is imported;
every end leaves by its exit code, and the error file tells a launcher which rank failed and why.
"""

import sys
from collections.abc import Sequence

from fnet_dist.checkpoint.resume import check_run, choose_run, stopped_by_this_launch
from fnet_dist.config.help import settings_help
from fnet_dist.config.load import load_config
from fnet_dist.distributed.launch_env import Runtime, die_with_the_launcher, read_runtime
from fnet_dist.run.console import final_table, how_to_go_on
from fnet_dist.run.exit import end_process, leave
from fnet_dist.run.run_dir import run_of
from fnet_dist.run.stop import StoppedError, install_handlers


def main(argv: Sequence[str]) -> int:
    """Train this rank and return its exit code (see fnet_dist/README.md)."""
    if {"-h", "--help"} & set(argv):
        print(settings_help())
        return 0
    runtime = Runtime()
    try:
        runtime = read_runtime()
        die_with_the_launcher(runtime)
        stop = install_handlers(runtime.deadline)
        config = load_config(argv)
        if (stopped := stopped_by_this_launch(config, runtime)) is not None:
            raise StoppedError(stopped["step"], stopped["reason"], choose_run(config, runtime))
        if check_run(config) is not None:
            run = run_of(config)
            if runtime.is_main:
                print(f"finished before, nothing is trained now: {run.path}\n{how_to_go_on(run)}")
        else:
            from fnet_dist.training.trainer import train  # imports torch: seconds

            run = train(config, runtime, stop)
        if runtime.is_main:
            print(final_table(run))
    except BaseException as error:
        return leave(runtime, error)
    return 0


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
