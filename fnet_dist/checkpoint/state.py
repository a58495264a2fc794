"""Convert the state of training into a checkpoint's bytes and back, bit for bit.

No generator's state is saved: random streams derive from counters. Nothing is pickled, because unpickling a file runs
the code in it. Tensors become safetensors; the rest of an optimizer's state (the numbers and lists of LBFGS) becomes
JSON that refers to its tensors by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn, optim

from fnet_dist.checkpoint.storage import CheckpointBytes
from fnet_dist.config.help import one_line
from fnet_dist.errors import ConfigError, NonFiniteError


@dataclass
class TrainState:
    """The mutable state of a run: weights, optimizer and counters. The schedule is a function of the step."""

    model: nn.Module
    optimizer: optim.Optimizer
    epoch: int = 1  # the epoch in progress, from 1
    step: int = 0  # optimizer steps done
    samples: int = 0  # samples seen, over all epochs
    epoch_steps: int = 0  # steps done in this epoch
    epoch_loss_sum: float = 0.0  # of this epoch's step losses
    epoch_samples: int = 0  # seen in this epoch
    epoch_seconds: float = 0.0  # spent training in this epoch
    evaluated_step: int = 0  # of the last evaluation
    best_step: int = 0  # of the best evaluation so far, by run.monitor
    best_value: float | None = None  # its loss or metric
    not_better: int = 0  # evaluations since
    window_steps: int = 1  # length of the next window, as rank 0 has set it for all ranks

    def next_epoch(self) -> None:
        """Advance to the next epoch and reset its counters."""
        self.epoch += 1
        self.epoch_steps, self.epoch_loss_sum, self.epoch_samples, self.epoch_seconds = 0, 0.0, 0, 0.0

    def count_evaluation(self, value: float | None, *, is_better: bool) -> None:
        """Count the evaluation at this step, once: a resume from a checkpoint of the step may repeat it."""
        if self.evaluated_step == self.step:
            return
        self.evaluated_step = self.step
        if is_better:
            self.best_step, self.best_value, self.not_better = self.step, value, 0
        else:
            self.not_better += 1


# `window_steps` is left out: it is timing of this machine, and a resumed run measures it again.
_COUNTERS = tuple(name for name in TrainState.__annotations__ if name not in ("model", "optimizer", "window_steps"))


@dataclass(frozen=True)
class StateSnapshot:
    """A copy of a TrainState at one step, in host memory; everything small is in `values`."""

    values: dict[str, Any]
    parameters: frozenset[str]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    is_copied: torch.cuda.Event | None  # from a GPU: its tensors may be read after this event


def check_model_state(model: nn.Module) -> None:
    """Raise ConfigError that names the first parameter or buffer that no checkpoint can save and restore.

    Tensors may share memory, as tied weights do: each is saved whole, under each of its names.
    """
    for name, tensor in model.state_dict().items():
        try:
            copy = tensor.detach().clone()
            tensor.copy_(copy)  # as load_state_dict does: refused if one number stands for several elements
            save({name: copy.flatten()[:0].cpu()})  # refused for a dtype that safetensors has not, and for sparse
        except Exception as error:  # each of the three libraries has its own
            kind = f"{tensor.layout} {_describe(tensor)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ConfigError(
                f"the model's {name} is {kind.removeprefix('torch.')}, which no checkpoint can save and restore "
                f"({type(error).__name__}: {one_line(str(error))}); expected a dense tensor: clone() it, or for a "
                "buffer that need not be saved use register_buffer(..., persistent=False)"
            ) from None


def snapshot_state(state: TrainState, run_id: str, steps_per_epoch: int) -> StateSnapshot:
    """Return a copy of `state`. Training waits only for this: on a GPU, the host does not wait for the copies."""
    tensors: dict[str, Tensor] = {}
    names = _optimizer_names(state)
    by_name = {names[number]: entries for number, entries in state.optimizer.state_dict()["state"].items()}
    rest = _take_tensors(by_name, "", tensors)
    values = {name: getattr(state, name) for name in _COUNTERS}
    kind = type(state.optimizer).__name__  # not the settings' name of it: the class decides about the saved state
    values |= {"run_id": run_id, "steps_per_epoch": steps_per_epoch, "optimizer": kind}
    values |= {"optimizer_parameters": names, "optimizer_state": rest}
    model = state.model.state_dict()
    copies, is_copied = _copy_to_host([*model.values(), *tensors.values()])
    return StateSnapshot(
        values,
        frozenset(name for name, _ in state.model.named_parameters()),
        dict(zip(model, copies[: len(model)], strict=True)),
        dict(zip(tensors, copies[len(model) :], strict=True)),
        is_copied,
    )


def _copy_to_host(tensors: Sequence[Tensor]) -> tuple[list[Tensor], torch.cuda.Event | None]:
    """Return copies of `tensors` in host memory and, from a GPU, the event after which they are whole.

    Pinned memory and a stream of its own: the host goes on at once, and the device's next step, which changes the
    tensors, waits for the copies. Clones on the device would take three times the parameters' memory with Adam.
    """
    device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
    if device is None:
        return [tensor.detach().clone() for tensor in tensors], None
    training, copying = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    copying.wait_stream(training)
    with torch.cuda.stream(copying):
        copies = [torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda) for tensor in tensors]
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor.detach(), non_blocking=True)
        is_copied = copying.record_event()
    training.wait_event(is_copied)
    return copies, is_copied


def encode(snapshot: StateSnapshot) -> CheckpointBytes:
    """Return the bytes of a checkpoint, in any thread. Raise NonFiniteError if a parameter is not finite."""
    if snapshot.is_copied is not None:
        snapshot.is_copied.synchronize()
    for name in sorted(snapshot.parameters & snapshot.model.keys()):  # no buffers: an attention mask holds -inf
        # A finite loss and gradient can give an update that is not.
        if not snapshot.model[name].isfinite().all():
            raise NonFiniteError(
                f"{name} is not finite after step {snapshot.values['step']:,}; no checkpoint was written from it: try "
                "a smaller --optim.lr, or --optim.max-grad-norm 1"
            )
    model, optimizer = (
        save({name: tensor.contiguous() for name, tensor in tensors.items()})
        for tensors in (snapshot.model, snapshot.optimizer)
    )
    return CheckpointBytes(snapshot.values, model, optimizer)


def restore_state(state: TrainState, content: CheckpointBytes, steps_per_epoch: int) -> None:
    """Load the checkpoint `content` into `state`, bit for bit. Raise ConfigError if it does not fit the settings."""
    values = content.values
    kind = type(state.optimizer).__name__
    if values["optimizer"] != kind:
        raise ConfigError(
            f"the checkpoint's optimizer is {values['optimizer']}, the settings' {kind}; fix: --optim.name"
        )
    if values["steps_per_epoch"] != steps_per_epoch and 0 < values["epoch_steps"] < values["steps_per_epoch"]:
        raise ConfigError(
            f"the checkpoint is of step {values['epoch_steps']:,} of an epoch of {values['steps_per_epoch']:,} steps, "
            f"and now an epoch has {steps_per_epoch:,}; keep data and --data.global-batch-size, or use a checkpoint "
            "from an epoch's end"
        )
    weights = load(content.model)
    _compare_weights(weights, state.model)
    state.model.load_state_dict(weights)
    _restore_optimizer(state, values, load(content.optimizer))
    for name in _COUNTERS:
        setattr(state, name, values.get(name, getattr(state, name)))  # format 1 has no evaluations
    # At an epoch's end the next epoch may have another length, if the batch size changed: its counter must match.
    if values["epoch_steps"] == values["steps_per_epoch"]:
        state.epoch_steps = steps_per_epoch


_UNDO = "undo the change, or train from scratch in a new directory: --checkpoint.resume new"


def _compare_weights(saved: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise ConfigError that names the first weight in which the checkpoint and the model differ."""
    own = model.state_dict()
    for name in [*own, *sorted(saved.keys() - own.keys())]:
        there, here = (_describe(each.get(name)) for each in (saved, own))
        if there != here:
            raise ConfigError(f"{name} is {there} in the checkpoint, and {here} in the model; {_UNDO}")


