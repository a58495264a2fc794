"""What the machine said: which rank this process is, as torchrun or `jobs run` tells it. No torch here."""

import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fnet_dist.errors import ConfigError
from fnet_dist.processes import exit_with_parent, process_start_time

_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class LaunchEnv:
    """This process among the others. Ranks count from 0; alone, it is rank 0 of a world of 1.

    `launch_id` and `restart_count` are torchrun's, `launched_at` is when its agent began, in Unix time: with a static
    rendezvous every launch has the id "none". The rest is what `jobs run` hands its ranks: the `attempt` that it owns,
    where ranks meet (`init_method`, and on rank 0 of many nodes a socket that listens already), a `deadline` in Unix
    time, and the `launcher`'s process id.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    error_file: Path | None = None
    launch_id: str | None = None
    restart_count: int = 0
    launched_at: float = 0.0
    attempt: int | None = None
    init_method: str | None = None
    listen_fd: int | None = None
    deadline: float | None = None
    launcher: int | None = None

    @property
    def is_rank0(self) -> bool:
        """Whether this is rank 0, which speaks and writes for all."""
        return self.rank == 0

    def restarts(self, launch_id: str | None, time: float) -> bool:
        """Whether torchrun restarts this rank, and what has `launch_id` and was written at `time` is its launch's."""
        known = launch_id is not None and launch_id == self.launch_id
        return self.restart_count > 0 and known and time >= self.launched_at


def read_launch_env(env: Mapping[str, str] | None = None) -> LaunchEnv:
    """The Runtime that torchrun's and the launcher's variables describe; without any of them, one process alone.

    Raises ConfigError if some of torchrun's are set and others not: a guess would train several lone worlds, or wait
    for ranks that never come.
    """
    env = os.environ if env is None else env
    given = [name for name in _TORCHRUN if env.get(name)]
    deadline = _number(env, "FNET_DEADLINE")
    if not given:
        return LaunchEnv(error_file=_error_file(env), deadline=deadline)
    missing = [name for name in _TORCHRUN if name not in given]
    if missing:
        raise ConfigError(
            f"half-set torchrun environment: {', '.join(given)} set but {', '.join(missing)} missing; "
            "start the ranks with torchrun, or unset them for one process"
        )
    rank, local_rank, world_size, local_world_size = (_count(env, name) for name in _TORCHRUN[:4])
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
        error_file=_error_file(env),
        launch_id=env.get("TORCHELASTIC_RUN_ID"),
        restart_count=_count(env, "TORCHELASTIC_RESTART_COUNT") if env.get("TORCHELASTIC_RESTART_COUNT") else 0,
        launched_at=(process_start_time(os.getppid()) or 0.0) if env.get("TORCHELASTIC_RUN_ID") else 0.0,
        attempt=_count(env, "FNET_ATTEMPT") if env.get("FNET_ATTEMPT") else None,
        init_method=env.get("FNET_INIT_METHOD"),
        listen_fd=_count(env, "FNET_LISTEN_FD") if env.get("FNET_LISTEN_FD") else None,
        deadline=deadline,
        launcher=_count(env, "FNET_LAUNCHER") if env.get("FNET_LAUNCHER") else None,
    )


def _count(env: Mapping[str, str], name: str) -> int:
    if not env[name].isascii() or not env[name].isdigit():
        raise ConfigError(
            f"torchrun environment: {name}={env[name]!r}, expected a whole number; start the ranks with torchrun"
        )
    return int(env[name])


def _number(env: Mapping[str, str], name: str) -> float | None:
    try:
        return float(env[name]) if env.get(name) else None
    except ValueError:
        raise ConfigError(f"{name}={env[name]!r}, expected Unix time in seconds") from None


def _error_file(env: Mapping[str, str]) -> Path | None:
    path = env.get("TORCHELASTIC_ERROR_FILE")
    return Path(path) if path else None


def exit_with_launcher(launch_env: LaunchEnv) -> None:
    """No orphans: a rank ends with its launcher, torchrun's agent or `jobs run`.

    A launcher that was gone before the call is noticed by its process id.
    """
    if launch_env.launch_id is None and launch_env.launcher is None:
        return
    exit_with_parent()
    if launch_env.launcher is not None and os.getppid() != launch_env.launcher:
        os.kill(os.getpid(), signal.SIGKILL)


def write_error_file(launch_env: LaunchEnv, message: str, trace: str, reason: str, *, aftermath: bool = False) -> None:
    """Write torchrun's error file, so that whoever launched this rank names it and shows its traceback.

    The same content as torch.distributed.elastic's @record writes, without importing torch for it, and our `reason`.
    torchrun calls the earliest the root cause, in whole seconds: an `aftermath` (another rank left) is stamped later.
    """
    if launch_env.error_file is not None:
        extra = {"py_callstack": trace, "timestamp": str(int(time.time()) + 2 * aftermath)}
        told = {"message": {"message": message, "extraInfo": extra}, "reason": reason, "aftermath": aftermath}
        launch_env.error_file.write_text(json.dumps(told))
