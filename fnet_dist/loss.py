"""The loss as a sum and a weight, so that the mean over a batch is exact however ranks split the batch."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fnet_dist.config.schema import LossConfig


class Loss(Protocol):
    """The interface of a loss. A loss of your own is any function `loss(outputs, targets) -> (sum, weight)`.

    Both are 0-dim tensors on the device of `outputs`. The trainer divides the sum over the global batch by the weight
    over the global batch. A loss with an attribute `weight_is_count = True` promises weight == len(targets), which
    saves one small all-reduce a step.
    """

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]: ...


def build_loss(config: LossConfig, device: torch.device | None = None) -> "ClassifierLoss":
    """Return the negative log-likelihood or the cross-entropy; with class weights its mean is torch's weighted mean."""
    weights = config.class_weights
    # float64: __call__ rounds the weights once, to the type of the outputs.
    class_weights = None if weights is None else torch.tensor(weights, dtype=torch.float64, device=device)
    return ClassifierLoss(config.name, class_weights, config.label_smoothing)


@dataclass(frozen=True)
class ClassifierLoss:
    """A Loss of outputs (n, classes) and targets int64 (n,).

    The weight is n, or with class weights the sum of the targets' weights: what torch.nn.NLLLoss and CrossEntropyLoss
    with reduction="mean" divide by.
    """

    name: str
    class_weights: Tensor | None = None
    label_smoothing: float = 0.0

    @property
    def weight_is_count(self) -> bool:
        """Return True if the weight is the number of samples."""
        return self.class_weights is None

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if outputs.dtype == torch.bfloat16:  # under autocast: a sum needs more than bf16's 8 bits
            outputs = outputs.float()
        weights = None if self.class_weights is None else self.class_weights.to(outputs.dtype)
        if self.name == "nll":
            total = F.nll_loss(outputs, targets, weights, reduction="sum")
        else:
            total = F.cross_entropy(outputs, targets, weights, reduction="sum", label_smoothing=self.label_smoothing)
        if weights is None:
            return total, total.new_full((), len(targets))
        return total, weights[targets].sum()
