"""The run's name: the job file's, plus a hash of the overrides that change the result."""

import json
import re
import shutil
from pathlib import Path

import pytest

from fnet_dist.config.load import load_config
from fnet_dist.errors import ConfigError


@pytest.fixture
def job(tmp_path):
    return write(tmp_path / "job.toml", "[run]\nepochs = 3\n[optim]\nlr = 3e-3\n")


def write(path, text):
    path.write_text(text)
    return path


def name_of(job, words):
    return load_config(["--config", str(job), *words.split()], {}).run.name


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--optim.lr 0.003",
        "--run.root /elsewhere --run.max-steps 5 --run.epochs 7",
        "--data.num-workers 2 --data.root /x --parallel.timeout-s 9",
        "--tracking.wandb offline --tracking.project p --tracking.log-every-steps 5 --tracking.log-model true",
        "--checkpoint.every-seconds 9 --checkpoint.every-steps 9 --checkpoint.keep-last 9 --checkpoint.resume required",
    ],
)
def test_overrides_that_do_not_change_the_result_do_not_change_the_name(job, words):
    assert name_of(job, words) == "job"


def test_overrides_that_change_the_result_give_a_new_name(job):
    one = "--optim.lr 0.001", "--run.seed 1", "--optim.name sgd", "--schedule.name cosine", "--model.dropout 0.5"
    two = "--optim.lr 0.001 --run.seed 1", "--schedule.name cosine --run.epochs 7"
    names = [name_of(job, words) for words in (*one, *two)]
    assert len({*names}) == len(names)
    assert all(re.fullmatch(r"job-[0-9a-f]{6}", name) for name in names)


def test_the_name_in_wandb_has_the_overrides_that_change_the_result(job):
    def shown(words):
        return load_config(["--config", str(job), *words.split()], {}).tracking.name

    assert shown("--run.max-steps 9") == "job"
    changed = "--optim.lr 0.001 --model.dropout 0.25"
    assert shown(changed) == f"{name_of(job, changed)} model.dropout=0.25 optim.lr=0.001"
    assert shown(f"{changed} --tracking.name mine") == "mine"


def test_order_and_spelling_of_overrides_do_not_change_the_name(job):
    name = name_of(job, "--optim.lr 1e-3 --run.seed 1 --data.global-batch-size=32")
    assert name_of(job, "--data.global_batch_size 32 --run.seed=01 --optim.lr 0.001") == name
    assert name_of(job, "--run.seed=1 --optim.lr=none --data.global-batch-size=32 --run.epochs=4") == name


def test_this_name_is_the_same_in_every_version(job):
    """A new version must resume a run in the directory that an earlier version named."""
    assert name_of(job, "--optim.lr 0.001 --run.seed 1") == "job-a545da"


def test_a_job_file_that_is_valid_only_with_its_overrides_gets_a_name(job):
    write(job, "[model]\nhead = 'softmax'")
    assert re.fullmatch(r"job-[0-9a-f]{6}", name_of(job, "--model.head log_softmax"))


def test_a_given_name_is_used_unchanged(job):
    assert name_of(job, "--run.name mine --optim.lr 1") == "mine"
    write(job, "run.name = 'file'")
    assert name_of(job, "--optim.lr 1") == "file"
    assert name_of(job, "--run.name none") == "job"


def test_a_job_file_whose_name_is_no_valid_run_name_is_refused(tmp_path):
    job = write(tmp_path / "my job.toml", "")
    message = r"^run.name: the job file's name gives 'my job', expected 1 to 64 .*; fix: --run.name NAME$"
    with pytest.raises(ConfigError, match=message):
        name_of(job, "")
    assert name_of(job, "--run.name x") == "x"


# A run's config.json --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """A run directory: runs/a."""
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    settings = {"run": {"name": "a", "root": str(folder.parent), "epochs": 3}}
    write(folder / "config.json", json.dumps(settings))
    write(folder / "manifest.json", '{"id": "0123"}')
    return folder


def loaded(folder, words=""):
    config = load_config(["--config", str(folder / "config.json"), *words.split()], {}).run
    return Path(config.root, config.name)


def test_the_config_of_a_run_that_was_moved_goes_on_where_it_is_now(run, tmp_path):
    assert loaded(run) == run
    moved = run.rename(tmp_path / "b")
    assert loaded(moved) == moved
    assert loaded(moved, "--run.name c") == tmp_path / "c"
    run.mkdir()  # another run has the old name now
    write(run / "manifest.json", '{"id": "4567"}')
    assert loaded(moved) == moved


def test_a_run_by_another_path_is_not_a_moved_one(run, tmp_path):
    (tmp_path / "newest").symlink_to(run)
    assert loaded(tmp_path / "newest") == run


def test_a_copy_of_a_run_is_refused_unless_it_is_named(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "b"))
    message = r"b is a copy of .*/runs/a; .* give --run.name NAME and --checkpoint.resume with one of its checkpoints"
    with pytest.raises(ConfigError, match=message):
        loaded(copy)
    assert loaded(copy, "--run.name c") == tmp_path / "c"


def test_a_copy_of_the_file_alone_is_a_job_file_of_the_run(run, tmp_path):
    (tmp_path / "mine").mkdir()
    shutil.copy(run / "config.json", tmp_path / "mine")
    assert loaded(tmp_path / "mine") == run
