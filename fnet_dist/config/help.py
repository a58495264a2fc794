"""The text of --help and of error messages on settings, both generated from the models."""

import difflib
import re
import textwrap
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fnet_dist.config.fields import Section, format_value
from fnet_dist.config.schema import Config, sections

LONGEST_LINE = 450  # characters: about three lines of a log


def setting_names(config: type[Config]) -> list[str]:
    """Return every setting as "section.key"."""
    return [f"{section}.{key}" for section, model in sections(config).items() for key in model.model_fields]


@cache
def schema_of(config: type[Config], name: str) -> dict[str, Any]:
    """Return the JSON schema of setting "section.key", {} if there is none."""
    section, _, key = name.partition(".")
    properties = sections(config).get(section, Section).model_json_schema().get("properties", {})
    return cast("dict[str, Any]", properties.get(key, {}))


def settings_help(config: type[Config]) -> str:
    """Return every setting with meaning, valid values and default, at most 100 columns wide."""
    recipe = config.model_fields["recipe"].default
    lines = [
        "usage: python -m fnet_dist.train --config JOBFILE [--section.key VALUE ...]",
        "",
        "JOBFILE is a .toml file with one table per section. The command line overrides the environment",
        "(FNET_DATA for data.root; WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME, WANDB_RUN_GROUP",
        "for tracking), which overrides the job file, which overrides these defaults.",
        "",
        'The recipe is the module with your data and model: recipe = "MODULE" above the job file\'s tables,',
        "or --recipe MODULE. The sections data, model and loss below are those of",
        f"{recipe}",
    ]
    width = max(map(len, setting_names(config))) + len("  --  ")
    for section, model in sections(config).items():
        lines += ["", section] if model.model_fields else []
        for key, field in model.model_fields.items():
            valid = describe_type(schema_of(config, f"{section}.{key}"))
            if field.is_required():
                valid += "; required"
            elif field.default_factory is None:
                valid += f"; default {format_value(field.default)}"
            flag = f"  --{section}.{key}".replace("_", "-").ljust(width)
            paragraph = textwrap.TextWrapper(100, flag, " " * width, break_on_hyphens=False)
            lines.append(paragraph.fill(f"{field.description or key} ({valid})"))
    return "\n".join(lines)


def explain_validation_error(error: ValidationError, config: type[Config]) -> str:
    """Return one line on the first of pydantic's errors, and the number of further ones."""
    # Ignore lr errors caused only by an invalid optim.name: its default could not be looked up.
    findings = [item for item in error.errors(include_url=False) if item["type"] != "default_factory_not_called"]
    first = findings[0]
    if first["type"] == "value_error" and not first["loc"]:
        conflicts = first["ctx"]["error"].args
        line, more = conflicts[0], len(conflicts) - 1
    elif not first["loc"]:  # JSON and TOML have text keys only; Python callers may pass others
        line, more = f"a section's name: got {quote(first['input'])}, expected text", 0
    else:
        line, more = _explain_one(first, config), len({item["loc"][:2] for item in findings}) - 1
    return one_line(line) + (f" (and {more} more)" if more else "")


def _explain_one(error: ErrorDetails, config: type[Config]) -> str:
    section, *path = map(str, error["loc"])
    if section == "recipe":
        return f"recipe: got {quote(error['input'])}, expected the name of a Python module, as text"
    if error["type"] == "extra_forbidden":
        inner = list(error["input"])[:1] if not path and isinstance(error["input"], dict) else []
        return unknown_setting(".".join([section, *path, *inner]), config)
    if not path:  # a value where a table belongs
        return f"{section}: got {quote(error['input'])}, expected a section: [{section}] with its settings below it"
    key = f"{section}.{path[0]}"
    if error["type"] == "missing":
        flag = f"--{key.replace('_', '-')}"
        return f"{key}: not given, and it has no default; fix: {flag} VALUE or a line in the job file"
    got = f"{key}{''.join(f'[{part}]' for part in path[1:])}: got {quote(error['input'])}"
    if error["type"] == "value_error":
        return f"{got}, {error['ctx']['error']}"
    meaning = _meaning(sections(config)[section].model_fields[path[0]].description)
    return f"{got}, expected {describe_type(schema_of(config, key))}" + (f" ({meaning})" if meaning else "")


def _meaning(description: str | None) -> str:
    return (description or "").partition(";")[0]  # after the semicolon: details


def unknown_setting(name: str, config: type[Config]) -> str:
    """Return one line that `name` is unknown, with the settings that were most likely meant."""
    section, key = name.split(".", 1) if "." in name else ("", name)
    models, known = sections(config), setting_names(config)
    if name in models:
        return f"{name}: is a section, expected one of its settings: {', '.join(models[name].model_fields)}"
    # Likely mistakes: the right key in another section, a description for a key, a misspelled key or name.
    same_key = [full for full in known if full.partition(".")[2] == key]
    if same_key and section in models:
        return f"{label(name)}: unknown setting; another section has it: {', '.join(same_key)}"
    described = [
        f"{other}.{field}"
        for other, model in models.items()
        for field, info in model.model_fields.items()
        if _meaning(info.description) == key.replace("_", " ").lower()
    ]
    alike = [full for full in known if difflib.get_close_matches(key.lower(), [full.partition(".")[2]])]
    in_section = [full for full in alike if full.partition(".")[0] == section]
    whole = difflib.get_close_matches(name.lower(), same_key or [*known, *models], n=1) if section not in models else []
    near = described or in_section or whole or same_key or alike
    if near:
        return f"{label(name)}: unknown setting; nearest: {', '.join(near)}"
    if section in models:
        return f"{label(name)}: unknown setting; {section} has {', '.join(models[section].model_fields)}"
    return f"{label(name)}: unknown setting; the sections are {', '.join(models)}"


def describe_type(schema: Mapping[str, Any]) -> str:
    """Return the valid values of a setting with this JSON schema, in words."""
    if "anyOf" in schema:
        return ", or ".join(describe_type(kind) for kind in schema["anyOf"])
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if schema.get("type") == "array":
        values = ",".join(str(1 + i) for i in range(schema.get("minItems", 3)))
        return f"a list ({values}), each {describe_type(schema.get('items', {}))}"
    kinds = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "null": "none"}
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    limits = [f"{sign} {schema[limit]:g}" for limit, sign in signs.items() if limit in schema]
    return f"{kinds.get(schema.get('type', ''), 'text')} {' and '.join(limits)}".strip()


def label(name: str) -> str:
    """Return a key unchanged if it has ordinary characters, else quoted and cut."""
    return name if re.fullmatch(r"[A-Za-z0-9_.-]{1,60}", name) else quote(name)


def path_text(path: Path) -> str:
    """Return a path unchanged if it is printable, else quoted; of a long path, its end."""
    text = str(path) if str(path).isprintable() else repr(str(path))
    return text if len(text) <= 200 else f"...{text[-197:]}"


def quote(value: Any) -> str:
    """Return `repr(value)`, cut to 60 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4300 digits; a deeply nested table
        text = f"an enormous {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def one_line(text: str) -> str:
    """Return `text` without line breaks and control characters, cut to LONGEST_LINE."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 3]}..."
