"""Requests to a run that trains: the file ASK, and where the answer is.

`fnet ask` writes a request, and rank 0 removes it when it is answered (fnet_dist/training/answers.py). A request is to
one attempt: the next one removes it unread, because whoever asked has been told that the attempt ended.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from fnet_dist.run.run_dir import RunDir

MAX_STEPS = 1000  # of a profile: all its events are kept in memory
_MAX_BYTES = 1 << 20  # of a request that names many ranks; whatever else is found there may be of any size


class Request(BaseModel):
    """A request to attempt number `attempt`, for the given ranks (None: all)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["save", "stacks", "profile"]
    attempt: PositiveInt
    id: str = Field(pattern="^[0-9a-f]{8}$")
    ranks: tuple[NonNegativeInt, ...] | None = None
    steps: int = Field(default=20, ge=1, le=MAX_STEPS)  # of a profile

    def folder(self, run: RunDir) -> Path:
        """Return the directory of the answer."""
        return run.attempt(self.attempt) / f"{self.kind}-{self.id}"

    def answer(self, run: RunDir) -> Path:
        """Return the file that rank 0 writes last: "steps", "checkpoint" and "errors" of the answer."""
        return self.folder(run) / "answer.json"


def write_request(run: RunDir, request: Request) -> None:
    """Write ASK, whole from the start. Raise FileExistsError if there is one."""
    temporary = run.ask.with_name(f".{run.ask.name}.{request.id}")
    try:
        temporary.write_text(request.model_dump_json(), encoding="utf-8")
        os.link(temporary, run.ask)  # a rename would replace another request
    finally:
        temporary.unlink(missing_ok=True)


def has_request(run: RunDir) -> bool:
    """Return True if ASK is a file: the only look at the disk in a window in which nothing is asked."""
    with suppress(OSError):
        return run.ask.is_file()
    return False


def read_request(run: RunDir) -> Request | None:
    """Return the request in ASK; None if there is none, or something else."""
    if has_request(run):  # to open a FIFO would wait for a writer
        with suppress(OSError, ValidationError), run.ask.open("rb") as file:
            return Request.model_validate_json(file.read(_MAX_BYTES))
    return None


def remove_request(run: RunDir, request: Request) -> None:
    """Remove ASK if it still holds `request`."""
    if read_request(run) == request:
        with suppress(OSError):
            run.ask.unlink()
