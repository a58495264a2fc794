"""Our step by itself, as benchmarks time it in blocks."""

import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

from fnet_dist.config.batch_split import logical_shards
from fnet_dist.config.schema import Config
from fnet_dist.data.datasets import Dataset
from fnet_dist.data.sampler import GlobalBatchSampler, StepBatch
from fnet_dist.distributed.process_group import Group
from fnet_dist.training.build import Parts, build_parts
from fnet_dist.training.setup import TrainTestData
from tests.helpers.config import FashionConfig

Name = TypeVar("Name")


def in_turn(
    blocks: Mapping[Name, Callable[[int], None]], count: int, rounds: int, meet: Callable[[], object] = lambda: None
) -> dict[Name, list[float]]:
    """Microseconds of a step of each block, `count` steps of each in turn; ranks `meet` before and after. A first round
    warms up."""
    us: dict[Name, list[float]] = {name: [] for name in blocks}
    for _ in range(rounds + 1):
        for name, block in blocks.items():
            meet()
            began = time.perf_counter()
            block(count)
            meet()
            us[name].append(1e6 * (time.perf_counter() - began) / count)
    return {name: values[1:] for name, values in us.items()}


def parts_of(config: Config, group: Group, data: Dataset) -> tuple[Parts, GlobalBatchSampler]:
    """Build model, step and evaluator of a run on `data`, and its sampler."""
    sampler = GlobalBatchSampler(
        data,
        global_batch_size=config.data.global_batch_size,
        rank=group.rank,
        world_size=group.world_size,
        shards=logical_shards(config.parallel),
    )
    return build_parts(config, group, TrainTestData(data, data), sampler), sampler


def steps_of(group: Group, data: Dataset, batch_size: int, **parallel: Any) -> Callable[[int], None]:
    """A function that takes so many steps of whole batches, and then more; `parallel` are settings of that section."""
    config = FashionConfig.model_validate({"data": {"global_batch_size": batch_size}, "parallel": parallel})
    parts, sampler = parts_of(config, group, data)
    step = parts.step

    def endless() -> Iterator[tuple[int, StepBatch]]:
        number = 0
        while True:
            sampler.set_position(1 + number)
            for batch in sampler.steps():
                if batch.global_samples == batch_size:
                    number += 1
                    yield number, batch

    batches = endless()

    def take(count: int) -> None:
        some = list(islice(batches, count))
        read = data.batches((each.indices for _, batch in some for each in batch.microbatches), 0)
        for number, batch in some:
            step.take(number, batch, read)
        read.close()

    return take
