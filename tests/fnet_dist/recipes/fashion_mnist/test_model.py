"""The network of each recipe of the book: the lines it prints, and the same function in three forms."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fnet_dist.recipes.fashion_mnist.model import build_model
from fnet_dist.recipes.fashion_mnist.settings import ModelConfig

FORMS = ("modules", "sequential", "functional")
LAYERS = """\
  (hidden1): Linear(in_features=784, out_features=256, bias=True)
  (hidden2): Linear(in_features=256, out_features=128, bias=True)
  (output): Linear(in_features=128, out_features=10, bias=True)
"""


def build(seed=0, **settings):
    torch.manual_seed(seed)
    return build_model(ModelConfig(**settings))


@pytest.fixture(scope="module")
def images():
    return torch.rand(12, 28, 28, generator=torch.Generator().manual_seed(1)) * 2 - 1


class Book(nn.Module):
    """Recipes 2, 3 and 5 as the book prints them, except that softmax gets its dimension, as torch now requires."""

    def __init__(self, head, dropout):
        super().__init__()
        self.hidden1 = nn.Linear(784, 256)
        self.hidden2 = nn.Linear(256, 128)
        self.output = nn.Linear(128, 10)
        if head == "softmax":
            self.softmax = nn.Softmax(dim=1)
        else:
            self.log_softmax = nn.LogSoftmax(dim=1)
        self.activation = nn.ReLU()
        if dropout:
            self.drop = nn.Dropout(p=0.25)

    def forward(self, x):
        drop = self.drop if hasattr(self, "drop") else nn.Identity()
        x = self.hidden1(x)
        x = self.activation(x)
        x = drop(x)
        x = self.hidden2(x)
        x = self.activation(x)
        x = drop(x)
        x = self.output(x)
        return self.softmax(x) if hasattr(self, "softmax") else self.log_softmax(x)


class BookFunctional(nn.Module):
    """Recipe 6."""

    def __init__(self):
        super().__init__()
        self.hidden1 = nn.Linear(784, 256)
        self.hidden2 = nn.Linear(256, 128)
        self.output = nn.Linear(128, 10)

    def forward(self, x):
        x = F.relu(self.hidden1(x))
        x = F.relu(self.hidden2(x))
        return F.log_softmax(self.output(x), dim=1)


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        ({"head": "softmax"}, LAYERS + "  (softmax): Softmax(dim=1)\n  (activation): ReLU()\n"),
        ({"head": "softmax", "activation": "tanh"}, LAYERS + "  (softmax): Softmax(dim=1)\n  (activation): Tanh()\n"),
        ({}, LAYERS + "  (log_softmax): LogSoftmax(dim=1)\n  (activation): ReLU()\n"),
        (
            {"dropout": 0.25},
            f"{LAYERS}  (log_softmax): LogSoftmax(dim=1)\n  (activation): ReLU()\n"
            "  (drop): Dropout(p=0.25, inplace=False)\n",
        ),
        ({"head": "logits"}, LAYERS + "  (activation): ReLU()\n"),
        ({"form": "functional", "dropout": 0.25}, LAYERS),
    ],
    ids=["recipe 2", "recipe 2 with tanh", "recipe 3", "recipe 5", "logits", "recipe 6"],
)
def test_printing_the_model_shows_the_lines_of_the_book(settings, lines):
    assert str(build(**settings)) == f"FashionNetwork(\n{lines})"


def test_printing_the_sequential_form_shows_the_layers_in_order():
    assert str(build(form="sequential", dropout=0.25)) == (
        "Sequential(\n"
        "  (hidden1): Linear(in_features=784, out_features=256, bias=True)\n"
        "  (activation1): ReLU()\n"
        "  (drop1): Dropout(p=0.25, inplace=False)\n"
        "  (hidden2): Linear(in_features=256, out_features=128, bias=True)\n"
        "  (activation2): ReLU()\n"
        "  (drop2): Dropout(p=0.25, inplace=False)\n"
        "  (output): Linear(in_features=128, out_features=10, bias=True)\n"
        "  (log_softmax): LogSoftmax(dim=1)\n"
        ")"
    )
    assert isinstance(build(form="sequential"), nn.Sequential)


@pytest.mark.parametrize(
    ("book", "settings"),
    [
        (lambda: Book("softmax", dropout=False), {"head": "softmax"}),
        (lambda: Book("log_softmax", dropout=False), {}),
        (lambda: Book("log_softmax", dropout=True), {"dropout": 0.25}),
        (BookFunctional, {"form": "functional"}),
    ],
    ids=["recipe 2", "recipe 3", "recipe 5", "recipe 6"],
)
def test_each_recipe_starts_and_computes_as_the_book_does(book, settings, images):
    torch.manual_seed(4)
    theirs, ours = book(), build(seed=4, **settings)
    for (name, weights), (our_name, our_weights) in zip(
        theirs.state_dict().items(), ours.state_dict().items(), strict=True
    ):
        assert name == our_name
        assert torch.equal(weights, our_weights)
    outputs = []
    for model in (theirs, ours):
        torch.manual_seed(5)
        outputs.append(model(images.reshape(-1, 784)))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("training", [False, True], ids=["in evaluation", "in training"])
@pytest.mark.parametrize("head", ["log_softmax", "logits", "softmax"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_all_forms_load_each_others_weights_and_give_the_same_output(activation, head, training, images):
    models = [build(seed, form=form, activation=activation, head=head, dropout=0.25) for seed, form in enumerate(FORMS)]
    for source in models:
        outputs = []
        for model in models:
            model.load_state_dict(source.state_dict())
            model.train(training)
            torch.manual_seed(6)
            outputs.append(model(images))
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("form", FORMS)
def test_three_shapes_of_images_give_the_same_output(form, images):
    model = build(form=form)
    outputs = [model(images.reshape(12, *shape)) for shape in ((28, 28), (1, 28, 28), (784,))]
    assert outputs[0].shape == (12, 10)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape", [(2, 27, 28), (2, 3, 28, 28), (2, 28, 28, 1), (784,), (28, 28), (2, 783), (4, 14, 14), ()], ids=str
)
def test_images_of_any_other_shape_raise_with_both_shapes(form, shape):
    with pytest.raises(ValueError, match=r"expected \(n, 28, 28\), \(n, 1, 28, 28\) or \(n, 784\)") as caught:
        build(form=form)(torch.zeros(shape))
    assert f"images of shape {shape}" in str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_dropout_zeroes_a_quarter_of_both_hidden_layers_in_training_only(form, images):
    plain, with_dropout = build(form=form, head="logits"), build(form=form, head="logits", dropout=0.25)
    with_dropout.eval()
    assert torch.equal(with_dropout(images), plain(images))
    with_dropout.train()
    assert not torch.equal(with_dropout(images), with_dropout(images))
    inputs_of = {}
    for name, layer in (("hidden2", with_dropout.hidden2), ("output", with_dropout.output)):
        layer.register_forward_pre_hook(lambda module, inputs, name=name: inputs_of.update({name: inputs[0]}))
    for layer in (with_dropout.hidden1, with_dropout.hidden2):
        nn.init.ones_(layer.bias)
        nn.init.zeros_(layer.weight)
    with_dropout(images.repeat(100, 1, 1))
    for name, values in inputs_of.items():
        assert {round(value, 4) for value in values.unique().tolist()} == {0.0, 1.3333}, name
        assert abs((values == 0).double().mean().item() - 0.25) < 0.01, name


@pytest.mark.parametrize("form", FORMS)
def test_the_heads_are_probabilities_their_logarithms_and_logits(form, images):
    outputs = {head: build(form=form, head=head)(images) for head in ("softmax", "log_softmax", "logits")}
    assert torch.allclose(outputs["softmax"].sum(dim=1), torch.ones(12))
    assert torch.allclose(outputs["log_softmax"].exp(), outputs["softmax"])
    assert torch.equal(F.log_softmax(outputs["logits"], dim=1), outputs["log_softmax"])
