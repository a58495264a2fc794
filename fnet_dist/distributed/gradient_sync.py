"""How gradients meet: DistributedDataParallel between ranks, nothing at all in a world of one."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # not in torch's list of exports
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from fnet_dist.config.schema import ParallelConfig
from fnet_dist.distributed.model_with_loss import ModelWithLoss
from fnet_dist.distributed.process_group import Group
from fnet_dist.distributed.shared_memory import SharedMemory, open_shared_memory, views_like
from fnet_dist.distributed.stragglers import ComputeTimer, Timestamp
from fnet_dist.distributed.tree_reduce import TreeSum, pairwise_all_reduce
from fnet_dist.errors import ConfigError

_TAIL = 2  # numbers that go with a shard's gradients: its loss's sum and weight


class GradientSync:
    """The model and its loss as the step calls them, and a look at each rank's own gradients before they meet."""

    def __init__(self, forward: ModelWithLoss, group: Group, config: ParallelConfig) -> None:
        model, numerics = forward.model, config.numerics
        has_buffers = any(True for _ in model.buffers())
        self.model = model
        self.parameters = list(model.parameters())
        self._trained = [parameter for parameter in self.parameters if parameter.requires_grad]
        self._replayed = config.compile and group.device.type == "cuda"
        self._group, self.world_size = group, group.world_size
        self.module: nn.Module = forward
        self._sums: list[Tensor] = []
        self._compute_timer: ComputeTimer | None = None
        self._shared: SharedMemory | None = None
        self._subtree: TreeSum | None = None
        if numerics == "invariant":
            _check_invariant(has_buffers, self._trained)
            self._subtree = TreeSum()
        if group.world_size > 1:
            ddp = DistributedDataParallel(  # all ranks have rank 0's weights now
                forward,
                device_ids=[group.device] if group.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
            self._compute_timer = compute_time = ComputeTimer(group.device)
            ddp.register_comm_hook(_HookState(numerics, self._sums, compute_time), _check_and_reduce)
            if has_buffers:  # DDP broadcasts rank 0's before the model's own forward
                ddp.register_forward_pre_hook(compute_time.turn)
                model.register_forward_pre_hook(compute_time.turn)
            elif numerics != "bf16_gradients":
                tail = [] if self._subtree is None else [torch.empty(_TAIL, dtype=self._trained[0].dtype)]
                self._shared = open_shared_memory(group, [*self._trained, *tail])
            if self._shared is None and self._subtree is None:
                self.module = ddp  # else its forward would prepare buckets that stay empty

    def start_compute_timer(self) -> None:
        """A step begins that is to be timed. In a world of one there is nobody to compare with."""
        if self._compute_timer is not None:
            self._compute_timer.start()

    def compute_time(self) -> tuple[Timestamp, ...]:
        """When this rank was busy with its own part of the step, if that is timed; see OwnTime.moments."""
        return () if self._compute_timer is None else self._compute_timer.timestamps()

    def zero_grad(self) -> None:
        """What an optimizer's zero_grad does, without its bookkeeping.

        A CUDA graph's own gradients are overwritten by its next replay, of the next piece: they are added to others
        (https://github.com/pytorch/pytorch/issues/169545).
        """
        if self._replayed:
            for parameter in self._trained:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
            return
        for parameter in self.parameters:
            parameter.grad = None

    def detach_result(self, result: Tensor) -> Tensor:
        """`result` of the forward pass without its graph, and where the next replay cannot overwrite it."""
        return result.detach().clone() if self._replayed else result.detach()

    def gradients(self) -> list[Tensor]:
        """The gradients that there are, after the exchange."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def no_sync(self) -> AbstractContextManager[None]:
        """Inside, backward adds to this rank's gradients and sends nothing (DDP's no_sync)."""
        if isinstance(self.module, DistributedDataParallel):
            return self.module.no_sync()
        return nullcontext()

    @property
    def is_invariant(self) -> bool:
        """Whether each logical shard is set aside, so that gradients are added in an order of their own."""
        return self._subtree is not None

    def add_shard_gradients(self, sums: Tensor) -> None:
        """A logical shard is through: its gradients leave the parameters, for the tree; `sums` (2,) goes with them."""
        if self._subtree is not None:
            self._subtree.add([*self._local_gradients(), sums.to(self._trained[0].dtype)])
            for parameter in self._trained:
                parameter.grad = None

    def all_reduce(self) -> Tensor | None:
        """After a step's last backward: gradients are all ranks', where DDP has not seen to that by then.

        They are the mean; of logical shards the sum, and that of what was set aside with them is returned. Raises
        RuntimeError if a parameter has no gradient, as DDP does, or if a rank has left.
        """
        if self._subtree is not None:
            total = self._all_reduce(self._subtree.take(), 1)
        elif self._shared is not None:
            total = self._all_reduce(self._local_gradients(), self.world_size)
        else:
            return None
        for parameter, gradient in zip(self._trained, total, strict=False):
            parameter.grad = gradient
        return None if self._subtree is None else total[-1].clone()

    def _all_reduce(self, mine: list[Tensor], divisor: int) -> list[Tensor]:
        """The sum of all ranks' `mine`, each divided; in between they are looked at, and the clock is."""
        if self._compute_timer is None:  # a world of one
            return mine
        flat = torch.cat([each.flatten() for each in mine]) if self._shared is None else self._shared.put(mine, divisor)
        self._sums.append(flat.sum())
        self._compute_timer.ready()
        return views_like(pairwise_all_reduce(self._group, flat), mine) if self._shared is None else self._shared.take()

    def _local_gradients(self) -> list[Tensor]:
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        if len(gradients) < len(self._trained):
            names = [name for name, each in self.module.named_parameters() if each.requires_grad and each.grad is None]
            raise RuntimeError(f"no gradient for {', '.join(names)}: every parameter has to take part in the loss")
        return gradients

    def local_gradient_sums(self) -> list[Tensor]:
        """Sums, 0-dim, over parts of this rank's own gradients in the step just run.

        Their sum is not finite if any gradient is not: the cheapest look at all of them that there is.
        """
        if self.world_size == 1:
            return [gradient.sum() for gradient in self.gradients()]
        sums = self._sums.copy()
        self._sums.clear()
        return sums


def _check_invariant(has_buffers: bool, trained: Sequence[Tensor]) -> None:
    """Raise ConfigError for a model whose steps cannot be put together from those of shards."""
    types = sorted({str(parameter.dtype) for parameter in trained})
    found = (
        "buffers, like BatchNorm's statistics of one share" if has_buffers else f"parameters of {' and '.join(types)}"
    )
    if has_buffers or len(types) > 1:
        raise ConfigError(
            f"parallel.numerics invariant: the model has {found}; expected parameters of one type and no buffers: "
            "use --parallel.numerics fast, or another model"
        )


@dataclass(frozen=True)
class _HookState:
    """What the hook knows. Not the Exchange: DDP would hold its own owner, and live until the interpreter is gone."""

    numerics: str
    sums: list[Tensor]
    compute_time: ComputeTimer


def _check_and_reduce(state: _HookState, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: look at this rank's gradients, then average them with the others'."""
    state.sums.append(bucket.buffer().sum())
    state.compute_time.ready()
    reduce = bf16_compress_hook if state.numerics == "bf16_gradients" else allreduce_hook
    return reduce(None, bucket)  # type: ignore[arg-type]  # None: all ranks, as documented
