"""Settings from environment variables: they override the job file, and the command line overrides them."""

import os
from collections.abc import Mapping

from fnet_dist.config.schema import Config, DataConfig

ENVIRONMENT: Mapping[str, str] = {
    "FNET_DATA": "data.root",
    "WANDB_MODE": "tracking.wandb",
    "WANDB_PROJECT": "tracking.project",
    "WANDB_ENTITY": "tracking.entity",
    "WANDB_NAME": "tracking.name",
    "WANDB_RUN_GROUP": "tracking.group",
}


def environment_settings(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return {"section.key": text} from `env`, by default `os.environ`."""
    env = os.environ if env is None else env
    return {setting: env[name] for name, setting in _known().items() if env.get(name)}


def environment_of(config: Config) -> dict[str, str]:
    """Return the variables that set these settings to their values in `config`, for processes that load it again."""
    sections = config.model_dump(mode="json")
    split = {name: setting.split(".") for name, setting in _known().items()}
    found = {name: sections[section][key] for name, (section, key) in split.items()}
    return {name: str(value) for name, value in found.items() if value is not None}


def _known() -> dict[str, str]:
    # A user's own DataConfig may have no `root`, and FNET_DATA may still be set.
    return {
        name: setting
        for name, setting in ENVIRONMENT.items()
        if setting != "data.root" or "root" in DataConfig.model_fields
    }
