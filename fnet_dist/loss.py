"""The loss as a sum and a weight, so that the mean over a batch is exact however ranks split the batch."""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fnet_dist.config.recipe_sections import ClassifierLossConfig
from fnet_dist.data.datasets import Dataset
from fnet_dist.errors import ConfigError


class Loss(Protocol):
    """The interface of a loss. A loss of your own is any function `loss(outputs, targets) -> (sum, weight)`.

    Both are 0-dim tensors on the device of `outputs`. The trainer divides the sum over the global batch by the weight
    over the global batch. A loss with an attribute `weight_is_count = True` promises that the weight is the number of
    samples, which saves one small all-reduce a step. An nn.Module is moved to the device; it may have no parameters.
    """

    def __call__(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]: ...


def build_classifier_loss(config: ClassifierLossConfig, train_data: Dataset) -> "ClassifierLoss":
    """Return the negative log-likelihood or the cross-entropy; with class weights its mean is torch's weighted mean.

    Raise ConfigError if there are class weights for another number of classes than `train_data` has.
    """
    weights, classes = config.class_weights, len(train_data.info.class_names)
    if weights is not None and len(weights) != classes:
        raise ConfigError(f"loss.class_weights has {len(weights)} numbers, the data {classes} classes")
    # float64: forward rounds the weights once, to the type of the outputs.
    class_weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    return ClassifierLoss(config.name, class_weights, config.label_smoothing)


class ClassifierLoss(nn.Module):
    """A Loss of outputs (n, classes, ...) and targets int64 (n, ...).

    The weight is the number of targets, or with class weights the sum of the targets' weights: what torch.nn.NLLLoss
    and CrossEntropyLoss with reduction="mean" divide by.
    """

    class_weights: Tensor | None

    def __init__(self, name: str, class_weights: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.name = name
        self.label_smoothing = label_smoothing
        self.weight_is_count = class_weights is None
        self.register_buffer("class_weights", class_weights)

    def forward(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed loss and the weight to divide it by."""
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
