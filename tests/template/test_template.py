"""A user's own model and data: four files of a copy of this tree are replaced, and all others work unchanged."""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fnet_dist.checkpoint.storage import checkpoint_steps
from fnet_dist.dataset import CLASS_NAMES
from fnet_dist.run import metrics_log
from fnet_dist.run.run_dir import RunDir, read_json
from jobs.verification.compare_runs import run_differences
from tests.helpers.processes import JOBS_RUN, children, start, wait_until, words_after_python
from tests.helpers.tracked_runs import check_rows, read_back

pytestmark = pytest.mark.processes

HERE = Path(__file__).parent
COPIED = ("fnet_dist", "jobs", "slurm", "pyproject.toml")
CLASSES = ("DataConfig", "ModelConfig")
NO_CLASSES = "class DataConfig: ...\nclass ModelConfig: ...\n"
FASHION_FILES = {"model.py", "dataset.py", "data/synthetic.py", "data/fashion_mnist.py"}
JOB = ("--config", "jobs/shapes.toml")
TRAIN_COUNT, TEST_COUNT, BATCH, EPOCHS = 1003, 301, 33, 2
STEPS = 31  # an epoch; its last batch has 13 samples
KINDS = ("disc", "ring", "square", "diamond", "cross", "stripes", "checks")


