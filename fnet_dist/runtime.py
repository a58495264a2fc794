"""What the machine said: which rank this process is, as torchrun tells it. No torch here."""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fnet_dist.errors import ConfigError

_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Runtime:
    """This process among the others. Ranks count from 0; alone, it is rank 0 of a world of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    error_file: Path | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which speaks and writes for all."""
        return self.rank == 0


def read_runtime(env: Mapping[str, str] | None = None) -> Runtime:
    """The Runtime that torchrun's variables describe; without any of them, one process alone.

    Raises ConfigError if some are set and others not: a guess would train several lone worlds, or wait for ranks that
    never come.
    """
    env = os.environ if env is None else env
    given = [name for name in _TORCHRUN if env.get(name)]
    if not given:
        return Runtime(error_file=_error_file(env))
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
    return Runtime(rank, local_rank, world_size, local_world_size, _error_file(env))


def _count(env: Mapping[str, str], name: str) -> int:
    if not env[name].isascii() or not env[name].isdigit():
        raise ConfigError(
            f"torchrun environment: {name}={env[name]!r}, expected a whole number; start the ranks with torchrun"
        )
    return int(env[name])


def _error_file(env: Mapping[str, str]) -> Path | None:
    path = env.get("TORCHELASTIC_ERROR_FILE")
    return Path(path) if path else None


def tell_torchrun(runtime: Runtime, message: str, trace: str) -> None:
    """Write torchrun's error file, so that its summary names this rank and shows its traceback.

    The same content as torch.distributed.elastic's @record writes, without importing torch for it. torchrun calls the
    earliest the root cause, in whole seconds: what a rank says of a peer that left is stamped later than its cause.
    """
    if runtime.error_file is not None:
        aftermath = 2 if "closed by peer" in message or "reset by peer" in message else 0
        extra = {"py_callstack": trace, "timestamp": str(int(time.time()) + aftermath)}
        runtime.error_file.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
