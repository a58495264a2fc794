"""`fnet workspace` saves a view and updates its own: the real library, against the backend of tests/helpers."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fnet_dist.run import metrics_log
from fnet_dist.run.metrics_log import GPU_SPREADS, TIME_SPREADS
from fnet_dist.run.run_dir import RunDir, read_json, write_json
from tests.helpers.made_run import Made, make_run
from tests.helpers.processes import Ended, start
from tests.helpers.tracked_runs import in_wandb, sync
from tests.helpers.wandb_server import WandbServer

pytestmark = pytest.mark.processes

GROUP = 'lr=0.1 > it\'s 50 % "?"'
SPREAD = {"min": 1.0, "median": 2.0, "max": 2.0, "max_rank": 1, "by_rank": [1.0, 2.0]}
# Prints what the library's own loader makes of a view's URL.
LOADER = """
import json, sys
import wandb_workspaces.workspaces as ws
def keys(panel):
    if type(panel).__name__ == "LinePlot":
        return [panel.x.name, panel.metric_regex, [metric.name for metric in panel.y]]
    return panel.query["summaryTable"]["tableKey"] if type(panel).__name__ == "CustomChart" else panel.table_name
view = ws.Workspace.from_url(sys.argv[1])
print(json.dumps({
    "name": view.name,
    "sections": {section.name: [keys(panel) for panel in section.panels] for section in view.sections},
    "columns": view.runset_settings.pinned_columns,
}))
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of two ranks with GPUs, in a group, with two attempts and with predictions."""
    run = make_run(tmp_path / "runs", Made(name="r", steps_per_epoch=50, epochs=2, ranks=(2, 2)))
    lines = list(metrics_log.read(run.metrics_log))
    for line in lines:
        if line["kind"] == "window":
            line |= dict.fromkeys((*TIME_SPREADS, *GPU_SPREADS), SPREAD) | {"slowest_rank": 1, "max_over_median": 2.0}
        elif line["kind"] == "train":
            line["grad_norm"] = 1.0
    last = {"kind": "predictions", "step": 100, "epoch": 2, "attempt": 2, "time": 1.0, "best_step": 50}
    run.metrics_log.unlink()
    metrics_log.append(run.metrics_log, [*lines, last])  # type: ignore[list-item]
    none = np.zeros(3, dtype=np.int64)
    tensors = {"true": none, "predicted": none, "worst_index": none, "losses": np.ones(3)}
    save_file(tensors, run.predictions, {"step": "100"})
    save_file(tensors, run.best_predictions, {"step": "50"})
    write_json(run.manifest, read_json(run.manifest) | {"id": "0123456789abcdef"})
    tracking = {"project": "a project", "entity": None, "name": "r", "group": GROUP, "log_every_steps": 7}
    write_json(run.config, read_json(run.config) | {"tracking": {"wandb": "offline", "log_model": False} | tracking})
    return run


def workspace(folder: Path, server: WandbServer, *words: str, **environment: str) -> Ended:
    """Run `fnet workspace` in `folder`."""
    with start("-m", "jobs", "workspace", *words, cwd=folder, **server.environment() | environment) as command:
        return command.end()


def saved(folder: Path, server: WandbServer, *words: str) -> str:
    """Run `fnet workspace`; return the URL, which is all that it prints."""
    ended = workspace(folder, server, *words)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(f"{server.url}/tester/a project?nw=")
    assert ended.out.count("\n") == 1
    return ended.out.rstrip("\n")


def load(url: str, server: WandbServer) -> Any:
    """Return what LOADER prints of the view at `url`."""
    with start("-c", LOADER, url, **server.environment()) as loader:
        ended = loader.end()
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def test_the_librarys_loader_reads_five_sections_back_whose_keys_are_in_the_runs_history(
    run: RunDir, server: WandbServer, tmp_path: Path
) -> None:
    sync(run, server)
    view = load(saved(tmp_path, server), server)
    assert view["name"] == "fnet_dist"
    assert list(view["sections"]) == ["loss", "speed", "ranks", "run", "predictions"]
    sent = in_wandb(run, server)
    keys = {key for row in sent.history for key in row}
    tables = view["sections"].pop("predictions")
    assert tables == [
        f"predictions/{key}" for key in ("confusion_table", "samples", "confusion_best_table", "samples_best")
    ]
    assert {*tables} <= keys
    drawn = sent.raw_config["_wandb"]["value"]["visualize"]["predictions/confusion"]["panel_config"]
    chart = json.loads(server.views.kept[0].spec)["section"]["panelBankConfig"]["sections"][4]["panels"][0]["config"]
    same = ("panelDefId", "fieldSettings", "transform")
    assert [chart[key] for key in same] == [drawn[key] for key in same]  # as the SDK itself draws it
    for panel in [panel for panels in view["sections"].values() for panel in panels]:
        x, regex, names = panel
        assert x == "trainer/step"
        assert {*names} <= keys
        assert names or any(re.search(regex, key) for key in keys), panel
    assert ["trainer/step", "^loss/(rank_[0-9]+|p95)$", []] in view["sections"]["loss"]
    assert {*view["columns"]} - {"run:displayName"} <= {f"summary:{key}" for key in sent.summary}
    assert len(view["columns"]) == 5


def test_a_second_call_from_another_checkout_updates_the_view_and_touches_no_other(
    run: RunDir, server: WandbServer, tmp_path: Path
) -> None:
    sync(run, server)
    url = saved(tmp_path, server, "r")
    (ours,) = server.views.kept
    # A colleague's view has the same title, and was made later.
    server.views.kept.append(replace(ours, id="theirs", name="nw-0123abcdefg-v", spec="{}"))
    before = [replace(view) for view in server.views.kept]
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(run.path, elsewhere / "runs" / "r")
    copied = RunDir(elsewhere / "runs" / "r")
    write_json(copied.manifest, read_json(copied.manifest) | {"metrics": {"f1": "higher"}, "monitor": "f1"})
    assert saved(elsewhere, server) == url
    assert len(server.views.kept) == 2
    assert server.views.kept[1] == before[1]
    assert server.views.kept[0] == replace(before[0], spec=server.views.kept[0].spec)
    shown = [names for _, _, names in load(url, server)["sections"]["loss"]]
    assert ["eval/f1"] in shown
    assert ["eval/accuracy"] not in shown


def test_a_group_has_a_view_of_its_own_that_lists_only_its_runs(
    run: RunDir, server: WandbServer, tmp_path: Path
) -> None:
    make_run(tmp_path / "runs", Made(name="newer, in no group"))
    sync(run, server)
    sweep = Path("runs", "sweeps", GROUP)
    (tmp_path / sweep).mkdir(parents=True)
    urls = [saved(tmp_path, server, word) for word in ("r", GROUP, str(sweep))]
    assert urls[0] != urls[1] == urls[2]
    of_all, of_group = [json.loads(view.spec)["section"]["runSets"][0]["filters"] for view in server.views.kept]
    assert of_all["filters"] == []
    (only,) = of_group["filters"]
    assert (only["key"], only["op"], only["value"]) == ({"section": "run", "name": "group"}, "=", GROUP)
    assert load(urls[1], server)["name"] == 'fnet_dist: lr_0.1 _ it\'s 50 % "?"'


def test_whatever_is_missing_is_one_line(run: RunDir, server: WandbServer, tmp_path: Path) -> None:
    library = tmp_path / "without" / "wandb_workspaces.py"
    library.parent.mkdir()
    library.write_text("raise ModuleNotFoundError(\"No module named 'wandb_workspaces'\", name='wandb_workspaces')")
    for words, environment, said in (
        (("s",), {}, f"no run 's': .* nor is it a group \\(tracking.group\\); newest there: {re.escape(GROUP)}$"),
        (("r",), {"PYTHONPATH": str(library.parent)}, r".* is missing: pip install -e '\.\[workspace\]'$"),
        (("r",), {"WANDB_API_KEY": ""}, "W&B cannot be reached from here: no API key for "),
        (("r",), {}, "W&B has no project tester/a project for this key; send a run first: fnet sync RUN$"),
    ):
        ended = workspace(tmp_path, server, *words, **environment)
        assert (ended.code, ended.out) == (2, "")
        assert re.match(f"error: {said}", ended.err), ended.err
        assert ended.err.count("\n") == 1
    sync(run, server)
    server.fail = {"graphql": 403}
    ended = workspace(tmp_path, server)
    assert (ended.code, ended.out, ended.err.count("\n")) == (1, "", 1)
    assert ended.err.startswith("error: W&B has not taken the view: ")
    assert server.views.kept == []
