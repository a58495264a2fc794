"""Metrics of an evaluation, as sums over samples: exact whatever ranks and batches they are computed in. No torch here.

A metric of your own is any object with the three members of `Metrics`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Direction = Literal["higher", "lower"]


class Metrics(Protocol):
    """The interface of metrics: sums of each batch, and values of the sums over all batches of all ranks."""

    @property
    def better(self) -> Mapping[str, Direction]:
        """The name of each value, and whether a higher or a lower one is better."""
        ...

    def sums(self, outputs: "Tensor", targets: "Tensor") -> Mapping[str, "Tensor"]:
        """Return sums over the batch, each a 0-dim tensor, always under the same names."""
        ...

    def values(self, sums: Mapping[str, float]) -> Mapping[str, float]:
        """Return the value of each name in `better`, given the sums over the whole data set."""
        ...


@dataclass(frozen=True)
class Classification:
    """Accuracy, and for each k in `top` the fraction of targets among the k largest outputs, as "top5".

    Outputs are (..., classes), targets integers (...). Targets equal to `ignore` are not counted.
    """

    top: tuple[int, ...] = ()
    ignore: int = -100

    @property
    def better(self) -> Mapping[str, Direction]:
        """Higher is better."""
        return dict.fromkeys(("accuracy", *(f"top{k}" for k in self.top)), "higher")

    def sums(self, outputs: "Tensor", targets: "Tensor") -> Mapping[str, "Tensor"]:
        """Return the number of right predictions, and of targets."""
        counted = targets != self.ignore
        # argmax, not topk: of equal outputs both take any, and a table of predictions is made by argmax.
        sums = {"accuracy": ((outputs.argmax(dim=-1) == targets) & counted).sum(), "count": counted.sum()}
        for k in self.top:
            found = (outputs.topk(k, dim=-1).indices == targets.unsqueeze(-1)).any(dim=-1)
            sums[f"top{k}"] = (found & counted).sum()
        return sums

    def values(self, sums: Mapping[str, float]) -> Mapping[str, float]:
        """Return fractions of the targets."""
        return {name: _ratio(sums[name], sums["count"]) for name in self.better}


@dataclass(frozen=True)
class Regression:
    """Root mean square error, mean absolute error and R2, over all elements of targets of any shape."""

    @property
    def better(self) -> Mapping[str, Direction]:
        """Lower errors and a higher R2 are better."""
        return {"rmse": "lower", "mae": "lower", "r2": "higher"}

    def sums(self, outputs: "Tensor", targets: "Tensor") -> Mapping[str, "Tensor"]:
        """Return sums in float64. Raise ValueError if the shapes differ: torch would broadcast them in silence."""
        if outputs.shape != targets.shape:
            raise ValueError(f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} differ in shape")
        expected = targets.double()
        error = outputs.double() - expected
        return {
            "count": error.new_full((), error.numel()),
            "squares": error.square().sum(),
            "absolute": error.abs().sum(),
            "target": expected.sum(),
            "target_squares": expected.square().sum(),
        }

    def values(self, sums: Mapping[str, float]) -> Mapping[str, float]:
        """Return the three figures; R2 is NaN if all targets are equal."""
        count, squares = sums["count"], sums["squares"]
        spread = sums["target_squares"] - sums["target"] ** 2 / count if count else 0.0
        return {
            "rmse": math.sqrt(_ratio(squares, count)),
            "mae": _ratio(sums["absolute"], count),
            "r2": 1 - _ratio(squares, spread),
        }


@dataclass(frozen=True)
class Language:
    """Perplexity of logits (..., vocabulary) for targets (...), tokens; those equal to `ignore` are not counted."""

    ignore: int = -100

    @property
    def better(self) -> Mapping[str, Direction]:
        """Lower is better."""
        return {"perplexity": "lower"}

    def sums(self, outputs: "Tensor", targets: "Tensor") -> Mapping[str, "Tensor"]:
        """Return the summed cross-entropy in nats and the number of tokens."""
        from torch.nn.functional import cross_entropy

        logits, tokens = outputs.flatten(0, -2), targets.flatten()
        if logits.dtype.itemsize < 4:  # under autocast: a sum needs more than 16 bits
            logits = logits.float()
        nats = cross_entropy(logits, tokens, reduction="sum", ignore_index=self.ignore)
        return {"nats": nats, "tokens": (tokens != self.ignore).sum()}

    def values(self, sums: Mapping[str, float]) -> Mapping[str, float]:
        """Return e to the mean cross-entropy; infinity where that overflows."""
        mean = _ratio(sums["nats"], sums["tokens"])
        return {"perplexity": math.exp(mean) if mean < 700 else math.inf}


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan


def directions(metrics: Sequence[Metrics]) -> dict[str, Direction]:
    """Return {name: "higher" or "lower"} of all metrics, in order."""
    return {name: direction for each in metrics for name, direction in each.better.items()}
