"""Training in a process group that exists already."""

from contextlib import closing
from functools import partialmethod
from unittest.mock import patch

import torch
from torch import optim

from fnet_dist.config.recipe_sections import ClassifierLossConfig
from fnet_dist.config.schema import Config
from fnet_dist.data.datasets import DatasetInfo, InMemoryDataset
from fnet_dist.distributed.launch_env import LaunchEnv
from fnet_dist.distributed.process_group import Group
from fnet_dist.distributed.watchdog import Watchdog
from fnet_dist.loss import ClassifierLoss, build_classifier_loss
from fnet_dist.run.outcome import RunOutcomeWriter, record_outcome
from fnet_dist.run.stop import StopFlag
from fnet_dist.training.setup import TrainTestData, build_data, claim_run
from fnet_dist.training.trainer import TrainingContext, fit

CPU = torch.device("cpu")


def classifier_loss(config: ClassifierLossConfig) -> ClassifierLoss:
    """Return the loss for data with ten classes, or as many as there are class weights."""
    names = tuple(map(str, config.class_weights or range(10)))
    return build_classifier_loss(config, InMemoryDataset(*[torch.zeros(1)] * 2, CPU, DatasetInfo("none", "", names)))


def train_in_group(
    group: Group, config: Config, data: TrainTestData | None = None, stop: StopFlag | None = None, timeout_s: float = 60
) -> None:
    """Do what trainer.train does after it has opened the process group; with `data` in place of the configured data."""
    data = data or build_data(config, group)
    config, attempt = claim_run(config, group, LaunchEnv(), data)
    outcome = RunOutcomeWriter(attempt if group.is_rank0 else None)
    few_passes = partialmethod(optim.LBFGS.__init__, max_iter=4)  # over a batch; torch's default of 20 takes seconds
    with (
        closing(data),
        patch.object(optim.LBFGS, "__init__", few_passes),
        Watchdog(group.rank, timeout_s, print) as watchdog,
        record_outcome(outcome),
    ):
        fit(TrainingContext(config, group, attempt, data, outcome, stop or StopFlag(), watchdog))
