"""The network, 784-256-128-10, in the three forms of the cookbook chapter.

The forms give their layers the same names, so that each loads the others' weights.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fnet_dist.recipes.fashion_mnist.settings import ModelConfig

_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}
_HEADS = {"softmax": nn.Softmax, "log_softmax": nn.LogSoftmax}  # "logits" adds no layer


def build_model(config: ModelConfig) -> nn.Module:
    """Return the network on the CPU, its weights drawn from torch's default random stream.

    It maps images (n, 28, 28), (n, 1, 28, 28) or (n, 784) to (n, 10): log-probabilities, logits or probabilities, as
    `config.head` says.
    """
    forms = {"sequential": FashionSequential, "functional": FunctionalFashionNetwork}
    return forms.get(config.form, FashionNetwork)(config)


def flatten_images(images: Tensor) -> Tensor:
    """Reshape (n, 28, 28), (n, 1, 28, 28) or (n, 784) to (n, 784). Raise ValueError for any other shape."""
    if images.ndim > 1 and images.shape[1:] in ((784,), (28, 28), (1, 28, 28)):
        return images.reshape(-1, 784)
    raise ValueError(
        f"images of shape {tuple(images.shape)}, expected (n, 28, 28), (n, 1, 28, 28) or (n, 784); "
        "for other images write a recipe (fnet_dist/recipes/README.md)"
    )


class FashionNetwork(nn.Module):
    """The network of modules, as in recipes 2, 3 and 5 of the book; `print(model)` shows the book's lines."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(784, 256)
        self.hidden2 = nn.Linear(256, 128)
        self.output = nn.Linear(128, 10)
        self.head = config.head
        if config.head in _HEADS:
            self.add_module(config.head, _HEADS[config.head](dim=1))
        self.activation = _ACTIVATIONS[config.activation]()
        self.drop = nn.Dropout(p=config.dropout) if config.dropout else None  # None: `print` shows no such line

    def forward(self, images: Tensor) -> Tensor:
        x = flatten_images(images)
        for layer in (self.hidden1, self.hidden2):
            x = self.activation(layer(x))
            x = x if self.drop is None else self.drop(x)
        x = self.output(x)
        outputs: Tensor = x if self.head == "logits" else getattr(self, self.head)(x)
        return outputs


class FunctionalFashionNetwork(nn.Module):
    """The network of recipe 6: layers are modules, everything without weights is a function."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(784, 256)
        self.hidden2 = nn.Linear(256, 128)
        self.output = nn.Linear(128, 10)
        self.config = config

    def forward(self, images: Tensor) -> Tensor:
        activation = F.relu if self.config.activation == "relu" else torch.tanh
        x = flatten_images(images)
        for layer in (self.hidden1, self.hidden2):
            x = F.dropout(activation(layer(x)), self.config.dropout, self.training)
        x = self.output(x)
        if self.config.head == "log_softmax":
            return F.log_softmax(x, dim=1)
        return F.softmax(x, dim=1) if self.config.head == "softmax" else x

    def _get_name(self) -> str:
        return "FashionNetwork"  # in print(model): the book gives both classes this name


class FashionSequential(nn.Sequential):
    """The network as nn.Sequential with named layers, as recipe 2 suggests under "more"."""

    def __init__(self, config: ModelConfig) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (inputs, outputs) in enumerate([(784, 256), (256, 128)], start=1):
            layers[f"hidden{number}"] = nn.Linear(inputs, outputs)
            layers[f"activation{number}"] = _ACTIVATIONS[config.activation]()
            if config.dropout:
                layers[f"drop{number}"] = nn.Dropout(p=config.dropout)
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
