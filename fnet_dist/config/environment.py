"""Environment variables: those that are settings, which override the job file, and those that paths in it name."""

import logging
import os
import re
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


_SECRET = re.compile("KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)  # in a variable's name
_SHORTEST_SECRET = 8  # characters: a shorter value may be a word of any sentence


def hide_secrets(text: str) -> str:
    """Return `text` with the value of each variable that seems to hold a secret replaced by $NAME.

    An exception's message may quote one.
    """
    found = [(value, name) for name, value in os.environ.items() if _SECRET.search(name)]
    for value, name in sorted(found, key=lambda each: len(each[0]), reverse=True):
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, f"${name}")
    return text


def log_level() -> int | None:
    """Return the level of `logging` that FNET_LOG names, None if it is unset. Raise ConfigError on another word."""
    word = os.environ.get("FNET_LOG")
    if not word:
        return None
    if word.lower() not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"FNET_LOG={word!r}, expected debug, info, warning or error")
    return logging.getLevelNamesMapping()[word.upper()]