@dataclass(frozen=True)
class Trained:
    """A run and its output."""

    run: RunDir
    printed: str

    def lines(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in metrics_log.read(self.run.metrics_log) if line["kind"] == kind]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A copy of the packages with a user's files in it."""
    tree = tmp_path_factory.mktemp("template").resolve()
    for name in COPIED:
        if (repository / name).is_dir():
            shutil.copytree(repository / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(repository / name, tree / name)
    shutil.copy(HERE / "model.py", tree / "fnet_dist" / "model.py")
    shutil.copy(HERE / "dataset.py", tree / "fnet_dist" / "dataset.py")
    shutil.copy(HERE / "shapes.toml", tree / "jobs" / "shapes.toml")
    schema = tree / "fnet_dist" / "config" / "schema.py"
    schema.write_text(put_in(schema.read_text(), (HERE / "sections.py").read_text()))
    return tree


@pytest.fixture(scope="module")
def two_ranks(tree: Path) -> Trained:
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = python(tree, *ranks, "-m", "fnet_dist.train", *JOB, "--tracking.wandb", "offline")
    assert done.returncode == 0, done.stderr
    return Trained(RunDir(tree / "runs" / "shapes"), done.stdout)


@pytest.fixture(scope="module")
def one_rank(tree: Path) -> Trained:
    done = python(tree, "-m", "fnet_dist.train", *JOB, "--run.root", "alone")
    assert done.returncode == 0, done.stderr
    return Trained(RunDir(tree / "alone" / "shapes"), done.stdout)


def environment(tree: Path) -> dict[str, str]:
    """Return variables for processes in the copy.

    FNET_DATA is set on many machines, and these data have no setting for it. Two ranks cannot share a machine's one
    GPU. Coverage is off: it would count the copy's files in addition to the repository's.
    """
    return {
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "FNET_DATA": "/nowhere",
        "CUDA_VISIBLE_DEVICES": "",
        "COVERAGE_PROCESS_CONFIG": "",
        "COVERAGE_PROCESS_START": "",
    }


def python(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the copy until it ends."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        env={**os.environ, **environment(tree)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def put_in(config: str, sections: str) -> str:
    """Return `config` with its classes replaced by those of the same names in `sections`."""
    lines = config.splitlines()
    for name in CLASSES:
        lines[lines_of(config, name)] = sections.splitlines()[lines_of(sections, name)]
        config = "\n".join(lines) + "\n"
    return config


def lines_of(text: str, name: str) -> slice:
    """Return the lines of the class or function `name` in `text`, decorators included."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    found = next(node for node in ast.parse(text).body if isinstance(node, kinds) and node.name == name)
    first = min([found.lineno, *(decorator.lineno for decorator in found.decorator_list)])
    return slice(first - 1, found.end_lineno)


def contents(root: Path) -> dict[str, bytes]:
    files = [path for name in COPIED for path in (root / name, *(root / name).rglob("*"))]
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in files
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_only_the_users_four_files_differ_and_the_copy_is_imported(tree: Path, repository: Path) -> None:
    before, after = contents(repository), contents(tree)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {"fnet_dist/model.py", "fnet_dist/dataset.py", "fnet_dist/config/schema.py", "jobs/shapes.toml"}
    without = [put_in((root / "fnet_dist/config/schema.py").read_text(), NO_CLASSES) for root in (repository, tree)]
    assert without[0] == without[1]
    done = python(tree, "-c", "import fnet_dist, jobs; print(fnet_dist.__file__, jobs.__file__)")
    assert done.stdout.split() == [str(tree / "fnet_dist/__init__.py"), str(tree / "jobs/__init__.py")]


def test_two_ranks_log_every_step_once_and_evaluate_every_image_once(two_ranks: Trained) -> None:
    steps, epochs = two_ranks.lines("train"), two_ranks.lines("epoch")
    assert [line["step"] for line in steps] == list(range(1, EPOCHS * STEPS + 1))
    samples = 0
    for line in steps:
        size = line["samples"] - samples
        samples = line["samples"]
        assert size == (13 if line["step"] % STEPS == 0 else BATCH)
        # Two local batches of unequal size, 17 and 16, in the last batch 7 and 6: the mean is weighted by it.
        local = (size + 1) // 2
        first, second = line["loss_per_rank"]
        assert line["loss"] == pytest.approx((first * local + second * (size - local)) / size, rel=1e-9)
    assert [(line["epoch"], line["step"], line["test_count"]) for line in epochs] == [
        (1, STEPS, TEST_COUNT),
        (2, 2 * STEPS, TEST_COUNT),
    ]
    assert samples == EPOCHS * TRAIN_COUNT
    assert epochs[-1]["test_accuracy"] > 0.8  # one in seven is chance
    assert read_json(two_ranks.run.config)["model"] == {"channels": 16, "norm": "none"}
    assert read_json(two_ranks.run.manifest)["dataset"]["class_names"] == list(KINDS)


def test_wandb_offline_has_the_same_keys_and_each_row_once(two_ranks: Trained) -> None:
    check_rows(read_back(two_ranks.run), two_ranks.run)


@pytest.mark.soak
def test_a_killed_rank_is_restarted_and_training_is_bit_identical(two_ranks: Trained, tree: Path) -> None:
    run = RunDir(tree / "killed" / "shapes")
    words = (*JOBS_RUN, "jobs/shapes.toml", "--nproc-per-node", "2", "--run.root", "killed")
    with start(*words, "--checkpoint.every-steps", "10", cwd=tree, **environment(tree)) as launcher:
        ranks = wait_until(lambda: checkpoint_steps(run) and children(launcher.process.pid))
        os.kill(ranks[1], signal.SIGKILL)
        ended = launcher.end(120)
    assert ended.code == 0, ended.err
    assert "rank 1 failed first: was killed by SIGKILL" in ended.err
    assert re.search(r"going on from step \d0 \(epoch", ended.out)
    assert run_differences(two_ranks.run, run) == []


def test_one_rank_and_two_train_on_the_same_batches(one_rank: Trained, two_ranks: Trained) -> None:
    alone, shared = one_rank.lines("train"), two_ranks.lines("train")
    assert [line["samples"] for line in alone] == [line["samples"] for line in shared]
    assert {len(line["loss_per_rank"]) for line in alone} == {1}
    np.testing.assert_allclose([line["loss"] for line in shared[:20]], [line["loss"] for line in alone[:20]], rtol=1e-4)
    assert one_rank.lines("epoch")[-1]["test_count"] == TEST_COUNT


def test_predictions_are_in_order_of_the_images_with_thumbnails_in_colour(two_ranks: Trained) -> None:
    predictions = load_file(two_ranks.run.predictions)
    np.testing.assert_array_equal(predictions["true"], np.arange(TEST_COUNT) % len(KINDS))
    correct = int((predictions["predicted"] == predictions["true"]).sum())
    assert correct == two_ranks.lines("epoch")[-1]["test_correct"]
    assert predictions["thumbnails"].shape == (40, 32, 32, 3)
    assert np.ptp(predictions["thumbnails"], axis=-1).max() > 100  # not grey


def test_the_printed_report_command_works_and_evaluate_agrees(two_ranks: Trained, tree: Path) -> None:
    opening, *table, command, sync_command = two_ranks.printed.splitlines()
    assert opening.startswith("coloured shapes: 1,003 samples, 31 steps")  # once: rank 1 is silent
    assert any("dataset" in line and "coloured shapes; 1,003 training and 301 test" in line for line in table)
    assert "coloured shapes data" not in "".join(table)
    assert command.endswith(" report shapes")
    assert sync_command.endswith(" sync shapes")
    reported = python(tree, *words_after_python(command))
    evaluated = python(tree, "-m", "jobs", "evaluate", "shapes")
    assert (reported.returncode, evaluated.returncode) == (0, 0), reported.stderr + evaluated.stderr

    page = re.sub(r'src="data:[^"]*"', "", (two_ranks.run.report / "index.html").read_text())
    for words in ("coloured shapes", *KINDS):
        assert words in page
    correct = two_ranks.lines("epoch")[-1]["test_correct"]
    assert f"{100 * correct / TEST_COUNT:.2f} % of {TEST_COUNT} right" in evaluated.stdout
    assert [line.split()[0] for line in evaluated.stdout.splitlines()[1:8]] == list(KINDS)
    everything = page + two_ranks.printed + reported.stdout + evaluated.stdout
    assert "fashion" not in everything.lower()
    assert "WARNING" not in everything


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--model.chanels", "8"], ("model.chanels", "model.channels")),
        (["--loss.name", "nll"], ("loss.name nll", "cross_entropy")),
    ],
)
def test_a_users_own_settings_are_checked_like_all_others(
    tree: Path, overrides: list[str], words: tuple[str, ...]
) -> None:
    done = python(tree, "-m", "fnet_dist.train", *JOB, *overrides, "--run.name", "refused")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    for word in words:
        assert word in done.stderr
    assert not (tree / "runs" / "refused").exists()


def test_only_the_files_that_a_user_replaces_know_the_shape_and_the_classes(repository: Path) -> None:
    package, jobs = repository / "fnet_dist", repository / "jobs"
    words = "|".join(map(re.escape, CLASS_NAMES))
    known = re.compile(
        rf"fashion|mnist|garment|784|28\W{{1,3}}28|\b({words})\b|"
        r"\b(10|ten)\b.*\bclass(es|_)|\bclass(es|_).*\b(10|ten)\b",
        re.IGNORECASE,
    )
    # The job files and the `data` command are for these data.
    own = {jobs / "commands" / "data.py", *(package / name for name in FASHION_FILES)}
    found = []
    for path in sorted({*package.rglob("*.py"), *jobs.rglob("*.py")} - own):
        text = path.read_text()
        if path == package / "config" / "schema.py":
            text = put_in(text, NO_CLASSES)
        if path == jobs / "submission" / "preflight.py":
            # Two functions check the official files before a job is submitted; for other data they do nothing.
            for name in ("is_official", "missing_data"):
                lines = text.splitlines()
                del lines[lines_of(text, name)]
                text = "\n".join(lines)
            text = text.replace("from fnet_dist.data.fashion_mnist import verify\n", "")
        found += [f"{path.relative_to(repository)}: {line.strip()}" for line in text.splitlines() if known.search(line)]
    assert found == []
