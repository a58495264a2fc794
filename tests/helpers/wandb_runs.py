"""Runs and artifacts in the W&B backend of wandb_server.py: what the SDK sent, and what W&B would show."""

import base64
import json
import time
from dataclasses import dataclass, field
from typing import Any

ENTITY = "tester"
LONG_AGO = "2026-01-01T00:00:00"  # every time that a query asks for and no test looks at
HISTORY, EVENTS, SUMMARY, CONSOLE = "wandb-history.jsonl", "wandb-events.jsonl", "wandb-summary.json", "output.log"


@dataclass
class Artifact:
    """One version of an artifact; it belongs to its run once it is committed."""

    id: str
    name: str
    type: str
    digest: str
    run: str | None
    aliases: list[str]
    metadata: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False

    def as_graphql(self, project: str, version: int) -> dict[str, Any]:
        """Return all fields that Artifact.wait() asks for."""
        place = {"id": "1", "internalId": "1", "name": project, "entity": {"name": ENTITY}}
        collection = {"__typename": "ArtifactSequence", "name": self.name, "project": place}
        aliases = [*self.aliases, f"v{version}"]
        return {
            "__typename": "Artifact", "id": self.id, "artifactSequence": collection, "versionIndex": version,
            "artifactType": {"name": self.type}, "description": None, "metadata": json.dumps(self.metadata),
            "ttlDurationSeconds": -2, "ttlIsInherited": True, "tags": [], "historyStep": None, "state": "COMMITTED",
            "size": sum(map(len, self.files.values())), "digest": self.digest, "commitHash": self.id,
            "fileCount": len(self.files), "createdAt": LONG_AGO, "updatedAt": LONG_AGO,
            "aliases": [{"id": name, "alias": name, "artifactCollection": collection} for name in aliases],
        }  # fmt: skip


@dataclass
class Run:
    """The data of one run that has arrived."""

    entity: str
    project: str
    id: str
    crashed_after_s: float = 300  # silent for so long, a run that has not ended shows "crashed" (W&B's documentation)
    attributes: dict[str, Any] = field(default_factory=dict)  # as in the last UpsertBucket
    streams: dict[str, dict[int, str]] = field(default_factory=dict)  # file -> line number -> line
    files: dict[str, bytes] = field(default_factory=dict)
    committed: list[Artifact] = field(default_factory=list)
    overwritten: list[tuple[int, str, str]] = field(default_factory=list)  # history lines that got another content
    alert_times: list[tuple[float, dict[str, Any]]] = field(default_factory=list)  # when, variables of the mutation
    initialised: int = 0
    exit_code: int | None = None
    preempting: bool = False
    heard_at: float = field(default_factory=time.monotonic)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows in the order of the server's lines."""
        return [json.loads(line) for _, line in sorted(self.streams.get(HISTORY, {}).items())]

    @property
    def alerts(self) -> list[dict[str, Any]]:
        """The alerts that W&B would show, in order: title, text, severity and the rest of what was sent."""
        return [alert for _, alert in self.alert_times]

    @property
    def missing_lines(self) -> list[int]:
        """The numbers of history lines below the last one that never arrived."""
        lines = self.streams.get(HISTORY, {})
        return [number for number in range(max(lines, default=-1)) if number not in lines]

    @property
    def summary(self) -> dict[str, Any]:
        lines = self.streams.get(SUMMARY, {})
        return json.loads(lines[max(lines)]) if lines else {}

    @property
    def raw_config(self) -> dict[str, Any]:
        """As W&B stores it: {"key": {"value": ...}}, with W&B's own under "_wandb"."""
        return json.loads(self.attributes.get("config") or "{}")

    @property
    def config(self) -> dict[str, Any]:
        return {key: entry["value"] for key, entry in self.raw_config.items() if key != "_wandb"}

    @property
    def state(self) -> str:
        """The state that the dashboard would show, by W&B's documentation of heartbeats and preemptible runs."""
        silent = time.monotonic() - self.heard_at > self.crashed_after_s
        if self.exit_code == 0:
            return "finished"
        if self.exit_code is not None or silent:
            return "preempted" if self.preempting else "crashed" if self.exit_code is None else "failed"
        return "preempting" if self.preempting else "running"

    @property
    def artifacts(self) -> dict[str, list[dict[str, bytes]]]:
        """Name -> the committed versions, oldest first, each {file path: content}."""
        versions: dict[str, list[dict[str, bytes]]] = {}
        for artifact in self.committed:
            versions.setdefault(artifact.name, []).append(artifact.files)
        return versions

    display_name = property(lambda self: self.attributes.get("displayName"))
    group = property(lambda self: self.attributes.get("groupName"))
    job_type = property(lambda self: self.attributes.get("jobType"))
    notes = property(lambda self: self.attributes.get("notes"))
    commit = property(lambda self: self.attributes.get("commit"))
    tags = property(lambda self: self.attributes.get("tags") or [])
    storage_id = property(lambda self: as_base64(f"Run:v1:{self.id}:{self.project}:{self.entity}".encode()))

    def count(self, name: str) -> int:
        """Return the number of lines of a file: a resumed run continues there."""
        return max(self.streams.get(name, {}), default=-1) + 1

    def take(self, name: str, offset: int, content: list[str]) -> None:
        """Put line i at offset + i: a repeated post overwrites, it does not append."""
        lines = self.streams.setdefault(name, {})
        for number, line in enumerate(content, offset):
            if name == HISTORY and lines.get(number, line) != line:
                self.overwritten.append((number, lines[number], line))
            lines[number] = line

    def tail(self, name: str) -> str:
        lines = self.streams.get(name, {})
        return json.dumps([lines[max(lines)]] if lines else [])

    def as_graphql(self) -> dict[str, Any]:
        """Return all fields that a query of the SDK may ask for; it ignores the others."""
        return {
            "id": self.storage_id, "name": self.id, "displayName": self.display_name, "description": None,
            "notes": self.notes, "tags": self.tags, "group": self.group, "jobType": self.job_type, "state": self.state,
            "commit": self.commit, "sweepName": None, "readOnly": False, "createdAt": LONG_AGO,
            "heartbeatAt": LONG_AGO, "user": {"name": ENTITY, "username": ENTITY}, "projectId": "1",
            "project": {"id": "1", "name": self.project, "entity": {"id": "1", "name": self.entity}},
            "config": json.dumps(self.raw_config), "summaryMetrics": json.dumps(self.summary), "systemMetrics": "{}",
            "historyLineCount": self.count(HISTORY), "eventsLineCount": self.count(EVENTS),
            "logLineCount": self.count(CONSOLE), "historyTail": self.tail(HISTORY), "eventsTail": self.tail(EVENTS),
            # Without its "t" the SDK takes a run for one that was made ahead of time and never started.
            "wandbConfig": json.dumps({"t": 1} if "_wandb" in self.raw_config else {}),
        }  # fmt: skip


def as_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