def _restore_optimizer(state: TrainState, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Load the optimizer's state, by parameter names. Raise ConfigError that names the first one that does not fit."""
    names, saved = _optimizer_names(state), _put_tensors(values["optimizer_state"], tensors)
    if "optimizer_parameters" not in values:  # format 1 numbers parameters in the model's order
        saved = {names[int(number)]: entries for number, entries in saved.items() if int(number) < len(names)}
    before = values.get("optimizer_parameters", names)
    has_order = isinstance(state.optimizer, optim.LBFGS)  # its state is one vector over all parameters
    if before != names and (has_order or {*before} != {*names}):
        first = next((name for name in [*before, *names] if (name in before) != (name in names)), names[0])
        there, here = ("trained" if first in each else "not trained" for each in (before, names))
        order = "" if there != here else ", and the order of parameters is another one"
        raise ConfigError(f"{first} was {there} when the checkpoint was written, and is {here} now{order}; {_UNDO}")
    shapes = {name: each.shape for name, each in state.model.named_parameters()}
    for name, entries in saved.items():
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.ndim and not has_order and value.shape != shapes[name]:
                sizes = f"is {tuple(value.shape)}, and the parameter {tuple(shapes[name])}"
                raise ConfigError(f"{name}: the checkpoint's {key} {sizes}; {_UNDO}")
    # The settings' param_groups, not saved ones: a run from another's checkpoint may have another learning rate.
    groups = state.optimizer.state_dict()["param_groups"]
    by_number = {names.index(name): entries for name, entries in saved.items()}
    state.optimizer.load_state_dict({"state": by_number, "param_groups": groups})


def _optimizer_names(state: TrainState) -> list[str]:
    """Return the names of the optimizer's parameters, in the order in which its state_dict numbers them."""
    names = {id(each): name for name, each in state.model.named_parameters()}
    return [names[id(each)] for group in state.optimizer.param_groups for each in group["params"]]


def _describe(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _take_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return `value` as JSON; put each tensor in it into `tensors` and replace it by {"tensor": its name}."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        inner = {str(key): _take_tensors(item, f"{name}.{key}".strip("."), tensors) for key, item in value.items()}
        return {"entries": inner}
    if isinstance(value, list):
        return [_take_tensors(item, f"{name}.{number}", tensors) for number, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"the optimizer's state holds a {type(value).__name__} at {name}, which no checkpoint can")


def _put_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `_take_tensors`."""
    if isinstance(value, list):
        return [_put_tensors(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    return {key: _put_tensors(item, tensors) for key, item in value["entries"].items()}
