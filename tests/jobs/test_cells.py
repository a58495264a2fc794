"""A sweep's cells: found by its name or a job's id, in the order of its table, named by the settings that differ."""

from pathlib import Path

import pytest

from fnet_dist.errors import ConfigError
from fnet_dist.run.run_dir import SWEEPS, RunDir, read_json, write_json
from jobs.cells import cell_labels, find_runs
from jobs.runs import find_run_or_job
from tests.helpers.made_run import Made, make_run


def test_cells_are_named_by_what_differs_and_by_sections_where_the_last_word_is_not_enough():
    tracking = {"group": "sweep"}
    cells = [
        {"run": {"name": str(number)}, "optim": {"name": name, "lr": 0.1 * number}, "loss": {"name": loss}}
        for number, (name, loss) in enumerate([("sgd", "nll"), ("adam", "mse")])
    ]
    named = ["optim.name sgd, lr 0.0, loss.name nll", "optim.name adam, lr 0.1, loss.name mse"]
    assert cell_labels([{**cell, "tracking": tracking} for cell in cells]) == named
    assert cell_labels(cells) is None, "runs that no sweep has made keep their names"


def test_cells_that_share_a_task_are_found_by_its_id_in_the_order_of_the_sweep(tmp_path: Path) -> None:
    home = RunDir(tmp_path / SWEEPS / "sweep")
    home.path.mkdir(parents=True)
    write_json(home.sweep, {"command": "fnet sweep", "seed": 0, "runs": {"c": "", "a": "", "b": ""}})
    for name, task in (("a", "7_1"), ("b", "7_0"), ("c", "7_1"), ("other", "70")):
        run = make_run(tmp_path, Made(name=name, steps=0, finished=False))
        write_json(
            run.config, read_json(run.config) | {"tracking": {"group": "sweep"}} if name != "other" else {"x": 1}
        )
        write_json(run.job, {"id": task, "cluster": "slurm", "time": 0})
    found = {text: [run.name for run in find_runs(text, tmp_path)] for text in ("sweep", "7", "7_1", "7_0", "70")}
    assert found == {"sweep": [*"cab"], "7": [*"cab"], "7_1": [*"ca"], "7_0": ["b"], "70": ["other"]}
    with pytest.raises(ConfigError, match=r"^job 7_1 is of 2 runs: a, c; name one of them$"):
        find_run_or_job("7_1", tmp_path)
