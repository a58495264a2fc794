"""Make a saved view of a W&B project, five sections of panels for the rows of rows.py, and find it again.

Needs wandb-workspaces, an optional extra: only `fnet workspace` imports this module.
"""

import hashlib
import unicodedata
from collections.abc import Iterable
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from fnet_dist.config.load import read_section
from fnet_dist.errors import ConfigError
from fnet_dist.run.metrics_log import GPU_SPREADS, TIME_SPREADS
from fnet_dist.run.run_dir import RunDir, read_json
from fnet_dist.tracking.rows import spread_name
from fnet_dist.versions import private_names

X_AXIS = "trainer/step"
LIBRARY = "wandb-workspaces"
EXTRA = "workspace"
TIMES = ("wait for data, ms", "compute time, ms", "exchange with the other ranks, ms")
GPUS = ("GPU use, %", "GPU memory, GiB", "GPU power, W", "GPU temperature, °C")
# As the library's own loader asks, without the spec: a view that the web app has saved in a newer format is found too.
_FIND = """
query View($entityName: String, $name: String, $viewType: String = "runs", $viewName: String) {
    project(name: $name, entityName: $entityName) {
        allViews(viewType: $viewType, viewName: $viewName) { edges { node { id } } }
    }
}
"""


@dataclass(frozen=True)
class Place:
    """A project in W&B; `entity` None is the key's own."""

    entity: str | None
    project: str


def place_of(run: RunDir) -> Place:
    """Return where `run` is tracked: where `fnet sync` has moved it, else what its settings say."""
    tracking, moved = read_section(run.config, "tracking"), read_json(run.tracking) or {}
    return Place(moved.get("entity") or tracking.entity, moved.get("project") or tracking.project)


def save_view(place: Place, group: str | None, metrics: Iterable[str], monitor: str) -> str:
    """Create our view of the project, or of the runs of `group` in it, or replace its content; return its URL.

    Only a view of our own name is written. Raises ConfigError if there is no such project or the library has changed,
    and what the SDK raises.
    """
    api = wandb.Api()
    entity = place.entity or api.default_entity
    if entity is None:
        raise ConfigError("W&B names no user or team for this key; set tracking.entity")
    view = ws.Workspace(
        entity=entity,
        project=place.project,
        name=display_name(group),
        sections=build_sections(metrics, monitor),
        settings=ws.WorkspaceSettings(x_axis=X_AXIS),
        runset_settings=build_runset(group, monitor),
    )
    name = view_name(entity, place.project, group)
    known_id = _find_id(api, entity, place.project, name)
    # Without these two, save() makes a new view at each call. Read first: assigning alone would hide that one has gone.
    with private_names(LIBRARY, EXTRA):
        _ = view._internal_name, view._internal_id
        view._internal_name, view._internal_id = name, known_id
    with redirect_stderr(StringIO()):  # the library prints the URL there
        view.save()
    return str(view.url)


def display_name(group: str | None) -> str:
    """Return the view's title. The library refuses symbols, such as those of `lr=0.1`."""
    title = "fnet_dist" if group is None else f"fnet_dist: {group}"
    return "".join("_" if unicodedata.category(letter).startswith("S") else letter for letter in title)


def view_name(entity: str, project: str, group: str | None) -> str:
    """Return the name by which the server knows the view, in the library's form nw-ID-v.

    A function of the place and the group alone, where the library takes a random ID: so any checkout finds the view.
    """
    digest = hashlib.sha256("\n".join((entity, project, group or "")).encode()).hexdigest()
    return f"nw-{digest[:11]}-v"


def _find_id(api: wandb.Api, entity: str, project: str, name: str) -> str:
    """Return the id of the view with this name, "" if there is none. Raises ConfigError if there is no project."""
    with private_names(LIBRARY, EXTRA):  # no public call finds a view without parsing it
        from wandb_workspaces._graphql import execute_graphql

    asked = {"entityName": entity, "name": project, "viewType": "project-view", "viewName": name}
    found = execute_graphql(api, _FIND, asked).get("project")
    if found is None:
        raise ConfigError(f"W&B has no project {entity}/{project} for this key; send a run first: fnet sync RUN")
    edges = found["allViews"]["edges"]
    return str(edges[0]["node"]["id"]) if edges else ""


