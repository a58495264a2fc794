"""Settings that the environment gives: they stand above the job file, and below the command line."""

import os
from collections.abc import Mapping

from fnet_dist.config.schema import DataConfig

ENVIRONMENT: Mapping[str, str] = {
    "FNET_DATA": "data.root",
    "WANDB_MODE": "tracking.wandb",
    "WANDB_PROJECT": "tracking.project",
    "WANDB_ENTITY": "tracking.entity",
    "WANDB_NAME": "tracking.name",
    "WANDB_RUN_GROUP": "tracking.group",
}


def environment_settings(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """What `env` (`os.environ` if None) gives: {"section.key": text}; FNET_DATA only where DataConfig has a `root`."""
    env = os.environ if env is None else env
    return {
        setting: env[name]
        for name, setting in ENVIRONMENT.items()
        if env.get(name) and (setting != "data.root" or "root" in DataConfig.model_fields)
    }
