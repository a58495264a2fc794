"""Environment variables: those that are settings, which override the job file, and those that paths in it name."""

import logging
import os
from collections.abc import Mapping
from string import Template

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


def expand_variables(path: str) -> str:
    """Return `path` with $NAME and ${NAME} replaced by the variable's value, and $$ by $.

    Raise ValueError if a variable is unset or empty: "$SCRATCH/runs" must not become /runs.
    """
    try:
        return Template(path).substitute({name: value for name, value in os.environ.items() if value})
    except KeyError as error:
        raise ValueError(f"the variable {error.args[0]} is not set") from None
    except ValueError:
        raise ValueError("a $ begins no variable's name; write it as $$") from None


def log_level() -> int | None:
    """Return the level of `logging` that FNET_LOG names, None if it is unset. Raise ConfigError on another word."""
    word = os.environ.get("FNET_LOG")
    if not word:
        return None
    if word.lower() not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"FNET_LOG={word!r}, expected debug, info, warning or error")
    return logging.getLevelNamesMapping()[word.upper()]