def build_runset(group: str | None, monitor: str) -> ws.RunsetSettings:
    """Return the list of runs: those of `group` (None: all), with how they ended and their best evaluation."""
    columns = ("outcome/status", "outcome/reason", f"best/{monitor}", "best/step")
    # The library parses it as Python after it has replaced operators, also those in quotes: every letter is escaped.
    escaped = "".join(rf"\U{ord(letter):08x}" for letter in group or "")
    filters = f'Metric("Group") == "{escaped}"' if escaped else ""
    return ws.RunsetSettings(filters=filters, pinned_columns=[f"summary:{name}" for name in columns])


def build_sections(metrics: Iterable[str], monitor: str) -> list[ws.Section]:
    """Return the view's sections for runs with these `metrics`, of which (or of loss) `monitor` picks the best.

    The panels hold for any number of ranks: a regex takes each rank's key where there are such keys.
    """
    shown = [monitor, *(name for name in metrics if name != monitor)]
    panels: dict[str, list[wr.LinePlot]] = {
        "loss": [
            _ranks("loss of each rank; above 64 ranks, their 95th percentile", "loss/(rank_[0-9]+|p95)"),
            _lines("loss: lowest rank, mean, highest rank", "loss/min", "train/loss", "loss/max"),
            _lines("loss of an epoch's training, and test loss", "train/epoch_loss", "eval/loss"),
            *(_lines(f"test {name}{', monitored' * (name == monitor)}", f"eval/{name}") for name in shown),
        ],
        "speed": [
            _lines("samples per second", "perf/samples_per_second"),
            _lines("step, ms", "perf/step_ms"),
            _lines(
                "where a step's time goes, median rank, ms", *(f"{spread_name(key)}_median" for key in TIME_SPREADS)
            ),
        ],
        "ranks": [
            _lines("straggler: slowest rank's time over the median rank's", "skew/max_over_median"),
            _lines("straggler: which rank", "skew/slowest_rank"),
            *(_spread(title, key) for title, key in zip(TIMES, TIME_SPREADS, strict=True)),
            *(_spread(title, key) for title, key in zip(GPUS, GPU_SPREADS, strict=True)),
            _lines("most GPU memory of a rank, GiB", "perf/max_memory_gib"),
        ],
        "run": [
            _lines("learning rate", "train/lr"),
            _lines("gradient norm, before clipping", "train/grad_norm"),
            _lines("attempts; 1 where one resumed after a stop or crash", "trainer/attempt", "trainer/resumed"),
            _lines("ranks", "trainer/world_size"),
        ],
    }
    sections = [ws.Section(name=name, panels=[*those], is_open=True) for name, those in panels.items()]
    media = [*_predictions(""), *_predictions("_best")]  # the best's are logged unless it is the last
    return [*sections, ws.Section(name="predictions", panels=[*media], is_open=True)]


def _lines(title: str, *keys: str) -> wr.LinePlot:
    return wr.LinePlot(title=title, x=X_AXIS, y=list(keys))


def _ranks(title: str, regex: str) -> wr.LinePlot:
    return wr.LinePlot(title=title, x=X_AXIS, metric_regex=f"^{regex}$")


def _spread(title: str, key: str) -> wr.LinePlot:
    """Return a panel with the figure of each rank, up to eight ranks, and how far apart all ranks are."""
    return _ranks(title, f"{spread_name(key)}_(rank_[0-9]+|min|median|max)")


def _predictions(suffix: str) -> list[wr.CustomChart | wr.WeavePanelSummaryTable]:
    """Return the panels of what predictions.py logs under `suffix`: empty without `tracking.log_predictions`."""
    confusion = wr.CustomChart(  # the chart and columns of wandb.plot.confusion_matrix, and the key that it appends to
        query={"summaryTable": {"tableKey": f"predictions/confusion{suffix}_table"}},
        chart_name="wandb/confusion_matrix/v1",
        chart_fields={name: name for name in ("Actual", "Predicted", "nPredictions")},
        chart_strings={"title": f"confusion, {'best' if suffix else 'last'} evaluation"},
    )
    return [confusion, wr.WeavePanelSummaryTable(table_name=f"predictions/samples{suffix}")]
