"""The base class of a section of settings, and the types of its fields."""

import os
import re
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

IS_PATH = "a path"  # marks a field: variables in it are expanded
_UNLABELLED = frozenset("/\\#?%:")  # not in W&B's project names
LABEL = "1 to 128 printable characters, none of / \\ # ? % :"
LARGEST = 2**32 - 1  # fits every integer type that a setting is passed on as: torch seeds, Slurm limits


def check_run_name(name: str) -> str:
    """Return `name`. Raise ValueError if it cannot be a directory name on every file system."""
    if not re.fullmatch(r"(?!-)[A-Za-z0-9._-]{1,64}", name) or name in (".", ".."):
        raise ValueError("expected 1 to 64 of A-Z a-z 0-9 . _ - and no leading '-'")
    return name


def _check(is_valid: Callable[[Any], bool], expected: str) -> AfterValidator:
    """Return a validator that raises ValueError with `expected` unless `is_valid(value)`."""

    def check(value: Any) -> Any:
        if not is_valid(value):
            raise ValueError(f"expected {expected}")
        return value

    return AfterValidator(check)


def check_path(text: str) -> str:
    """Return `text`. Raise ValueError if it cannot be a path here."""
    if not text.strip() or len(text) > 4000 or not text.isprintable():
        raise ValueError("expected a path: 1 to 4000 printable characters")
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        raise ValueError(f"expected a path in {error.encoding}, as file names are here; fix: LANG=C.UTF-8") from None
    return text


def _is_title(text: str) -> bool:
    return 1 <= len(text) <= 128 and text.isprintable()


def is_label(text: str) -> bool:
    """Return True if W&B takes `text` as the name of a project."""
    return _is_title(text) and not {*text} & _UNLABELLED


def _takes_tuple(annotation: Any) -> bool:
    return get_origin(annotation) is tuple or any(map(_takes_tuple, get_args(annotation)))


MetricName = Annotated[str, _check(lambda name: 1 <= len(name) <= 128 and name.isprintable(), "a metric's name")]
RunName = Annotated[str, AfterValidator(check_run_name)]
Label = Annotated[str, _check(is_label, LABEL)]
Title = Annotated[str, _check(_is_title, "1 to 128 printable characters")]
PathText = Annotated[str, AfterValidator(check_path), IS_PATH]
_FITS = _check(lambda number: number <= LARGEST, f"at most {LARGEST}")
PositiveInt = Annotated[int, Field(ge=1), _FITS]
NonNegativeInt = Annotated[int, Field(ge=0), _FITS]


def setting(description: str, default: Any = ..., *, changes_result: bool = True, **limits: Any) -> Any:
    """Return a field of a section. `description` gives meaning and unit; without a default the setting is required.

    `changes_result=False` marks settings that a resume may change, and that do not count in the run's name.
    """
    return Field(default, description=description, json_schema_extra={"changes_result": changes_result}, **limits)


class Section(BaseModel):
    """One table of a job file: flat, strict and frozen, with finite numbers, and tuples for lists."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    def conflict(self, config: Any) -> str | None:
        """Return one line on what in this section conflicts with `config` and how to fix it; None if nothing does."""
        return None

    def changes_result(self, field: str, config: Any) -> bool:
        """Return True if another value of `field` would change the training's result."""
        extra = type(self).model_fields[field].json_schema_extra
        return not isinstance(extra, dict) or extra.get("changes_result") is not False

    @field_validator("*", mode="before")
    @classmethod
    def _tuple_from_list(cls, value: Any, info: ValidationInfo) -> Any:
        """Accept a list for a tuple: TOML and JSON have no tuples, and strict mode would refuse it."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        return tuple(value) if isinstance(value, list) and _takes_tuple(annotation) else value


class OperationalSection(Section):
    """A section that never changes the result: a resume may change it, and it does not count in the run's name."""

    def changes_result(self, field: str, config: Any) -> bool:
        """Return False."""
        return False


def format_value(value: Any) -> str:
    """Return a setting's value as on the command line."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)
