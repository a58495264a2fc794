"""The loss as a sum and its weight, so that a mean over any split of a batch can be put together exactly."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fnet_dist.config.schema import LossConfig


class Loss(Protocol):
    """What the trainer asks of a loss; a user's own is any function of this shape.

    `loss(outputs, targets) -> (sum, weight)`, two 0-dim tensors on the device of `outputs`: the trainer divides the
    sum over the global batch by the weight over the global batch. A function that has an attribute
    `weight_is_count = True` promises weight == len(targets), which spares one small all-reduce a step.
    """

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]: ...


def build_loss(config: LossConfig, device: torch.device | None = None) -> "ClassifierLoss":
    """Negative log-likelihood or cross-entropy; its mean with class weights is torch's weighted mean."""
    weights = (
        None if config.class_weights is None else torch.tensor(config.class_weights, dtype=torch.float64, device=device)
    )
    return ClassifierLoss(config.name, weights, config.label_smoothing)


@dataclass(frozen=True)
class ClassifierLoss:
    """Callable: outputs (n, classes), targets int64 (n,) -> (sum, weight), 0-dim tensors.

    The weight is n, or with class weights the sum of the targets' weights, as torch.nn.NLLLoss and CrossEntropyLoss
    (reduction="mean") divide by.
    """

    name: str
    class_weights: Tensor | None = None
    label_smoothing: float = 0.0

    @property
    def weight_is_count(self) -> bool:
        return self.class_weights is None

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if outputs.dtype == torch.bfloat16:  # logits under autocast: sums need more than 8 bits
            outputs = outputs.float()
        weights = None if self.class_weights is None else self.class_weights.to(outputs.dtype)
        if self.name == "nll":
            total = F.nll_loss(outputs, targets, weights, reduction="sum")
        else:
            total = F.cross_entropy(outputs, targets, weights, reduction="sum", label_smoothing=self.label_smoothing)
        if weights is None:
            return total, total.new_full((), len(targets))
        return total, weights[targets].sum()
