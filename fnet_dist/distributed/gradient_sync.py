"""Synchronise gradients between ranks: DistributedDataParallel, shared memory or a tree of logical shards."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # not in torch's list of exports
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from fnet_dist.config.schema import ParallelConfig
from fnet_dist.distributed.model_with_loss import ModelWithLoss
from fnet_dist.distributed.process_group import Group
from fnet_dist.distributed.shared_memory import SharedMemory, open_shared_memory, views_like
from fnet_dist.distributed.stragglers import ComputeTimer
from fnet_dist.distributed.tree_reduce import TreeSum, pairwise_all_reduce
from fnet_dist.errors import ConfigError


class GradientSync:
    """The model with its loss, and the synchronisation of its gradients. The constructor picks one of four ways:

    1. A single rank: nothing is sent.
    2. DDP (GPUs, several machines, models with buffers, bf16 gradients): all-reduces buckets during the last backward.
    3. Shared memory (CPU ranks of one machine): `all_reduce` averages the gradients after the last backward.
    4. Logical shards (numerics invariant): `add_shard_gradients` after each shard, then `all_reduce` adds those of all
       ranks, in an order that does not depend on the number of ranks (tree_reduce.py).

    Each way takes two looks at this rank's own gradients before they are mixed with the others': their sum
    (`local_gradient_sums`) and the time at which they were ready (`compute_timer`).
    """

    def __init__(self, forward: ModelWithLoss, group: Group, config: ParallelConfig) -> None:
        self.module: nn.Module = forward
        self.parameters = list(forward.model.parameters())
        self.compute_timer = ComputeTimer(group.device)
        self._trained = [parameter for parameter in self.parameters if parameter.requires_grad]
        self._has_cuda_graphs = config.compile and group.device.type == "cuda"
        self._group = group
        self._local_sums: list[Tensor] = []
        self._shared: SharedMemory | None = None
        self._tree = TreeSum() if config.numerics == "invariant" else None
        has_buffers = any(True for _ in forward.model.buffers())
        if self._tree is not None:
            _check_invariant(has_buffers, self._trained)
        if group.world_size == 1:
            return
        if not has_buffers and config.numerics != "bf16_gradients":
            # With a shard's gradients travel its loss sum and weight.
            tail = [] if self._tree is None else [torch.empty(2, dtype=self._trained[0].dtype)]
            self._shared = open_shared_memory(group, [*self._trained, *tail])
        if self._shared is None and self._tree is None:
            self.module = self._wrap_in_ddp(forward, config.numerics, has_buffers)
        else:
            # As DDP does. Wrapping in DDP as well would fill buckets that nobody reads: 270 us of a 1,040 us step.
            for parameter in self.parameters:
                dist.broadcast(parameter.detach(), 0)

    def _wrap_in_ddp(self, forward: ModelWithLoss, numerics: str, has_buffers: bool) -> DistributedDataParallel:
        device = self._group.device
        ddp = DistributedDataParallel(
            forward, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
        reduce = bf16_compress_hook if numerics == "bf16_gradients" else allreduce_hook
        ddp.register_comm_hook(_HookState(self._local_sums, self.compute_timer, reduce), _check_and_reduce)
        if has_buffers:
            # DDP's forward broadcasts rank 0's buffers before it calls the model: between these hooks ranks wait.
            ddp.register_forward_pre_hook(self.compute_timer.toggle_wait)
            forward.model.register_forward_pre_hook(self.compute_timer.toggle_wait)
        return ddp

    @property
    def is_invariant(self) -> bool:
        """True if gradients are added by logical shard (numerics invariant)."""
        return self._tree is not None

    def zero_grad(self) -> None:
        """Drop all gradients before a step, as optimizer.zero_grad() does, without its bookkeeping.

        A replayed CUDA graph overwrites the gradients that it allocated: with gradient accumulation, add to tensors of
        our own instead (https://github.com/pytorch/pytorch/issues/169545).
        """
        if self._has_cuda_graphs:
            for parameter in self._trained:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
            return
        for parameter in self.parameters:
            parameter.grad = None

    def detach_result(self, result: Tensor) -> Tensor:
        """Return `result` of forward without its graph; a copy if the next CUDA graph replay would overwrite it."""
        return result.detach().clone() if self._has_cuda_graphs else result.detach()

    def no_sync(self) -> AbstractContextManager[None]:
        """Return a context in which backward accumulates this rank's gradients and sends nothing (DDP's no_sync)."""
        if isinstance(self.module, DistributedDataParallel):
            return self.module.no_sync()
        return nullcontext()

    def add_shard_gradients(self, loss_sum: Tensor, weight: Tensor) -> None:
        """Move the parameters' gradients, of one logical shard, into the tree, together with the shard's loss."""
        if self._tree is not None:
            sums = torch.stack([loss_sum, weight.to(loss_sum.dtype)]).to(self._trained[0].dtype)
            self._tree.add([*self._local_gradients(), sums])
            for parameter in self._trained:
                parameter.grad = None

    def all_reduce(self) -> Tensor | None:
        """Replace each parameter's gradient by that of all ranks, after a step's last backward, unless DDP has done so.

        It is the mean over ranks; of logical shards the sum, and then return the (2,) sum of the shards' losses and
        weights. Raise RuntimeError if a parameter has no gradient, as DDP does, or if a rank has ended.
        """
        if self._tree is not None:
            total = self._reduce(self._tree.take(), divisor=1)
        elif self._shared is not None:
            total = self._reduce(self._local_gradients(), divisor=self._group.world_size)
        else:
            return None
        for parameter, gradient in zip(self._trained, total, strict=False):
            parameter.grad = gradient
        return None if self._tree is None else total[-1].clone()

    def _reduce(self, tensors: list[Tensor], divisor: int) -> list[Tensor]:
        """Return the sum over all ranks of `tensors` / `divisor`; note the local sum and the time before waiting."""
        if self._group.world_size == 1:
            return tensors
        if self._shared is None:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
        else:
            flat = self._shared.put(tensors, divisor)
        self._local_sums.append(flat.sum())
        self.compute_timer.gradients_ready()
        if self._shared is None:
            return views_like(pairwise_all_reduce(self._group, flat), tensors)
        return self._shared.take()

    def gradients(self) -> list[Tensor]:
        """Return the gradients of all parameters that have one."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def _local_gradients(self) -> list[Tensor]:
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        if len(gradients) < len(self._trained):
            names = [name for name, each in self.module.named_parameters() if each.requires_grad and each.grad is None]
            raise RuntimeError(f"no gradient for {', '.join(names)}: every parameter has to take part in the loss")
        return gradients

    def local_gradient_sums(self) -> list[Tensor]:
        """Return 0-dim sums over parts of this rank's own gradients in the step just run.

        Together they cover every gradient, and a sum is not finite if any addend is not: the cheapest check there is.
        """
        if self._group.world_size == 1:
            return [gradient.sum() for gradient in self.gradients()]
        sums = self._local_sums.copy()
        self._local_sums.clear()  # in place: DDP's hook holds this list
        return sums


def _check_invariant(has_buffers: bool, trained: list[nn.Parameter]) -> None:
    """Raise ConfigError if the model's step cannot be assembled from those of logical shards."""
    types = sorted({str(parameter.dtype) for parameter in trained})
    if has_buffers or len(types) > 1:
        found = "buffers, like BatchNorm's statistics" if has_buffers else f"parameters of {' and '.join(types)}"
        raise ConfigError(
            f"parallel.numerics invariant: the model has {found}; expected parameters of one type and no buffers: "
            "use --parallel.numerics fast, or another model"
        )


class _HookState(NamedTuple):
    """State of DDP's communication hook. Not the GradientSync itself: DDP would then hold its owner in a cycle that
    keeps the process group alive until the interpreter exits."""

    local_sums: list[Tensor]
    compute_timer: ComputeTimer
    reduce: Callable[..., torch.futures.Future[Tensor]]


def _check_and_reduce(state: _HookState, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Note the sum and the time of this rank's gradients in `bucket`, then average them over all ranks."""
    state.local_sums.append(bucket.buffer().sum())
    state.compute_timer.gradients_ready()
    return state.reduce(None, bucket)  # None: the default process group, all ranks
