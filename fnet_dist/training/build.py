"""Build what a run trains with, from the recipe and the settings, and try it once before step 1."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from fnet_dist.checkpoint.state import TrainState, check_model_state
from fnet_dist.config.load_recipe import load_recipe, recipe_errors
from fnet_dist.config.recipe_sections import ClassifierLossConfig
from fnet_dist.config.schema import Config
from fnet_dist.data.datasets import Dataset
from fnet_dist.data.sampler import GlobalBatchSampler
from fnet_dist.distributed.gradient_sync import GradientSync
from fnet_dist.distributed.model_with_loss import build_model_with_loss
from fnet_dist.distributed.process_group import Group, raise_on_all_ranks
from fnet_dist.errors import ConfigError
from fnet_dist.loss import Loss, build_classifier_loss
from fnet_dist.metrics import directions
from fnet_dist.optim import build_optimizer, build_update, learning_rate
from fnet_dist.recipe import recipe_metrics, recipe_of
from fnet_dist.seeding import derive_seed, seed_device
from fnet_dist.training.evaluation import Evaluator, check_one_batch
from fnet_dist.training.reproducibility import has_batch_statistics
from fnet_dist.training.setup import TrainTestData
from fnet_dist.training.step import Step


@dataclass(frozen=True)
class Parts:
    """Model, optimizer, step and evaluator of a run. `monitor` is in `directions`: "loss" and the recipe's metrics."""

    recipe: str
    state: TrainState
    step: Step
    evaluator: Evaluator
    monitor: str
    directions: Mapping[str, str]


def build_parts(config: Config, group: Group, data: TrainTestData, sampler: GlobalBatchSampler) -> Parts:
    """Build model, loss, metrics, optimizer and step. Raise ConfigError on all ranks if the recipe's code fails.

    The initial weights derive from the seed, the same on all ranks.
    """
    recipe = recipe_of(config.recipe)
    model, loss = raise_on_all_ranks(group, lambda: _build_model_and_loss(config, group, data))
    metrics = recipe_metrics(config.recipe)
    known = {"loss": "lower", **directions(metrics)}
    monitor = config.run.monitor or next(iter(directions(metrics)), "loss")
    if monitor not in known:
        raise ConfigError(f"run.monitor: got {monitor!r}, expected one of {', '.join(known)}")
    with recipe_errors(load_recipe(config.recipe), "parameter_groups"):
        groups = recipe.parameter_groups(model, config.model) if hasattr(recipe, "parameter_groups") else None
        optimizer = build_optimizer(config.optim, model, groups)
    forward = build_model_with_loss(model, loss, config.parallel, group.device)
    total_steps = config.run.epochs * sampler.steps_per_epoch
    step = Step(
        gradient_sync=GradientSync(forward, group, config.parallel),
        loss=loss,
        optimizer=optimizer,
        update=build_update(optimizer),
        group=group,
        lr_of=lambda step: learning_rate(config.schedule, config.optim.lr, step, total_steps),
        seed=derive_seed(config.run.seed, "step"),
        microbatches=config.parallel.grad_accum_steps,
        max_grad_norm=config.optim.max_grad_norm,
        grad_norm_every_steps=config.tracking.log_every_steps,
    )
    batch_size = min(sampler.micro_batch_size, -(-len(data.test) // sampler.shards))  # a batch for each rank
    key = evaluation_key(config)
    evaluator = Evaluator(model, loss, metrics, data.test, group, batch_size, key)
    return Parts(config.recipe, TrainState(model, optimizer), step, evaluator, monitor, known)


def evaluation_key(config: Config) -> int:
    """Return the key of the test samples' random draws, if they have any: as of an epoch 0, in each evaluation."""
    return derive_seed(config.run.seed, "samples", 0)


def build_loss(config: Config, train_data: Dataset) -> Loss:
    """Return the recipe's loss, or that of a classifier."""
    recipe = recipe_of(config.recipe)
    if hasattr(recipe, "build_loss"):
        return recipe.build_loss(config.loss, train_data)
    assert isinstance(config.loss, ClassifierLossConfig)  # config_class chooses it for such a recipe
    return build_classifier_loss(config.loss, train_data)


def _build_model_and_loss(config: Config, group: Group, data: TrainTestData) -> tuple[nn.Module, Loss]:
    module, recipe = load_recipe(config.recipe), recipe_of(config.recipe)
    # On the CPU and then moved: a GPU's random stream would give other weights.
    seed_device(torch.device("cpu"), derive_seed(config.run.seed, "weights"))
    with recipe_errors(module, "build_model"):
        model = recipe.build_model(config.model, data.train)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"build_model of recipe {config.recipe} returned a {type(model).__name__}, expected nn.Module"
        )
    with recipe_errors(module, "build_loss"):
        loss = build_loss(config, data.train)
    if isinstance(loss, nn.Module):
        if any(True for _ in loss.parameters()):
            raise ConfigError("the loss has parameters, which no checkpoint would hold; make them the model's")
        loss.to(group.device)
    if config.parallel.sync_batchnorm:
        if group.device.type != "cuda":
            raise ConfigError(
                "parallel.sync_batchnorm: torch's SyncBatchNorm works on GPUs only; use --parallel.sync-batchnorm "
                "false on CPUs, or a norm without batch statistics, like GroupNorm"
            )
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(group.device), loss


def check_parts(parts: Parts, group: Group, sampler: GlobalBatchSampler) -> None:
    """Run one test batch through model, loss and metrics, and see that a checkpoint can hold the model. Raise
    ConfigError or DataError on all ranks if one fails."""

    def check() -> None:
        with recipe_errors(load_recipe(parts.recipe), "first test batch"):
            check_one_batch(parts.evaluator)
            _check_single_samples(parts.evaluator, sampler)
        if group.is_rank0:  # which writes the checkpoints
            check_model_state(parts.state.model)

    raise_on_all_ranks(group, check)


def _check_single_samples(evaluator: Evaluator, sampler: GlobalBatchSampler) -> None:
    """Raise ConfigError if BatchNorm cannot train on the one sample that an epoch's last batch leaves to a rank."""
    if 1 not in sampler.last_local_batches:
        return
    model = copy.deepcopy(evaluator.model).train()  # a copy: training changes BatchNorm's statistics
    if not any(has_batch_statistics(each) for each in model.modules()):
        return
    inputs, targets = evaluator.dataset.batch(torch.arange(1), evaluator.key)
    try:
        replace(evaluator, model=model).run_batch(inputs, targets, 1)
    except ValueError as error:
        size = sampler.samples_per_epoch - (sampler.steps_per_epoch - 1) * sampler.global_batch_size
        raise ConfigError(
            f"an epoch's last global batch has {size} samples, which leaves one to a microbatch, and BatchNorm needs "
            f"more ({error}); use --data.drop-last true, or another --data.global-batch-size"
        ) from None
