"""What breaks the promise of the same training at any world size is said, once each; an exact run says nothing."""

import pytest
from torch import nn

from fnet_dist.config.schema import Config
from fnet_dist.model import build_model
from fnet_dist.training.caveats import reproducibility_warnings

FORMS = ("modules", "sequential", "functional")


def said(model, **parallel):
    return reproducibility_warnings(model, Config.model_validate({"parallel": parallel}))


def said_of_the_network(form, dropout):
    config = Config.model_validate({"model": {"form": form, "dropout": dropout}})
    return reproducibility_warnings(build_model(config.model), config)


@pytest.mark.parametrize("form", FORMS)
def test_an_exact_run_has_no_caveat(form):
    assert said_of_the_network(form, 0.0) == []


@pytest.mark.parametrize(
    ("model", "parallel", "what"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), {}, "BatchNorm"),
        (nn.Sequential(nn.Sequential(nn.BatchNorm1d(4))), {}, "BatchNorm"),
        (nn.Sequential(nn.Dropout2d(0.1)), {}, "dropout"),
        (nn.ReLU(), {"precision": "bf16"}, "precision bf16"),
        (nn.ReLU(), {"precision": "tf32"}, "precision tf32"),
        (nn.ReLU(), {"numerics": "bf16_gradients"}, "numerics bf16_gradients"),
    ],
)
def test_each_caveat_is_one_loud_line(model, parallel, what):
    (line,) = said(model, **parallel)
    assert line.startswith(f"WARNING: another number of ranks will not give the same training: {what} ")
    assert "\n" not in line


@pytest.mark.parametrize("form", FORMS)
def test_dropout_is_said_in_every_form_of_the_network(form):
    (line,) = said_of_the_network(form, 0.25)
    assert "dropout" in line


def test_dropout_and_norms_that_are_alike_at_any_number_of_ranks_are_not_said():
    assert said(nn.Sequential(nn.Dropout(0.0), nn.LayerNorm(4), nn.GroupNorm(2, 4))) == []


def test_several_are_said_in_a_line_each():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    assert len({*said(model, precision="bf16", numerics="bf16_gradients")}) == 4
