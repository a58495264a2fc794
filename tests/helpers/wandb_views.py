"""Saved views in the W&B backend of wandb_server.py: what wandb-workspaces needs to save, find and load one."""

from dataclasses import dataclass
from typing import Any

from tests.helpers.wandb_http import RefusedError
from tests.helpers.wandb_runs import as_base64


@dataclass
class View:
    """A saved view of a project, as it was last sent. `name` is what its URL holds, `display_name` its title."""

    entity: str
    project: str
    id: str
    name: str
    display_name: str
    type: str
    spec: str


class Views:
    """All saved views. Assumed: without an id a new view is made, whatever its name; an id has to exist."""

    def __init__(self) -> None:
        self.kept: list[View] = []

    def upsert(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Answer the mutation UpsertView2."""
        content = (asked["name"], asked["displayName"], asked["type"], asked["spec"])
        given = asked.get("id")
        if given is None:
            number = as_base64(f"View:{len(self.kept)}".encode())
            self.kept.append(View(asked["entityName"], asked["projectName"], number, *content))
            view = self.kept[-1]
        else:
            view = next((view for view in self.kept if view.id == given), None)
            if view is None:
                raise RefusedError(404, f"no view {given}")
            view.name, view.display_name, view.type, view.spec = content
        return {"upsertView": {"view": {"id": view.id, "name": view.name}, "inserted": given is None}}

    def of_project(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Answer `allViews` of a project, which a name and a type narrow down."""
        found = [
            view
            for view in self.kept
            if (view.entity, view.project, view.type) == (asked["entityName"], asked["name"], asked["viewType"])
            and asked.get("viewName") in (None, view.name)
        ]
        nodes = [{"id": view.id, "displayName": view.display_name, "spec": view.spec} for view in found]
        return {"allViews": {"edges": [{"node": node} for node in nodes]}}
