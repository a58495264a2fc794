"""Everything that makes training depend on the number of ranks gets one warning; an exact run gets none."""

import pytest
from torch import nn

from fnet_dist.recipes.fashion_mnist.model import build_model
from fnet_dist.training.reproducibility import reproducibility_warnings
from tests.helpers.config import FashionConfig

FORMS = ("modules", "sequential", "functional")


def warnings_of(model, **parallel):
    return reproducibility_warnings(model, FashionConfig.model_validate({"parallel": parallel}))


def warnings_of_the_network(form, dropout):
    config = FashionConfig.model_validate({"model": {"form": form, "dropout": dropout}})
    return reproducibility_warnings(build_model(config.model), config)


@pytest.mark.parametrize("form", FORMS)
def test_an_exact_run_has_no_warning(form):
    assert warnings_of_the_network(form, 0.0) == []


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
def test_each_cause_gives_one_line(model, parallel, what):
    (line,) = warnings_of(model, **parallel)
    assert line.startswith(f"another number of ranks will not give the same training: {what} ")
    assert "\n" not in line


@pytest.mark.parametrize("form", FORMS)
def test_dropout_is_found_in_every_form_of_the_network(form):
    (line,) = warnings_of_the_network(form, 0.25)
    assert "dropout" in line


def test_layers_that_do_not_depend_on_the_number_of_ranks_give_no_warning():
    assert warnings_of(nn.Sequential(nn.Dropout(0.0), nn.LayerNorm(4), nn.GroupNorm(2, 4))) == []


def test_several_causes_give_one_line_each():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    assert len({*warnings_of(model, precision="bf16", numerics="bf16_gradients")}) == 4
