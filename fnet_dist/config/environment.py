"""Settings from environment variables: they override the job file, and the command line overrides them."""

import logging
import os
from collections.abc import Mapping

from fnet_dist.errors import ConfigError

ENVIRONMENT: Mapping[str, str] = {
    "FNET_DATA": "data.root",
    "WANDB_MODE": "tracking.wandb",
    "WANDB_PROJECT": "tracking.project",
    "WANDB_ENTITY": "tracking.entity",
    "WANDB_NAME": "tracking.name",
    "WANDB_RUN_GROUP": "tracking.group",
}


def environment_settings(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return {"section.key": text} from `env`, by default `os.environ`. An empty variable counts as unset."""
    env = os.environ if env is None else env
    return {setting: env[name] for name, setting in ENVIRONMENT.items() if env.get(name)}


def log_level() -> int | None:
    """Return the level of `logging` that FNET_LOG names, None if it is unset. Raise ConfigError on another word."""
    word = os.environ.get("FNET_LOG")
    if not word:
        return None
    if word.lower() not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"FNET_LOG={word!r}, expected debug, info, warning or error")
    return logging.getLevelNamesMapping()[word.upper()]
