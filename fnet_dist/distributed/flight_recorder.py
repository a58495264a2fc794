"""torch's flight recorder, of gloo and NCCL: how many collectives this rank has begun, and the last ones.

Of several ranks that hang, the one that has begun fewer is the one that the others wait for. torch has no public name
for the recorder; where the private one is gone, a rank that hangs reports the exchanges through shared memory alone.
"""

import json
import os
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

COLLECTIVES = 2000  # kept


class Exchange(Protocol):
    """An exchange with other ranks that is none of torch's collectives: how many were begun, and for whom it waits."""

    @property
    def begun(self) -> int: ...

    @property
    def waits_for(self) -> int | None: ...


def start_recorder() -> None:
    """Let torch record collectives. Before the process group is opened."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(COLLECTIVES))


def write_record(path: Path, exchange: Exchange | None) -> dict[str, Any]:
    """Write the last collectives to `path`, and return what tells ranks apart.

    "begun" counts all exchanges with other ranks, "last" is the name of the last collective ("" if there is none) and
    "waits_for" the rank that this one is known to wait for.
    """
    begun, last = 0, ""
    with suppress(Exception):  # private, and no hang may be hidden by an error of its report
        entries = json.loads(import_module("torch._C._distributed_c10d")._dump_fr_trace_json(True, False))
        newest = max(entries.get("entries", []), key=lambda entry: entry["record_id"])
        begun, last = newest["record_id"] + 1, str(newest["profiling_name"])
        path.write_text(json.dumps(entries), encoding="utf-8")
    if exchange is not None:
        begun += exchange.begun
    return {"begun": begun, "last": last, "waits_for": None if exchange is None else exchange.waits_for}
