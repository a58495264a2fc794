"""The state of training: what resuming needs, into a checkpoint's bytes and back to the same bits.

No generator's state is among it: random streams derive from counters. No pickle is ever read: tensors travel as
safetensors, and what else an optimizer keeps (LBFGS's numbers and lists) as JSON that names its tensors.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load, save
from torch import Tensor, nn, optim

from fnet_dist.checkpoint.storage import CheckpointBytes
from fnet_dist.errors import ConfigError, NonFiniteError


@dataclass
class TrainState:
    """The one mutable object of a run: weights, optimizer and counters. The schedule is a function of the step."""

    model: nn.Module
    optimizer: optim.Optimizer
    epoch: int = 1  # the epoch in progress, from 1
    step: int = 0  # optimizer steps done
    samples: int = 0  # samples seen, over all epochs
    epoch_steps: int = 0  # steps done in this epoch
    epoch_loss_sum: float = 0.0  # of this epoch's step losses
    epoch_samples: int = 0  # seen in this epoch
    epoch_seconds: float = 0.0  # spent training in this epoch
    window_steps: int = 1  # length of the next window, as rank 0 told all ranks

    def next_epoch(self) -> None:
        """Go on to the epoch after this one."""
        self.epoch += 1
        self.epoch_steps, self.epoch_loss_sum, self.epoch_samples, self.epoch_seconds = 0, 0.0, 0, 0.0


_COUNTERS = tuple(
    field.name for field in dataclasses.fields(TrainState) if field.name not in ("model", "optimizer", "window_steps")
)


@dataclass(frozen=True)
class StateSnapshot:
    """A TrainState that stands still: its tensors are copies on the device, `values` what is small."""

    values: dict[str, Any]
    parameters: frozenset[str]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def snapshot_state(state: TrainState, run_id: str, steps_per_epoch: int) -> StateSnapshot:
    """What the training loop waits for in a save: copying on the device, nothing else."""
    tensors: dict[str, Tensor] = {}
    rest = _take_tensors(state.optimizer.state_dict()["state"], "", tensors)
    values = {name: getattr(state, name) for name in _COUNTERS}
    kind = type(state.optimizer).__name__
    values |= {"run_id": run_id, "steps_per_epoch": steps_per_epoch, "optimizer": kind, "optimizer_state": rest}
    return StateSnapshot(
        values,
        frozenset(name for name, _ in state.model.named_parameters()),
        {name: tensor.detach().clone() for name, tensor in state.model.state_dict().items()},
        {name: tensor.detach().clone() for name, tensor in tensors.items()},
    )


def encode(copy: StateSnapshot) -> CheckpointBytes:
    """The bytes of a checkpoint; may run in another thread.

    Raises NonFiniteError if a parameter is not finite (a buffer may be: masks hold -inf): a finite loss and gradient
    can end in an update that is not.
    """
    for name in sorted(copy.parameters & copy.model.keys()):
        if not copy.model[name].isfinite().all():
            raise NonFiniteError(
                f"{name} is not finite after step {copy.values['step']:,}; no checkpoint was written from it: try a "
                "smaller --optim.lr, or --optim.max-grad-norm 1"
            )
    model, optimizer = (
        save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        for tensors in (copy.model, copy.optimizer)
    )
    return CheckpointBytes(copy.values, model, optimizer)


def restore_state(state: TrainState, content: CheckpointBytes, steps_per_epoch: int) -> None:
    """Put `state` where the checkpoint was taken, to the bit.

    Raises ConfigError if model, optimizer or the epoch's length are not those that were saved.
    """
    values = content.values
    kind = type(state.optimizer).__name__
    if values["optimizer"] != kind:
        raise ConfigError(
            f"the checkpoint's optimizer is {values['optimizer']}, the settings' {kind}; fix: --optim.name"
        )
    if values["steps_per_epoch"] != steps_per_epoch and 0 < values["epoch_steps"] < values["steps_per_epoch"]:
        raise ConfigError(
            f"the checkpoint stands at step {values['epoch_steps']:,} of an epoch of {values['steps_per_epoch']:,} "
            f"steps, and now an epoch has {steps_per_epoch:,}; keep data and --data.global-batch-size, or take a "
            "checkpoint from an epoch's end"
        )
    try:
        state.model.load_state_dict(load(content.model))
    except RuntimeError as error:
        lines = " ".join(str(error).split())[:300]
        raise ConfigError(f"the checkpoint's weights do not fit the model: {lines}") from None
    saved = _put_tensors(values["optimizer_state"], load(content.optimizer))
    state.optimizer.load_state_dict(
        {
            "state": {int(number): entries for number, entries in saved.items()},
            "param_groups": state.optimizer.state_dict()["param_groups"],
        }
    )
    for name in _COUNTERS:
        setattr(state, name, values[name])
    if values["epoch_steps"] == values["steps_per_epoch"]:
        state.epoch_steps = steps_per_epoch


def _take_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, each tensor in it replaced by {"tensor": its name} and put into `tensors`."""
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
    """What `_take_tensors` took apart."""
    if isinstance(value, list):
        return [_put_tensors(item, tensors) for item in value]
    if isinstance(value, dict) and "tensor" in value:
        return tensors[value["tensor"]]
    if isinstance(value, dict):
        return {key: _put_tensors(item, tensors) for key, item in value["entries"].items()}
    return value
