"""Synchronise gradients between ranks: DistributedDataParallel, shared memory or a tree of logical shards."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

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
from fnet_dist.distributed.step_times import StepTimer
from fnet_dist.distributed.tree_reduce import TreeSum, pairwise_all_reduce
from fnet_dist.errors import ConfigError


class GradientSync:
    """The model with its loss, and the synchronisation of its gradients. The constructor picks one of four ways:

    1. A single rank: nothing is sent.
    2. DDP (GPUs, several machines, models with buffers, bf16 gradients): all-reduces buckets during the last backward.
    3. Shared memory (CPU ranks of one machine): `all_reduce` averages the gradients after the last backward.
    4. Logical shards (numerics invariant): `add_shard_gradients` after each shard, then `all_reduce` adds those of all
       ranks, in an order that does not depend on the number of ranks (tree_reduce.py).

    Each way records two things of this rank's own gradients before they are synchronised: their sum
    (`local_gradient_sums`) and the time at which they were ready (`timer`).
    """

    def __init__(self, forward: ModelWithLoss, group: Group, config: ParallelConfig) -> None:
        self.module: nn.Module = forward
        self.parameters = list(forward.model.parameters())
        self._model = forward.model
        self.timer = StepTimer(group.device)
        self.is_invariant = config.numerics == "invariant"  # gradients are added by logical shard
        self._trained = [parameter for parameter in self.parameters if parameter.requires_grad]
        self._has_cuda_graphs = config.compile and group.device.type == "cuda"
        self._accumulates = config.grad_accum_steps > 1
        self._zeros_for_unused = config.unused_parameters
        self._group = group
        self._local_sums: list[Tensor] = []
        self._shared: SharedMemory | None = None
        self._tree = TreeSum()  # used only if `is_invariant`
        has_buffers = any(True for _ in forward.model.buffers())
        types = sorted({str(parameter.dtype) for parameter in self._trained})
        if self.is_invariant and (has_buffers or len(types) > 1):
            found = "buffers, like BatchNorm's statistics" if has_buffers else f"parameters of {' and '.join(types)}"
            raise ConfigError(
                f"parallel.numerics invariant: the model has {found}; expected parameters of one type and no buffers: "
                "use --parallel.numerics fast, or another model"
            )
        if group.world_size == 1:
            return
        if not has_buffers and config.numerics != "bf16_gradients":
            # Each shard's loss sum and weight are sent with its gradients.
            tail = [torch.empty(2, dtype=self._trained[0].dtype)] if self.is_invariant else []
            self._shared = open_shared_memory(group, [*self._trained, *tail])
        if self._shared is None and not self.is_invariant:
            self.module = self._wrap_in_ddp(forward, config, has_buffers)
        else:
            # As DDP does. Wrapping in DDP as well would fill buckets for nothing: 270 us of a 1,040 us step.
            for parameter in self.parameters:
                dist.broadcast(parameter.detach(), 0)

    def _wrap_in_ddp(
        self, forward: ModelWithLoss, config: ParallelConfig, has_buffers: bool
    ) -> DistributedDataParallel:
        devices = [self._group.device] if self._group.device.type == "cuda" else None  # None: DDP's rule for CPUs
        # Newer torch warns of the older name.
        names = inspect.signature(DistributedDataParallel).parameters
        sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        options: dict[str, Any] = {sync_buffers: has_buffers}  # those of the loss are constants
        ddp = DistributedDataParallel(
            _AfterBroadcast(forward, self.timer) if has_buffers else forward,
            device_ids=devices,
            gradient_as_bucket_view=True,
            find_unused_parameters=config.unused_parameters,
            **options,
        )
        # Not `self` in the hook: DDP would hold its owner in a cycle, which keeps the group alive until the exit.
        local_sums, timer = self._local_sums, self.timer
        reduce = bf16_compress_hook if config.numerics == "bf16_gradients" else allreduce_hook

        def check_and_reduce(_: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
            local_sums.append(bucket.buffer().sum())
            timer.gradients_ready()
            return reduce(None, bucket)  # type: ignore[arg-type]  # None: the default process group, all ranks

        ddp.register_comm_hook(None, check_and_reduce)
        if has_buffers:
            # DDP's forward broadcasts rank 0's buffers before it calls its module: between these two ranks wait.
            ddp.register_forward_pre_hook(lambda *_: timer.exchange())
        return ddp

    @property
    def exchange(self) -> SharedMemory | None:
        """The memory through which gradients are exchanged, unless torch's collectives do it."""
        return self._shared

    def zero_grad(self) -> None:
        """Drop all gradients before a step, as optimizer.zero_grad() does, without its bookkeeping.

        A replayed CUDA graph overwrites the gradients that it allocated: with gradient accumulation, add to tensors of
        our own instead (https://github.com/pytorch/pytorch/issues/169545).
        """
        for parameter in self._trained:
            if not (self._has_cuda_graphs and self._accumulates):
                parameter.grad = None
            else:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()

    def detach_result(self, result: Tensor) -> Tensor:
        """Return `result` of forward without its graph; a copy if the next CUDA graph replay would overwrite it."""
        return result.detach().clone() if self._has_cuda_graphs else result.detach()

    def no_sync(self) -> AbstractContextManager[None]:
        """Return a context in which backward accumulates this rank's gradients and sends nothing (DDP's no_sync)."""
        return self.module.no_sync() if isinstance(self.module, DistributedDataParallel) else nullcontext()

    def add_shard_gradients(self, loss_sum: Tensor, weight: Tensor) -> None:
        """Move the parameters' gradients, of one logical shard, into the tree, together with the shard's loss."""
        gradients = self._local_gradients()
        if self._has_cuda_graphs:  # the next shard's replay overwrites these, or adds to them
            gradients = [gradient.clone() for gradient in gradients]
        self._tree.add([*gradients, torch.stack([loss_sum, weight.to(loss_sum.dtype)]).to(gradients[0].dtype)])
        self.zero_grad()  # the tree has taken the tensors: the next shard's backward must not add to them

    def all_reduce(self) -> Tensor | None:
        """Replace each parameter's gradient by that of all ranks, after a step's last backward, unless DDP has done so.

        It is the mean over ranks. Of logical shards it is the sum, and the (2,) sum of their losses and weights is
        returned. Raise ConfigError if a parameter has no gradient, RuntimeError if a rank has ended.
        """
        if self._shared is None and not self.is_invariant:
            if self._group.world_size > 1 or self._zeros_for_unused:
                self._local_gradients()  # DDP leaves none where no rank has one, and otherwise raises a step too late
            return None
        tensors = self._tree.take() if self.is_invariant else self._local_gradients()
        if self._group.world_size > 1:
            if self._shared is None:
                flat = torch.cat([tensor.flatten() for tensor in tensors])
            else:
                flat = self._shared.put(tensors, divisor=1 if self.is_invariant else self._group.world_size)
            self._local_sums.append(flat.sum())
            self.timer.gradients_ready()  # before the wait for other ranks
            if self._shared is None:
                tensors = views_like(pairwise_all_reduce(self._group, flat), tensors)
            else:
                tensors = self._shared.take()
        for parameter, gradient in zip(self._trained, tensors, strict=False):
            parameter.grad = gradient
        return tensors[-1].clone() if self.is_invariant else None  # the next step reuses the memory

    def gradients(self) -> list[Tensor]:
        """Return the gradients of all parameters that have one."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def _local_gradients(self) -> list[Tensor]:
        """Return the gradients of all trained parameters; zeros for a missing one, or raise ConfigError."""
        gradients = self.gradients()
        if len(gradients) == len(self._trained):
            return gradients
        if not self._zeros_for_unused:
            names = [name for name, each in self._model.named_parameters() if each.requires_grad and each.grad is None]
            raise ConfigError(
                f"no gradient for {', '.join(names[:5])}: the loss does not depend on it; freeze it (requires_grad "
                "False), or take zeros: --parallel.unused-parameters true"
            )
        for parameter in self._trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return self.gradients()

    def local_gradient_sums(self) -> list[Tensor]:
        """Return 0-dim sums over parts of this rank's own gradients in the step just run.

        Together they cover every gradient, and a sum is not finite if any addend is not: the cheapest check there is.
        """
        if self._group.world_size == 1:
            return [gradient.sum() for gradient in self.gradients()]
        sums = self._local_sums.copy()
        self._local_sums.clear()  # in place: DDP's hook holds this list
        return sums


class _AfterBroadcast(nn.Module):
    """Tell the timer that DDP has broadcast its buffers. Not a hook: torch.compile would trace it with the model, and
    compile again whenever the timer's state differs."""

    def __init__(self, forward: ModelWithLoss, timer: StepTimer) -> None:
        super().__init__()
        self._forward, self._timer = forward, timer

    def forward(self, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        self._timer.compute()
        result: tuple[Tensor, Tensor] = self._forward(inputs, targets)
        return result
