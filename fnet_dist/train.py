"""Train one rank: torchrun --standalone --nproc-per-node=2 -m fnet_dist.train --config jobs/quickstart.toml

Settings, signal handlers and the question whether there is anything left to train come before torch is imported, which
takes seconds. Every end has its exit code, and an error file tells the launcher which rank failed and why.
"""

import sys
from collections.abc import Sequence

from fnet_dist.checkpoint.resume import check_run, finished_note, old_word_note, raise_if_stopped
from fnet_dist.config.help import settings_help
from fnet_dist.config.load import load_config, settings_class
from fnet_dist.distributed.launch_env import LaunchEnv, exit_with_launcher, read_launch_env, torchrun_warning
from fnet_dist.fork_server import serve
from fnet_dist.processes import name_process
from fnet_dist.run.console import final_table
from fnet_dist.run.exit import exit_process, exit_with_error
from fnet_dist.run.log import LOGGER, configure_logging, write
from fnet_dist.run.run_dir import run_dir_of
from fnet_dist.run.stop import install_handlers


def main(argv: Sequence[str]) -> int:
    """Train this rank and return its exit code (see fnet_dist/run/README.md)."""
    launch_env = LaunchEnv()
    try:
        configure_logging("rank")  # for an error in the next line
        if {"-h", "--help"} & set(argv):
            write(f"{settings_help(settings_class(argv))}\n", sys.stdout)
            return 0
        launch_env = read_launch_env()
        configure_logging(launch_env.process, launch_env.attempt, reports=launch_env.is_rank0)
        name_process(launch_env.process)
        exit_with_launcher(launch_env)
        stop = install_handlers(launch_env.deadline, has_launcher=launch_env.launcher is not None)
        is_launched = launch_env.attempt is not None  # by `fnet run`, which has checked the run and its settings
        config = load_config(argv, env={} if is_launched else None)
        if not is_launched and (note := old_word_note(config)) is not None:
            LOGGER.info(note)
        if (warning := torchrun_warning()) is not None:
            LOGGER.warning(warning)
        if not is_launched:
            raise_if_stopped(config, launch_env)
        if not is_launched and check_run(config) is not None:
            run = run_dir_of(config)
            LOGGER.info(finished_note(config))
        else:
            from fnet_dist.training.trainer import train  # here, not above: it imports torch

            run = train(config, launch_env, stop)
        if launch_env.is_rank0:
            write(f"{final_table(run)}\n", sys.stdout)
    except BaseException as error:
        return exit_with_error(launch_env, error)
    return 0


if __name__ == "__main__":
    serve("fnet_dist.training.trainer", "torch.fx.experimental.symbolic_shapes")  # else imported at the first backward
    exit_process(main(sys.argv[1:]))
