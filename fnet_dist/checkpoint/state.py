"""Convert the state of training into a checkpoint's bytes and back, bit for bit.

No generator's state is saved: random streams derive from counters. Nothing is pickled, because unpickling a file runs
the code in it. Tensors become safetensors; the rest of an optimizer's state (the numbers and lists of LBFGS) becomes
JSON that refers to its tensors by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load, save
from torch import Tensor, nn, optim

from fnet_dist.checkpoint.storage import CheckpointBytes
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
    window_steps: int = 1  # length of the next window, as rank 0 has set it for all ranks

    def next_epoch(self) -> None:
        """Advance to the next epoch and reset its counters."""
        self.epoch += 1
        self.epoch_steps, self.epoch_loss_sum, self.epoch_samples, self.epoch_seconds = 0, 0.0, 0, 0.0


# `window_steps` is left out: it is timing of this machine, and a resumed run measures it again.
_COUNTERS = tuple(name for name in TrainState.__annotations__ if name not in ("model", "optimizer", "window_steps"))


@dataclass(frozen=True)
class StateSnapshot:
    """A copy of a TrainState at one step: tensors on their device, everything small in `values`."""

    values: dict[str, Any]
    parameters: frozenset[str]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def snapshot_state(state: TrainState, run_id: str, steps_per_epoch: int) -> StateSnapshot:
    """Return a copy of `state`. Training waits only for this: clones on the device, without a copy to the host."""
    tensors: dict[str, Tensor] = {}
    rest = _take_tensors(state.optimizer.state_dict()["state"], "", tensors)
    values = {name: getattr(state, name) for name in _COUNTERS}
    kind = type(state.optimizer).__name__  # not the settings' name of it: the class decides about the saved state
    values |= {"run_id": run_id, "steps_per_epoch": steps_per_epoch, "optimizer": kind, "optimizer_state": rest}
    return StateSnapshot(
        values,
        frozenset(name for name, _ in state.model.named_parameters()),
        {name: tensor.detach().clone() for name, tensor in state.model.state_dict().items()},
        {name: tensor.detach().clone() for name, tensor in tensors.items()},
    )


def encode(snapshot: StateSnapshot) -> CheckpointBytes:
    """Return the bytes of a checkpoint, in any thread. Raise NonFiniteError if a parameter is not finite."""
    for name in sorted(snapshot.parameters & snapshot.model.keys()):  # no buffers: an attention mask holds -inf
        # A finite loss and gradient can give an update that is not.
        if not snapshot.model[name].isfinite().all():
            raise NonFiniteError(
                f"{name} is not finite after step {snapshot.values['step']:,}; no checkpoint was written from it: try "
                "a smaller --optim.lr, or --optim.max-grad-norm 1"
            )
    model, optimizer = (
        save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
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
    try:
        state.model.load_state_dict(load(content.model))
    except RuntimeError as error:
        lines = " ".join(str(error).split())[:300]
        raise ConfigError(f"the checkpoint's weights do not fit the model: {lines}") from None
    saved = _put_tensors(values["optimizer_state"], load(content.optimizer))
    # The settings' param_groups, not saved ones: a run from another's checkpoint may have another learning rate.
    groups = state.optimizer.state_dict()["param_groups"]
    by_number = {int(number): entries for number, entries in saved.items()}  # JSON made the keys strings
    state.optimizer.load_state_dict({"state": by_number, "param_groups": groups})
    for name in _COUNTERS:
        setattr(state, name, values[name])
    # At an epoch's end the next epoch may have another length, if the batch size changed: its counter must match.
    if values["epoch_steps"] == values["steps_per_epoch"]:
        state.epoch_steps = steps_per_epoch


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
