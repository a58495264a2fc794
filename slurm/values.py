"""Read single values as Slurm's programs print them. Any text of another form raises SlurmError."""

import re
from collections.abc import Callable
from dataclasses import field
from typing import Any

from slurm.errors import SlurmError

# Spellings of "unknown" and "unlimited". They differ between the programs and between fields.
_NOTHING = {"", "(null)", "n/a", "none", "none assigned", "unknown", "unlimited", "infinite", "not_set"}
_NOTHING |= {"partition_limit"}


def column(name: str, read: Callable[[str], Any] = str) -> Any:
    """Declare a dataclass field that is filled from the column `name` of a program's output, by the function `read`."""
    return field(metadata={"column": name, "read": read})


def known(text: str) -> str | None:
    """Return `text`, or None if it is one of Slurm's words for nothing."""
    return None if text.lower() in _NOTHING else text


def known_or_empty(text: str) -> str:
    """Return `text`, or "" if it is one of Slurm's words for nothing."""
    return known(text) or ""


def count(text: str) -> int:
    """Return a whole number, which has no sign."""
    if not re.fullmatch("[0-9]+", text):  # int() would take "-1", " 1" and the digits of other scripts
        raise unexpected("a number", text)
    return int(text)


def known_count(text: str) -> int | None:
    """Return a whole number or a Unix time; None if it is one of Slurm's words for nothing."""
    return None if known(text) is None else count(text)


def duration_s(text: str) -> int | None:
    """Return the seconds of a time as sinfo prints it, [[days-]hours:]minutes:seconds; None: no limit."""
    if known(text) is None:
        return None
    if (found := re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)) is None:
        raise unexpected("a time limit", text)
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())  # sinfo leaves out leading parts
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def gpus(gres: str) -> int:
    """Count the GPUs of a node: 3 in "gpu:a100:2(S:0-1),gpu:v100:1,tmp:50"."""
    gres = re.sub(r"\([^)]*\)", "", gres)  # the sockets of a GPU, which may hold commas
    return sum(int(number) for number in re.findall(r"(?:^|,)gpu(?::[^:,]+)?:(\d+)", gres))


def unexpected(what: str, text: str) -> SlurmError:
    """Return the error for a text that is not of the expected form."""
    return SlurmError(f"{what}: {text[:100]!r} is not what a Slurm of 22.05 to 25.x prints")
