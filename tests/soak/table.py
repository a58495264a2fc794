"""The table of a soak: what was promised, how often it held, and what else was seen."""

import os
import platform
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version

from tests.helpers.processes import REPOSITORY


@dataclass
class Table:
    """Rows, printed as they come."""

    rows: list[tuple[str, int, int, str]] = field(default_factory=list)

    def add(self, promise: str, held: int, of: int, seen: str) -> None:
        for place in (REPOSITORY, tempfile.gettempdir()):  # the table is committed: no path of this machine
            seen = seen.replace(f"{place}/", "")
        self.rows.append((promise, held, of, seen))
        print(f"{promise}: {held} of {of}. {seen}", flush=True)

    def markdown(self, command: str, seed: int, minutes: float) -> str:
        lines = [
            "# Soak",
            "",
            f"`{command}`, seed {seed}, {time.strftime('%Y-%m-%d')}, {minutes:.0f} minutes: {os.cpu_count()} cores, "
            f"{platform.machine()}, Python {platform.python_version()}, torch {version('torch')}, two ranks on gloo "
            "unless a row says more.",
            "",
            "| promise | held | seen |",
            "|---|---|---|",
            *(f"| {promise} | {held:,} of {of:,} | {seen} |" for promise, held, of, seen in self.rows),
        ]
        return "\n".join(lines) + "\n"

    @property
    def all_held(self) -> bool:
        return all(held == of for _, held, of, _ in self.rows)
