"""A recipe is tried before step 1; one that cannot train is refused in one line that says what to do."""

import pytest
import torch
from torch import nn

from fnet_dist.data.datasets import DatasetInfo, InMemoryDataset
from fnet_dist.data.sampler import GlobalBatchSampler
from fnet_dist.distributed.process_group import Group
from fnet_dist.errors import ConfigError, FnetError
from fnet_dist.optim import build_optimizer
from fnet_dist.recipes import fashion_mnist
from fnet_dist.training.build import build_parts, check_parts
from fnet_dist.training.reproducibility import reproducibility_warnings
from fnet_dist.training.setup import TrainTestData
from tests.helpers.config import FashionConfig

CPU = torch.device("cpu")
ALONE = Group(0, 1, CPU)
CLASSES = tuple("abcdefghij")


def parts_for(monkeypatch, model, count=33, batch=16, loss=None, **sections):
    """Return the parts and the sampler of a run of `model` on so many random samples."""
    monkeypatch.setattr(fashion_mnist, "build_model", lambda config, train_data: model)
    if loss is not None:
        monkeypatch.setattr(fashion_mnist, "build_loss", lambda config, train_data: loss)
    data = InMemoryDataset(torch.randn(count, 8), torch.arange(count) % 10, CPU, DatasetInfo("random", "", CLASSES))
    config = FashionConfig.model_validate({"data": {"global_batch_size": batch}, **sections})
    sampler = GlobalBatchSampler(data, global_batch_size=batch, drop_last=config.data.drop_last)
    return build_parts(config, ALONE, TrainTestData(data, data), sampler), sampler


def network(*layers):
    return nn.Sequential(nn.Linear(8, 10), *layers, nn.LogSoftmax(dim=1))


def test_one_test_batch_runs_before_step_1(monkeypatch):
    class Broken(nn.Linear):
        def forward(self, x):
            raise IndexError("no such pixel")

    parts, sampler = parts_for(monkeypatch, nn.Sequential(Broken(8, 10)))
    with pytest.raises(FnetError, match=r"^first test batch: \S+:\d+: IndexError: no such pixel"):
        check_parts(parts, ALONE, sampler)


def test_a_model_that_no_checkpoint_can_hold_is_refused_before_step_1(monkeypatch):
    model = network()
    model.register_buffer("adjacency", torch.eye(3).to_sparse())
    parts, sampler = parts_for(monkeypatch, model)
    with pytest.raises(FnetError, match=r"^the model's adjacency is sparse_coo float32 \(3, 3\), which no "):
        check_parts(parts, ALONE, sampler)


def test_a_weight_that_is_not_the_count_as_promised_is_refused(monkeypatch):
    def loss(outputs, targets):
        return outputs.sum(), outputs.new_full((), 2.0 * len(targets))

    loss.weight_is_count = True
    parts, sampler = parts_for(monkeypatch, network(), loss=loss)
    with pytest.raises(FnetError, match=r"weight_is_count True, and returned weight 32 for 16 samples"):
        check_parts(parts, ALONE, sampler)


def test_batchnorm_with_one_sample_in_the_last_batch_is_refused_and_drop_last_helps(monkeypatch):
    model = network(nn.BatchNorm1d(10))
    before = model[1].running_mean.clone()
    parts, sampler = parts_for(monkeypatch, model)
    assert (sampler.steps_per_epoch, sampler.last_local_batches) == (3, {1})
    with pytest.raises(FnetError, match=r"last global batch has 1 samples.*--data.drop-last true"):
        check_parts(parts, ALONE, sampler)
    assert torch.equal(model[1].running_mean, before)
    parts, sampler = parts_for(monkeypatch, model, data={"global_batch_size": 16, "drop_last": True})
    assert (sampler.steps_per_epoch, sampler.last_local_batches) == (2, {16})
    check_parts(parts, ALONE, sampler)
    check_parts(*_first(parts_for(monkeypatch, network())))  # no BatchNorm: one sample is enough


def _first(parts_and_sampler):
    parts, sampler = parts_and_sampler
    return parts, ALONE, sampler


def test_frozen_and_synchronised_batchnorm_give_no_warning():
    class Frozen(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    config = FashionConfig()
    assert reproducibility_warnings(nn.Sequential(Frozen(3), nn.SyncBatchNorm(3)), config) == []
    assert len(reproducibility_warnings(nn.Sequential(nn.BatchNorm1d(3)), config)) == 1


def test_synchronised_batchnorm_is_refused_on_cpus(monkeypatch):
    with pytest.raises(FnetError, match=r"parallel.sync_batchnorm: .* works on GPUs only"):
        parts_for(monkeypatch, network(), parallel={"sync_batchnorm": True})


def test_the_monitor_is_a_metric_or_the_loss(monkeypatch):
    assert parts_for(monkeypatch, network())[0].monitor == "accuracy"
    assert parts_for(monkeypatch, network(), run={"monitor": "loss"})[0].monitor == "loss"
    with pytest.raises(ConfigError, match=r"run.monitor: got 'recall', expected one of loss, accuracy"):
        parts_for(monkeypatch, network(), run={"monitor": "recall"})


def groups_of(model, groups=None, **settings):
    config = FashionConfig.model_validate({"optim": {"name": "adamw", "lr": 0.1, **settings}})
    optimizer = build_optimizer(config.optim, model, groups)
    names = {id(each): name for name, each in model.named_parameters()}
    return [
        ([names[id(each)] for each in group["params"]], group["weight_decay"], group["lr_scale"])
        for group in optimizer.param_groups
    ]


def test_groups_have_their_own_decay_and_learning_rate():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    model[0].bias.requires_grad_(False)
    assert groups_of(model) == [(["0.weight", "1.weight", "1.bias"], 0.01, 1.0)]
    assert groups_of(model, decay_all=False) == [(["0.weight"], 0.01, 1.0), (["1.weight", "1.bias"], 0.0, 1.0)]
    first, second = (list(layer.parameters()) for layer in model)
    groups = [{"params": first, "lr_scale": 0.1}, {"params": second, "weight_decay": 0.5}]
    assert groups_of(model, groups) == [(["0.weight"], 0.01, 0.1), (["1.weight", "1.bias"], 0.5, 1.0)]
    with pytest.raises(ConfigError, match=r"1\.weight is in 0 groups, expected one"):
        groups_of(model, [{"params": model[0].parameters()}])
    with pytest.raises(ConfigError, match="'lr', expected params, lr_scale and weight_decay"):
        groups_of(model, [{"params": model.parameters(), "lr": 1.0}])
    with pytest.raises(ConfigError, match=r"lbfgs takes one group"):
        groups_of(model, groups, name="lbfgs")


def test_sample_weights_choose_samples_with_replacement_in_proportion():
    weights = torch.tensor([0.0, 1.0, 3.0] * 10_000)
    sampler = GlobalBatchSampler(weights, global_batch_size=100, sample_weights=weights)
    sampler.set_position(1)
    kinds = torch.bincount(sampler.permutation() % 3, minlength=3)
    assert kinds[0] == 0
    assert abs(kinds[2] / kinds[1] - 3) < 0.15
    assert kinds.sum() == len(weights)


def test_a_data_set_that_fails_is_named_before_step_1(monkeypatch):
    parts, sampler = parts_for(monkeypatch, network())

    def transform(inputs, key, indices):
        raise OSError("cut off")

    parts.evaluator.dataset._transform = transform
    with pytest.raises(FnetError, match="OSError: cut off"):
        check_parts(parts, ALONE, sampler)
