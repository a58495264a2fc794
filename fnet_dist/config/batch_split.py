"""How ranks share a global batch: what can be said of it before torch is there."""

from fnet_dist.config.schema import Config, ParallelConfig
from fnet_dist.errors import ConfigError


def logical_shards(parallel: ParallelConfig) -> int | None:
    """How many logical shards a batch has; None if they are the ranks' shares."""
    return parallel.logical_shards if parallel.numerics == "invariant" else None


def check_batch_split(config: Config, world_size: int) -> None:
    """Raise ConfigError if ranks cannot share the shards, or a full batch would leave a piece without a sample."""
    size, pieces = config.data.global_batch_size, config.parallel.grad_accum_steps
    shards, what = logical_shards(config.parallel), "shards"
    if shards is None:
        shards, what = world_size, "ranks"
    elif shards % world_size:
        legal = [str(2**power) for power in range(shards.bit_length())]
        raise ConfigError(
            f"parallel.logical_shards {shards} cannot be shared by {world_size} ranks; use {', '.join(legal[:-1])} or "
            f"{legal[-1]} ranks, or --parallel.numerics fast"
        )
    if size < shards * pieces:
        raise ConfigError(
            f"data.global_batch_size {size} is smaller than {shards} {what} x parallel.grad_accum_steps "
            f"{pieces} = {shards * pieces}; raise --data.global-batch-size or use fewer {what} or pieces"
        )
