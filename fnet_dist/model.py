"""The network, 784-256-128-10, in the three forms of the cookbook chapter. A user replaces this file.

The forms name their layers alike, so each loads the others' weights.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fnet_dist.config.schema import ModelConfig

_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}
_HEADS = {"softmax": nn.Softmax, "log_softmax": nn.LogSoftmax}


def build_model(config: ModelConfig) -> nn.Module:
    """The network on the CPU, its weights drawn from torch's default random stream.

    It takes images (n, 28, 28), (n, 1, 28, 28) or (n, 784) and gives (n, 10): log-probabilities, logits or
    probabilities, as `config.head` says.
    """
    if config.form == "sequential":
        return FashionSequential(config)
    if config.form == "functional":
        return FunctionalFashionNetwork(config)
    return FashionNetwork(config)


def flatten_images(images: Tensor) -> Tensor:
    """(n, 28, 28), (n, 1, 28, 28) or (n, 784) -> (n, 784). Raises ValueError for any other shape."""
    if images.ndim > 1 and images.shape[1:] in ((784,), (28, 28), (1, 28, 28)):
        return images.reshape(-1, 784)
    raise ValueError(
        f"images of shape {tuple(images.shape)}, expected (n, 28, 28), (n, 1, 28, 28) or (n, 784); "
        "for other images replace fnet_dist/model.py"
    )


class FashionNetwork(nn.Module):
    """Modules, as recipes 2, 3 and 5 write them: `print(model)` shows the book's lines."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(784, 256)
        self.hidden2 = nn.Linear(256, 128)
        self.output = nn.Linear(128, 10)
        self.head = config.head
        if config.head in _HEADS:
            self.add_module(config.head, _HEADS[config.head](dim=1))
        self.activation = _ACTIVATIONS[config.activation]()
        self.drop = nn.Dropout(p=config.dropout) if config.dropout else None

    def forward(self, images: Tensor) -> Tensor:
        x = self.activation(self.hidden1(flatten_images(images)))
        x = x if self.drop is None else self.drop(x)
        x = self.activation(self.hidden2(x))
        x = x if self.drop is None else self.drop(x)
        x = self.output(x)
        outputs: Tensor = x if self.head == "logits" else getattr(self, self.head)(x)
        return outputs


class FunctionalFashionNetwork(nn.Module):
    """Only the layers are modules; what has no weights is a function, as in recipe 6."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(784, 256)
        self.hidden2 = nn.Linear(256, 128)
        self.output = nn.Linear(128, 10)
        self.config = config

    def forward(self, images: Tensor) -> Tensor:
        activation = F.relu if self.config.activation == "relu" else torch.tanh
        x = activation(self.hidden1(flatten_images(images)))
        x = F.dropout(x, self.config.dropout, self.training)
        x = activation(self.hidden2(x))
        x = F.dropout(x, self.config.dropout, self.training)
        x = self.output(x)
        if self.config.head == "log_softmax":
            return F.log_softmax(x, dim=1)
        return F.softmax(x, dim=1) if self.config.head == "softmax" else x

    def _get_name(self) -> str:
        return "FashionNetwork"  # the book gives both classes one name


class FashionSequential(nn.Sequential):
    """nn.Sequential with named layers, as recipe 2 suggests under "more"."""

    def __init__(self, config: ModelConfig) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["hidden1"] = nn.Linear(784, 256)
        layers["activation1"] = _ACTIVATIONS[config.activation]()
        if config.dropout:
            layers["drop1"] = nn.Dropout(p=config.dropout)
        layers["hidden2"] = nn.Linear(256, 128)
        layers["activation2"] = _ACTIVATIONS[config.activation]()
        if config.dropout:
            layers["drop2"] = nn.Dropout(p=config.dropout)
        layers["output"] = nn.Linear(128, 10)
        if config.head in _HEADS:
            layers[config.head] = _HEADS[config.head](dim=1)
        super().__init__(layers)

    def forward(self, images: Tensor) -> Tensor:
        x = flatten_images(images)
        for layer in self:
            x = layer(x)
        return x

    def _get_name(self) -> str:
        return "Sequential"
