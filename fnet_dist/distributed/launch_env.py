"""Read which rank this process is, from the variables of torchrun or `fnet run`; write its error file. No torch."""

import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fnet_dist.errors import ConfigError
from fnet_dist.processes import exit_with_parent, process_start_time

_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class LaunchEnv:
    """This process's place among the ranks, which count from 0; without a launcher, rank 0 of one rank."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    error_file: Path | None = None  # set by either launcher
    launch_id: str | None = None  # torchrun's; with a static rendezvous every launch has the id "none"
    restart_count: int = 0  # torchrun's
    max_restarts: int = 0  # torchrun's
    launched_at: float = 0.0  # start of torchrun's agent, Unix time: it tells launches with the same id apart
    attempt: int | None = None  # the attempt that `fnet run` owns; it sets the fields below too
    init_method: str | None = None  # torch's
    listen_fd: int | None = None  # on rank 0 of several nodes, a socket that listens already
    launcher: int | None = None  # process id
    notices: bool = False  # the launcher gives notices to the site's command
    deadline: float | None = None  # the user's, Unix time; Slurm's time limit is the launcher's concern
    slurm_job: str | None = None  # id of the Slurm job that this process is in

    @property
    def is_rank0(self) -> bool:
        """Return True for rank 0, which prints and writes for all."""
        return self.rank == 0

    @property
    def process(self) -> str:
        """Return this rank's name in the log."""
        return f"rank {self.rank}/{self.world_size}"

    def restarts(self, launch_id: str | None, time: float) -> bool:
        """Return True if torchrun has restarted this rank since its own launch wrote `launch_id` at `time`."""
        same = launch_id is not None and launch_id == self.launch_id
        return self.restart_count > 0 and same and time >= self.launched_at


def read_launch_env(env: Mapping[str, str] | None = None) -> LaunchEnv:
    """Return the launch that `env` (`os.environ` if None) describes. Raise ConfigError if torchrun's is invalid."""
    env = os.environ if env is None else env
    given = [name for name in _TORCHRUN if env.get(name)]
    try:
        deadline = float(env["FNET_DEADLINE"]) if env.get("FNET_DEADLINE") else None
    except ValueError:
        raise ConfigError(f"FNET_DEADLINE={env['FNET_DEADLINE']!r}, expected Unix time in seconds") from None
    error_file = Path(env["TORCHELASTIC_ERROR_FILE"]) if env.get("TORCHELASTIC_ERROR_FILE") else None
    slurm_job = env.get("SLURM_JOB_ID") or None
    if not given:  # one process alone
        tasks = _count(env, "SLURM_STEP_NUM_TASKS") or 1
        if tasks > 1 and env.get("SLURM_PROCID"):
            raise ConfigError(
                f"srun started {tasks} tasks, each of which would train the whole run alone; expected a launcher: "
                "srun --ntasks-per-node=1 python -m jobs run JOBFILE, or torchrun; unset SLURM_STEP_NUM_TASKS for "
                "independent runs"
            )
        return LaunchEnv(error_file=error_file, deadline=deadline, slurm_job=slurm_job)
    missing = [name for name in _TORCHRUN if name not in given]
    if missing:  # a guess would train several runs of one rank each, or wait for ranks that never come
        raise ConfigError(
            f"half-set torchrun environment: {', '.join(given)} set but {', '.join(missing)} missing; "
            "start the ranks with torchrun, or unset them for one process"
        )
    rank, local_rank, world_size, local_world_size = (_count(env, name) or 0 for name in _TORCHRUN[:4])
    if rank >= world_size or local_rank >= local_world_size or local_world_size > world_size:
        raise ConfigError(
            f"torchrun environment: RANK={rank} of WORLD_SIZE={world_size}, LOCAL_RANK={local_rank} of "
            f"LOCAL_WORLD_SIZE={local_world_size} contradict each other; start the ranks with torchrun"
        )
    return LaunchEnv(
        rank,
        local_rank,
        world_size,
        local_world_size,
        error_file=error_file,
        launch_id=env.get("TORCHELASTIC_RUN_ID"),
        restart_count=_count(env, "TORCHELASTIC_RESTART_COUNT") or 0,
        max_restarts=_count(env, "TORCHELASTIC_MAX_RESTARTS") or 0,
        launched_at=(process_start_time(os.getppid()) or 0.0) if env.get("TORCHELASTIC_RUN_ID") else 0.0,
        attempt=_count(env, "FNET_ATTEMPT"),
        init_method=env.get("FNET_INIT_METHOD"),
        listen_fd=_count(env, "FNET_LISTEN_FD"),
        deadline=deadline,
        slurm_job=slurm_job,
        launcher=_count(env, "FNET_LAUNCHER"),
        notices=bool(env.get("FNET_NOTICES")),
    )


def _count(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name)
    if not text:
        return None
    if not text.isascii() or not text.isdigit():  # int() would take "-1" and " 1"
        message = f"torchrun environment: {name}={text!r}, expected a whole number; start the ranks with torchrun"
        raise ConfigError(message)
    return int(text)


def torchrun_warning(env: Mapping[str, str] | None = None) -> str | None:
    """Return a line about a torchrun in a Slurm job that Slurm's warning would end without a save; else None."""
    env = os.environ if env is None else env
    handled = env.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGUSR2")  # torchrun sets it since 2.10
    if not env.get("SLURM_JOB_ID") or not env.get("TORCHELASTIC_RUN_ID") or "SIGUSR2" in handled:
        return None
    return (
        "SIGUSR1 and SIGUSR2, Slurm's warnings, end torchrun at once, and nothing is saved; start it with "
        f"--signals-to-handle {handled},SIGUSR1,SIGUSR2"
    )


def exit_with_launcher(launch_env: LaunchEnv) -> None:
    """Let this rank end with its launcher, torchrun's agent or `fnet run`, however that ends."""
    if launch_env.launch_id is None and launch_env.launcher is None:
        return
    exit_with_parent()  # covers only an end from here on: compare the process id after it, not before
    if launch_env.launcher is not None and os.getppid() != launch_env.launcher:
        os.kill(os.getpid(), signal.SIGKILL)


def write_error_file(
    launch_env: LaunchEnv,
    message: str,
    trace: str,
    reason: str,
    *,
    aftermath: bool = False,
    step: int | None = None,
    shared: Mapping[str, Any] | None = None,
    waits: Mapping[str, Any] | None = None,
) -> None:
    """Write torchrun's error file, by which a launcher names the rank that failed and shows its traceback.

    The content is what @record of torch.distributed.elastic writes, without importing torch, and our own fields.
    torchrun takes the earliest for the root cause, in whole seconds: an `aftermath` (another rank left) is dated later.
    `shared`, of an error that all ranks raise, has `rank_at_fault`, None if not known, and perhaps `samples`. `waits`,
    of a hang, is that of flight_recorder.write_record.
    """
    if launch_env.error_file is not None:
        extra = {"py_callstack": trace, "timestamp": str(int(time.time()) + 2 * aftermath)}
        torchruns = {"message": {"message": message, "extraInfo": extra}}
        ours = {"reason": reason, "aftermath": aftermath, "step": step, "waits": waits}
        content = torchruns | ours | dict(shared or {})
        launch_env.error_file.write_text(json.dumps(content), encoding="utf-8")
