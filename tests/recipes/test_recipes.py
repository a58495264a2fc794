"""Five users' own projects, as recipes outside the package: each keeps every promise and shows its own metrics."""

import json
import os
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from fnet_dist.checkpoint.storage import checkpoint_steps
from fnet_dist.config.schema import config_class
from fnet_dist.run import metrics_log
from fnet_dist.run.run_dir import RunDir, read_json
from jobs.commands.evaluate import evaluate_run
from jobs.report.html import write_report
from jobs.report.run_data import read_run_data
from jobs.verification.compare_runs import run_differences
from jobs.verification.supervised_run import ranks_of
from tests.helpers.processes import JOBS_RUN, REPOSITORY, start, wait_until
from tests.helpers.ranks import run_ranks
from tests.helpers.tracked_runs import check_rows, read_back
from tests.helpers.training import train_in_group

pytestmark = pytest.mark.processes

HERE = Path(__file__).parent
COLOURS = {"blue": (20, 40, 200), "green": (30, 180, 60), "red": (200, 40, 30)}


@dataclass(frozen=True)
class Project:
    """A recipe, its job file, and the metrics that it should show."""

    settings: str
    metrics: tuple[str, ...]
    # Weights to this in float64; losses and metrics always to 1e-12. The loss does not depend on an attention's key
    # bias: Adam divides the rounding of its gradient, which is zero, by itself.
    weights_within: float = 1e-12


PROJECTS = {
    "images": Project(
        "[data]\nroot = '{root}'\n[loss]\nlabel_smoothing = 0.1\n[schedule]\nname = 'cosine'\n"
        "[optim]\nname = 'sgd'\nlr = 0.1\nmomentum = 0.9\nweight_decay = 0.01\ndecay_all = false\n",
        ("accuracy", "top2"),
    ),
    "regression": Project("[optim]\nlr = 0.01\n", ("rmse", "mae", "r2", "within_half")),
    "characters": Project("[optim]\nlr = 0.01\n", ("perplexity",), weights_within=1e-9),
    "frozen": Project("[parallel]\nunused_parameters = true\n[optim]\nname = 'adamw'\nlr = 0.01\n", ("accuracy",)),
    "sequences": Project("[optim]\nlr = 0.01\n", ("accuracy",)),
}
EVERYWHERE = ["--data.global-batch-size", "20", "--run.epochs", "4", "--run.evaluate-every-steps", "9"]
EVERYWHERE += ["--checkpoint.keep-best", "true", "--tracking.log-every-steps", "5"]


def squares(folder: Path) -> None:
    """Write small coloured images: a square somewhere on noise."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 37), ("test", 11)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                image = torch.randint(120, (3, 16, 16), generator=generator, dtype=torch.uint8)
                x, y = torch.randint(8, (2,), generator=generator).tolist()
                image[:, y : y + 8, x : x + 8] = torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1)
                Image.fromarray(image.movedim(0, -1).numpy()).save(folder / split / name / f"{number:02}.png")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A user's directory: a package with the recipes, job files, and images."""
    lab = tmp_path_factory.mktemp("lab").resolve()
    (lab / "my_lab").mkdir()
    squares(lab / "squares")
    for name, project in PROJECTS.items():
        shutil.copy(HERE / f"{name}.py", lab / "my_lab")
        settings = project.settings.replace("{root}", str(lab / "squares"))
        (lab / f"{name}.toml").write_text(f'recipe = "my_lab.{name}"\n{settings}')
    return lab


def train(lab, name, *words, kills=False):
    """Train on two ranks, and return the run and what was printed; kill a rank once there is a checkpoint."""
    words = (f"{name}.toml", "--nproc-per-node", "2", *EVERYWHERE, *words)
    run = RunDir(lab / "runs" / words[words.index("--run.name") + 1])
    with start(*JOBS_RUN, *words, cwd=lab, PYTHONPATH=str(REPOSITORY), FNET_DATA="") as launcher:
        if kills:
            ranks = wait_until(lambda: checkpoint_steps(run) and ranks_of(launcher.process.pid))
            os.kill(ranks[1], signal.SIGKILL)
        ended = launcher.end(120)
    assert ended.code == 0, ended.err
    return run, ended


