"""A fake W&B backend on 127.0.0.1: what the real SDK (0.31) needs to train, resume, sync, upload, and save views.

It keeps what the SDK sends and can be slow, refuse, fail, lose an answer, or die and come back. What the real server
makes of the same data is not known here: where that matters, a docstring says what is assumed.
"""

import hashlib
import json
import math
import re
import socket
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit

from tests.helpers.wandb_http import API_KEY, Listener, RefusedError, operation
from tests.helpers.wandb_runs import ENTITY, Artifact, Run, as_base64
from tests.helpers.wandb_views import Views

NOBODY = "http://127.0.0.1:9"  # the discard port: connections are refused at once


class WandbServer:
    """The backend, a context manager. The kinds of requests are "graphql", "file_stream", "upload" and "other"."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.views = Views()
        self.requests: list[tuple[str, str]] = []  # kind and operation, run id or file, as they came, answered or not
        self.fail: dict[str, int] = {}  # kind -> the status that it gets
        self.delay_s: dict[str, float] = {}  # kind -> seconds before it is looked at
        self.lose_answers: set[str] = set()  # kinds that are carried out, and then the connection breaks
        self.stop_runs: set[str] = set()  # ids of runs whose Stop button was pressed
        self.deleted: set[str] = set()  # ids of runs that a user has deleted: W&B never takes them again
        self.hang = False  # accept, never answer
        self.errors: list[str] = []  # faults of our own: the end raises them
        self._artifacts: dict[str, Artifact] = {}
        self._contents: dict[str, bytes] = {}  # MD5 in base64 -> content: the SDK sends no file twice
        self._resuming: set[str] = set()
        self._lock = threading.RLock()
        self._listener: Listener | None = None
        # A wandb-core whose trainer was killed may write its last lines while the folder is removed.
        self._folder = tempfile.TemporaryDirectory(prefix="wandb_server_", ignore_cleanup_errors=True)
        # Bound and never listening: it reserves the port while connections are refused.
        self._reservation = _bound(0)
        self.port = self._reservation.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self.accept()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._listener is not None:
            self.refuse()
        self._reservation.close()
        self._folder.cleanup()
        if self.errors and error is None:
            raise AssertionError("\n".join(self.errors))

    def environment(self) -> dict[str, str]:
        """Return the variables for a process that uses this server: address, key, and no other source of settings."""
        folder = Path(self._folder.name)
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": API_KEY,
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_CACHE_DIR": str(folder / "cache"),
            "WANDB_CONFIG_DIR": str(folder / "config"),
            "WANDB_DATA_DIR": str(folder / "data"),
            "WANDB_ARTIFACT_DIR": str(folder / "artifacts"),
            "NETRC": str(folder / "netrc"),
            "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1",  # seconds; less is truncated to 0, which means 15
            "WANDB__FILE_STREAM_RETRY_WAIT_MIN_SECONDS": "1",
            "WANDB__FILE_STREAM_RETRY_WAIT_MAX_SECONDS": "1",
            "WANDB__STATS_COREWEAVE_METADATA_BASE_URL": NOBODY,
            "http_proxy": NOBODY,
            "https_proxy": NOBODY,
            "no_proxy": "127.0.0.1",
        }

    def accept(self) -> None:
        """Listen again on the same port, with all data kept."""
        assert self._listener is None
        self._listener = Listener(self, self.port)

    def refuse(self) -> None:
        """Cut requests in flight and refuse new connections."""
        assert self._listener is not None
        self._listener.end()
        self._listener = None

    def handle(self, method: str, path: str, body: bytes) -> Any:
        """Return the answer to an authorised request, None if there is none."""
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        with self._lock:
            if method == "POST" and parts == ["graphql"]:
                request = json.loads(body)
                answer = getattr(self, "_answer_" + _snake_case(operation(request)), None)
                # An operation that we do not know gets what an old server says; the SDK lives with that.
                return answer(request.get("variables") or {}) if answer else None
            if method == "POST" and parts[0] == "files" and parts[-1] == "file_stream":
                return self._file_stream(parts[3], json.loads(body))
            if method == "PUT" and parts[:2] == ["upload", "run"]:
                self.runs[parts[2]].files["/".join(parts[3:])] = body
                return {}
            if method == "PUT" and parts[:2] == ["upload", "artifact"]:
                self._artifacts[parts[2]].files["/".join(parts[3:])] = body
                self._contents[as_base64(hashlib.md5(body).digest())] = body
                return {}
            return {} if method == "PUT" and parts[:2] == ["upload", "manifest"] else None

    def _file_stream(self, run_id: str, sent: dict[str, Any]) -> Any:
        run = self.runs.get(run_id)
        if run is None:
            return None
        run.heard_at = time.monotonic()
        for name, chunk in sent.get("files", {}).items():
            run.take(name, chunk["offset"], chunk["content"])
        run.preempting |= bool(sent.get("preempting"))
        if sent.get("complete"):
            run.exit_code = sent["exitcode"]
        return {"exitcode": None, "limits": {}, "stopped": run_id in self.stop_runs}

    def _run(self, asked: dict[str, Any]) -> Run | None:
        """Return the run that a query names; queries use different variable names for it."""
        return self.runs.get(asked.get("runId") or asked.get("runName") or asked.get("run") or asked.get("name") or "")

    def _answer_viewer(self, asked: dict[str, Any]) -> Any:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        return {"viewer": {"id": "1", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "teams": teams}}

    _answer_get_default_entity = _answer_get_viewer = _answer_viewer

    def _answer_server_features_query(self, asked: dict[str, Any]) -> Any:
        return {"serverInfo": {"features": []}}

    def _answer_run_resume_status(self, asked: dict[str, Any]) -> Any:
        run = self._run(asked)
        if run is not None:
            self._resuming.add(run.id)
        entity = {"id": "1", "name": asked.get("entity") or ENTITY}
        bucket = run and run.as_graphql()
        return {"model": {"id": "1", "name": asked["project"], "entity": entity, "bucket": bucket}}

    def _answer_upsert_bucket(self, asked: dict[str, Any]) -> Any:
        run = self._run(asked) or next((run for run in self.runs.values() if run.storage_id == asked.get("id")), None)
        inserted = run is None
        if asked.get("name") in self.deleted:
            raise RefusedError(409, f"run {asked['name']} was previously created and deleted; try a new run name")
        if (entity := asked.get("entity") or ENTITY) != ENTITY:
            raise RefusedError(404, f"entity {entity} not found during upsertBucket")
        if run is None:
            run = Run(asked.get("entity") or ENTITY, asked.get("project") or "uncategorized", asked["name"])
            self.runs[run.id] = run
            run.attributes["displayName"] = f"run-{run.id}"
        # Later changes name the run by its storage id, or carry its config and nothing about it; a start does neither,
        # or has asked for the resume status before.
        about = ("displayName", "groupName", "host", "program", "jobType", "notes", "commit", "tags")
        if inserted or run.id in self._resuming or (not asked.get("id") and any(asked.get(key) for key in about)):
            self._resuming.discard(run.id)
            run.initialised += 1
            run.exit_code, run.preempting = None, False
        run.heard_at = time.monotonic()
        run.attributes.update({key: value for key, value in asked.items() if value is not None})
        return {"upsertBucket": {"bucket": run.as_graphql(), "inserted": inserted}}

    def _answer_create_run_files(self, asked: dict[str, Any]) -> Any:
        names = asked["files"]
        links = [{"name": name, "uploadUrl": f"{self.url}/upload/run/{asked['run']}/{quote(name)}"} for name in names]
        return {"createRunFiles": {"runID": self.runs[asked["run"]].storage_id, "uploadHeaders": [], "files": links}}

    def _answer_mark_run_files_uploaded(self, asked: dict[str, Any]) -> Any:
        return {"markRunFilesUploaded": {"success": True}}

    def _answer_artifact_type(self, asked: dict[str, Any]) -> Any:
        """Answer the query before a version is created: a name keeps its type."""
        name = asked["name"].split(":")[0]
        types = [a.type for a in self._artifacts.values() if a.name == name and a.committed]
        return {"project": {"artifact": {"artifactType": {"name": types[0]}} if types else None}}

    def _answer_create_artifact(self, asked: dict[str, Any]) -> Any:
        wanted = asked["input"]
        name, digest = wanted["artifactCollectionName"], wanted["digest"]
        versions = [a for a in self._artifacts.values() if a.name == name and a.committed]
        artifact = next((a for a in versions if a.digest == digest), None)
        if artifact is None:
            aliases = [entry["alias"] for entry in wanted.get("aliases") or []]
            metadata = json.loads(wanted.get("metadata") or "{}")
            number = as_base64(f"Artifact:{len(self._artifacts)}".encode())
            type_, run = wanted["artifactTypeName"], wanted.get("runName")
            artifact = Artifact(number, name, type_, digest, run, aliases, metadata)
            self._artifacts[artifact.id] = artifact
        latest = {"latestArtifact": {"id": versions[-1].id} if versions else None}
        state = "COMMITTED" if artifact.committed else "PENDING"
        return {"createArtifact": {"artifact": {"id": artifact.id, "state": state, "artifactSequence": latest}}}

    def _answer_create_artifact_manifest(self, asked: dict[str, Any]) -> Any:
        link = {"id": "1", "uploadUrl": f"{self.url}/upload/manifest/{asked['artifactID']}", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": asked["artifactID"], "file": link}}}

    def _answer_create_artifact_files(self, asked: dict[str, Any]) -> Any:
        edges = []
        for wanted in asked.get("input", asked)["artifactFiles"]:  # 0.28 asked without "input"
            artifact_id, name = wanted["artifactID"], wanted["name"]
            link: str | None = f"{self.url}/upload/artifact/{artifact_id}/{quote(name)}"
            if wanted["md5"] in self._contents:
                self._artifacts[artifact_id].files[name] = self._contents[wanted["md5"]]
                link = None
            node = {"storagePath": name, "uploadUrl": link, "uploadHeaders": [], "artifact": {"id": artifact_id}}
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _answer_commit_artifact(self, asked: dict[str, Any]) -> Any:
        artifact = self._artifacts[asked["artifactID"]]
        if not artifact.committed and artifact.run in self.runs:
            self.runs[artifact.run].committed.append(artifact)
        artifact.committed = True
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": artifact.digest}}}

    def _answer_artifact_by_id(self, asked: dict[str, Any]) -> Any:
        artifact = self._artifacts[asked["id"]]
        names = [a.name for a in self._artifacts.values() if a.committed]
        run = self.runs[artifact.run or ""]
        return {"artifact": artifact.as_graphql(run.project, names.count(artifact.name) - 1)}

    def _answer_view(self, asked: dict[str, Any]) -> Any:
        """A project exists once a run was sent to it."""
        project = (asked["entityName"], asked["name"])
        exists = any((run.entity, run.project) == project for run in self.runs.values())
        return {"project": self.views.of_project(asked) if exists else None}

    def _answer_upsert_view2(self, asked: dict[str, Any]) -> Any:
        return self.views.upsert(asked)

    def _answer_run_stopped_status(self, asked: dict[str, Any]) -> Any:
        return {"project": {"run": {"stopped": asked["runId"] in self.stop_runs}}}

    def _answer_notify_scriptable_run_alert(self, asked: dict[str, Any]) -> Any:
        """Take an alert. W&B drops one whose title was used less than `waitDuration` ago (SDK's documentation)."""
        run, now = self.runs[asked["runName"]], time.monotonic()
        last = max((at for at, alert in run.alert_times if alert["title"] == asked["title"]), default=-math.inf)
        if now - last > asked["waitDuration"] / 1e9:
            run.alert_times.append((now, asked))
        return {"notifyScriptableRunAlert": {"success": True}}


def _snake_case(operation: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", operation).lower()


def _bound(port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    return bound
