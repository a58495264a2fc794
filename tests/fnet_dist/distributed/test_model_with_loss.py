"""Compiling without a compiler is refused in one line, before the first step."""

import pytest
import torch
from torch._inductor import config as inductor

from fnet_dist.config.schema import ParallelConfig
from fnet_dist.distributed.model_with_loss import build_model_with_loss
from fnet_dist.errors import ConfigError
from fnet_dist.recipes.fashion_mnist.model import build_model
from fnet_dist.recipes.fashion_mnist.settings import LossConfig, ModelConfig
from tests.helpers.training import classifier_loss


def test_a_torch_that_has_moved_its_search_for_a_compiler_still_compiles(monkeypatch):
    parts = build_model(ModelConfig()), classifier_loss(LossConfig()), ParallelConfig(compile=True), torch.device("cpu")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)  # it needs the name itself
    monkeypatch.delattr("torch._inductor.cpp_builder.get_cpp_compiler")
    build_model_with_loss(*parts)


def test_compiling_without_a_compiler_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    parts = build_model(ModelConfig()), classifier_loss(LossConfig()), ParallelConfig(compile=True), torch.device("cpu")
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler: .*no-such-compiler.*; install one") as found:
        build_model_with_loss(*parts)
    assert "\n" not in str(found.value)