@pytest.fixture(params=PROJECTS, scope="module")
def project(request, lab):
    """Return a project's name, its undisturbed run on two ranks, and what that printed."""
    run, ended = train(lab, request.param, "--run.name", request.param, "--tracking.wandb", "offline")
    return request.param, run, ended


def test_a_killed_rank_changes_no_bit(project, lab):
    name, undisturbed, _ = project
    more = ("--run.name", f"{name}-killed", "--checkpoint.every-steps", "2", "--tracking.wandb", "disabled")
    run, ended = train(lab, name, *more, kills=True)
    assert "rank 1 failed first: was killed by SIGKILL" in ended.err
    assert run_differences(undisturbed, run) == []


def test_everything_shows_the_recipes_own_metrics(project, lab, monkeypatch):
    name, run, ended = project
    monkeypatch.chdir(lab)
    monkeypatch.delenv("FNET_DATA", raising=False)  # it would be the images' root
    metrics = PROJECTS[name].metrics
    evaluations = [line for line in metrics_log.read(run.metrics_log) if line["kind"] == "eval"]
    assert {tuple(line["metrics"]) for line in evaluations} == {metrics}
    assert all(f"test {metric}" in ended.out for metric in metrics)
    assert tuple(read_json(run.outcome)["metrics"]) == ("loss", *metrics)

    page = write_report(read_run_data(run)).read_text()
    assert all(f"test {metric}" in page for metric in metrics)
    assert ("most often taken for" in page) == (metrics[0] == "accuracy")

    result = evaluate_run(run).evaluation
    assert result.metrics == pytest.approx(evaluations[-1]["metrics"], rel=1e-4)
    best = evaluate_run(run, best=True).evaluation
    assert best.value(metrics[0]) == pytest.approx(read_json(run.best)["value"], rel=1e-4)

    rows = read_back(run)
    check_rows(rows, run)
    assert {f"eval/{metric}" for metric in metrics} <= {key for row in rows for key in row}


def test_the_recipe_of_the_readme_trains_as_printed(tmp_path):
    text = (REPOSITORY / "fnet_dist/recipes/README.md").read_text()
    for kind, name in (("python", "spirals.py"), ("toml", "spirals.toml")):
        [block] = re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        assert block.count("\n") <= 60
        (tmp_path / name).write_text(block)
    with start(*JOBS_RUN, "spirals.toml", "--nproc-per-node", "2", cwd=tmp_path, PYTHONPATH=str(REPOSITORY)) as run:
        ended = run.end(120)
    assert ended.code == 0, ended.err
    accuracy = re.search(r"test accuracy +([\d.]+) on spirals", ended.out)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.9
    assert "test top2" in ended.out


def train_in_float64(group, lab, name, root):
    """Train in float64 as one of the ranks, from the same settings as the job file."""
    torch.set_default_dtype(torch.float64)
    os.chdir(lab)
    from fnet_dist.config.load import load_config

    words = [
        "--config",
        f"{name}.toml",
        "--run.name",
        name,
        *EVERYWHERE,
        "--run.root",
        root,
        "--tracking.wandb",
        "disabled",
    ]
    config = load_config(words, env={})
    assert isinstance(config, config_class(f"my_lab.{name}"))
    train_in_group(group, config)


@pytest.mark.parametrize("name", PROJECTS)
def test_one_rank_and_two_train_alike_in_float64(lab, name):
    for ranks in (1, 2):
        run_ranks(train_in_float64, ranks, lab, name, str(lab / f"float64-{ranks}"))
    one, two = (RunDir(lab / f"float64-{ranks}" / name) for ranks in (1, 2))
    for kind, keys in (("train", ("loss",)), ("eval", ("loss", "metrics"))):
        alone, shared = (
            [[line[key] for key in keys] for line in metrics_log.read(run.metrics_log) if line["kind"] == kind]
            for run in (one, two)
        )
        flat = [np.array([*_numbers(lines)]) for lines in (alone, shared)]
        assert len(flat[0]) > 5
        np.testing.assert_allclose(flat[1], flat[0], rtol=1e-12, atol=1e-12)
    weights = [load_file(run.model) for run in (one, two)]
    for key in weights[0]:
        np.testing.assert_allclose(weights[1][key], weights[0][key], rtol=0, atol=PROJECTS[name].weights_within)
    assert json.loads(one.best.read_text())["step"] == json.loads(two.best.read_text())["step"]


def _numbers(value):
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _numbers(each)
    else:
        yield value
