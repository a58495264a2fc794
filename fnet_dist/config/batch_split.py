"""The split of a global batch over ranks: checks that need no torch."""

from fnet_dist.config.schema import Config, ParallelConfig
from fnet_dist.errors import ConfigError


def batches(samples: int, batch_size: int, drop_last: bool) -> int:
    """Return the number of batches in an epoch: with `drop_last`, only whole ones."""
    return samples // batch_size if drop_last else -(-samples // batch_size)


def logical_shards(parallel: ParallelConfig) -> int | None:
    """Return the number of logical shards of a global batch; None if each rank's local batch is one."""
    return parallel.logical_shards if parallel.numerics == "invariant" else None


def check_batch_split(config: Config, world_size: int) -> None:
    """Raise ConfigError if shards do not divide among ranks, or a full batch leaves a microbatch without a sample."""
    size, microbatches = config.data.global_batch_size, config.parallel.grad_accum_steps
    shards, what = logical_shards(config.parallel), "shards"
    if shards is None:  # each rank's local batch is one shard
        shards, what = world_size, "ranks"
    elif shards % world_size:
        legal = [str(2**power) for power in range(shards.bit_length())]
        raise ConfigError(
            f"parallel.logical_shards {shards} cannot be shared by {world_size} ranks; use {', '.join(legal[:-1])} or "
            f"{legal[-1]} ranks, or --parallel.numerics fast"
        )
    if size < shards * microbatches:
        product = f"{shards} {what} x parallel.grad_accum_steps {microbatches} = {shards * microbatches}"
        fix = f"raise --data.global-batch-size, or use fewer {what} or microbatches"
        raise ConfigError(f"data.global_batch_size {size} is smaller than {product}; {fix}")
