"""The settings: their names and defaults, the order of their sources, conflicts, and config.json."""

import inspect
import json
import os
import re
import subprocess
import sys

import pytest
from pydantic import ValidationError

from fnet_dist.config import help as settings_help
from fnet_dist.config.load import changed_settings, dump_config, load_config, read_config, read_section, result_settings
from fnet_dist.config.schema import TORCH_DEFAULTS, OptimConfig, sections
from fnet_dist.errors import ConfigError
from fnet_dist.recipes.fashion_mnist.settings import ModelConfig
from tests.helpers.config import FashionConfig
from tests.helpers.job_files import error, load, write

# Names and defaults --------------------------------------------------------------------------------------------------


def test_these_are_all_settings():
    """A new setting must be added here too."""
    assert {name: [*model.model_fields] for name, model in sections(FashionConfig).items()} == {
        "run": ["name", "root", "mode", "seed", "epochs", "max_steps", "evaluate_every_steps", "monitor", "patience"],
        "data": ["global_batch_size", "drop_last", "dataset", "root", "augment", "num_workers"],
        "model": ["form", "activation", "dropout", "head"],
        "loss": ["name", "class_weights", "label_smoothing"],
        "optim": ["name", "lr", "weight_decay", "momentum", "nesterov", "betas", "eps", "decay_all", "max_grad_norm"],
        "schedule": ["name", "warmup_steps"],
        "parallel": [
            "device",
            "precision",
            "numerics",
            "logical_shards",
            "hash_every_steps",
            "numa_binding",
            "compile",
            "grad_accum_steps",
            "unused_parameters",
            "sync_batchnorm",
            "timeout_s",
            "max_restarts",
            "replay_on_failure",
            "fork_ranks",
        ],
        "checkpoint": ["every_seconds", "every_steps", "every_epochs", "keep_last", "keep_best", "resume"],
        "tracking": [
            *("wandb", "project", "entity", "name", "group"),
            *("log_every_steps", "log_model", "log_predictions", "alerts"),
        ],
        "resources": [
            *("nodes", "gpus_per_node", "nproc_per_node", "cpus_per_rank", "mem_gb", "time", "signal_s"),
            *("max_requeues", "max_node_failures"),
        ],
    }


def test_an_empty_job_file_gives_the_defaults(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert dump_config(load(write(tmp_path / "empty.toml", ""))) == {
        "recipe": "fnet_dist.recipes.fashion_mnist",
        "run": {
            "name": "empty",
            "root": "runs",
            "mode": "private",
            "seed": 0,
            "epochs": 10,
            "max_steps": None,
            "evaluate_every_steps": None,
            "monitor": None,
            "patience": None,
        },
        "data": {
            "drop_last": False,
            "augment": False,
            "dataset": "fashion-mnist",
            "root": "/home/someone/.pytorch/F_MNIST_data",
            "global_batch_size": 64,
            "num_workers": 0,
        },
        "model": {"form": "modules", "activation": "relu", "dropout": 0.0, "head": "log_softmax"},
        "loss": {"name": "nll", "class_weights": None, "label_smoothing": 0.0},
        "optim": {
            "name": "adam",
            "lr": 1e-3,
            "weight_decay": 0.0,
            "momentum": 0.0,
            "nesterov": False,
            "betas": None,
            "eps": None,
            "decay_all": True,
            "max_grad_norm": None,
        },
        "schedule": {"name": "constant", "warmup_steps": 0},
        "parallel": {
            "device": "auto",
            "precision": "fp32",
            "numerics": "fast",
            "logical_shards": 8,
            "hash_every_steps": 1000,
            "numa_binding": True,
            "compile": False,
            "grad_accum_steps": 1,
            "unused_parameters": False,
            "sync_batchnorm": False,
            "timeout_s": 120.0,
            "max_restarts": 3,
            "replay_on_failure": True,
            "fork_ranks": True,
        },
        "checkpoint": {
            "every_seconds": 300.0,
            "every_steps": None,
            "every_epochs": 1,
            "keep_last": 2,
            "keep_best": False,
            "resume": "auto",
        },
        "tracking": {
            "wandb": "auto",
            "project": "fnet_dist",
            "entity": None,
            "name": "empty",
            "group": None,
            "log_every_steps": 50,
            "log_model": False,
            "log_predictions": False,
            "alerts": "off",
        },
        "resources": {
            "nodes": 1,
            "gpus_per_node": 0,
            "nproc_per_node": None,
            "cpus_per_rank": 1,
            "mem_gb": None,
            "time": "1:00:00",
            "signal_s": None,
            "max_requeues": 10,
            "max_node_failures": 2,
        },
    }


def test_the_table_of_torch_defaults_is_that_of_the_installed_torch():
    import torch

    classes = {name.lower(): getattr(torch.optim, name) for name in dir(torch.optim)}
    for name, (lr, weight_decay) in TORCH_DEFAULTS.items():
        parameters = inspect.signature(classes[name]).parameters
        assert lr == parameters["lr"].default, name
        assert weight_decay == (parameters["weight_decay"].default if "weight_decay" in parameters else 0), name
        assert (OptimConfig(name=name).lr, OptimConfig(name=name).weight_decay) == (lr, weight_decay)


def test_importing_the_settings_loads_no_torch_numpy_or_rich():
    code = "import sys, fnet_dist.config.load; print({'torch', 'numpy', 'rich'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_help_shows_every_setting_within_100_columns():
    text = settings_help.settings_help(FashionConfig)
    assert max(map(len, text.split("\n"))) <= 100
    assert re.findall(r"^  --(\S+)", text, re.M) == [
        name.replace("_", "-") for name in settings_help.setting_names(FashionConfig)
    ]
    assert re.search(r"--run.epochs +passes over the training data \(a whole number >= 1; default 10\)", text)
    words = re.sub(r"\s+", " ", text)
    assert "the optimizer (one of adam, adamw, radam, nadam, sgd, adagrad, adadelta, lbfgs; default adam)" in words
    for name, model in sections(FashionConfig).items():
        assert all(field.description for field in model.model_fields.values()), name


# Order of sources ----------------------------------------------------------------------------------------------------


def test_command_line_overrides_environment_overrides_file_overrides_default(tmp_path):
    job = write(tmp_path / "job.toml", "data.root = '/file'\nrun.epochs = 3")
    assert load(job).run.epochs == 3
    assert load(job).data.root == "/file"
    assert load(job, env={"FNET_DATA": "/env"}).data.root == "/env"
    assert load(job, "--data.root", "/line", env={"FNET_DATA": "/env"}).data.root == "/line"


def test_the_environment_is_that_of_the_process_unless_one_is_given(job, monkeypatch):
    monkeypatch.setenv("FNET_DATA", "/env")
    assert load_config(["--config", str(job)]).data.root == "/env"


def test_data_root_becomes_absolute_and_run_root_stays_as_given(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = load(job, "--data.root", "here", "--run.root", "there")
    assert (loaded.data.root, loaded.run.root) == (str(tmp_path / "here"), "there")


@pytest.mark.parametrize(
    ("tokens", "name", "value"),
    [
        (["--data.global-batch-size=128"], "data.global_batch_size", 128),
        (["--data.global_batch_size", "128"], "data.global_batch_size", 128),
        (["--optim.lr", "1"], "optim.lr", 1.0),
        (["--optim.lr", "none"], "optim.lr", 1e-3),
        (["--run.max-steps", "7"], "run.max_steps", 7),
        (["--checkpoint.every-seconds", "1"], "checkpoint.every_seconds", 1.0),
        (["--checkpoint.every-steps", "7"], "checkpoint.every_steps", 7),
        (["--checkpoint.resume", "runs/a/checkpoints/step_1"], "checkpoint.resume", "runs/a/checkpoints/step_1"),
        (["--optim.max-grad-norm", "none"], "optim.max_grad_norm", None),
        (["--loss.class-weights", "1,1,1,1,1,0,0.5,1,1,2"], "loss.class_weights", [1, 1, 1, 1, 1, 0, 0.5, 1, 1, 2]),
    ],
)
def test_command_line_values_get_the_settings_type(job, tokens, name, value):
    section, key = name.split(".")
    assert dump_config(load(job, *tokens))[section][key] == value


def test_a_byte_order_mark_before_the_job_file_is_skipped(job):
    assert load(write(job, b"\xef\xbb\xbf[optim]\nlr = 0.5\n")).optim.lr == 0.5


def test_a_list_in_the_job_file_becomes_a_tuple(tmp_path):
    job = write(tmp_path / "job.toml", "loss.class_weights = [1, 1, 1, 1, 1, 1, 1, 1, 1, 2]")
    assert load(job).loss.class_weights == (1.0,) * 9 + (2.0,)


# Conflicts -----------------------------------------------------------------------------------------------------------


CONFLICTS = [
    ("--model.head=softmax", "model.head softmax does not train with loss.name nll"),
    ("--model.head=softmax --loss.name=cross_entropy", "model.head softmax does not train with loss.name cross_"),
    ("--model.head=logits", "loss.name nll expects log-probabilities, which model.head logits does not return"),
    ("--loss.label-smoothing=0.1", "loss.label_smoothing 0.1 needs loss.name cross_entropy, found nll"),
    ("--loss.class-weights=1,2,3", "loss.class_weights has 3 numbers for 10 classes"),
    ("--optim.momentum=0.9", "optim.momentum 0.9 is for sgd only, found adam"),
    ("--optim.nesterov=true", "optim.nesterov true needs optim.name sgd with optim.momentum above 0, found adam"),
    ("--optim.name=sgd --optim.nesterov=true", "optim.nesterov true needs optim.name sgd with optim.momentum above 0"),
    ("--optim.name=sgd --optim.betas=0.8,0.9", "optim.betas 0.8,0.9 is for adam, adamw, radam, nadam only, found sgd"),
    ("--optim.name=lbfgs --optim.eps=1", "optim.eps 1.0 is for adam, adamw, radam, nadam, adagrad, adadelta only"),
    ("--optim.name=lbfgs --optim.max-grad-norm=1", "optim.name lbfgs does not go with optim.max_grad_norm 1.0"),
    ("--optim.name=lbfgs --parallel.grad-accum-steps=2", "optim.name lbfgs does not go with parallel.grad_accum_steps"),
    ("--optim.name=lbfgs --schedule.name=cosine", "optim.name lbfgs does not go with schedule.name cosine"),
    ("--optim.name=lbfgs --schedule.warmup-steps=5", "optim.name lbfgs does not go with schedule.warmup_steps 5"),
    ("--optim.name=lbfgs --optim.weight-decay=0.1", "optim.name lbfgs does not go with optim.weight_decay 0.1"),
    ("--optim.name=lbfgs --optim.momentum=0.1", "optim.name lbfgs does not go with optim.momentum 0.1"),
    (
        "--schedule.name=onecycle --schedule.warmup-steps=5",
        "schedule.warmup_steps 5 does not go with schedule.name one",
    ),
    (
        "--data.global-batch-size=4 --parallel.grad-accum-steps=8",
        "parallel.grad_accum_steps 8 is more than data.global_batch_size 4",
    ),
]


@pytest.mark.parametrize(("tokens", "message"), CONFLICTS)
def test_conflicts_are_refused_and_each_fix_in_the_message_works(job, tokens, message):
    given = dict(token.split("=") for token in tokens.split())
    found = error(job, *tokens.split())
    assert found.startswith(message)
    fixes = re.findall(r"(--[a-z.-]+) ([\w.]+)", found.partition("fix: ")[2])
    assert fixes
    for fix in fixes:
        load(job, *(f"{key}={value}" for key, value in {**given, fix[0]: fix[1]}.items()))


def test_cross_entropy_accepts_logits_and_log_probabilities_in_every_form(job):
    for form in ("modules", "sequential", "functional"):
        for head in ("logits", "log_softmax"):
            load(job, "--model.form", form, "--model.head", head, "--loss.name=cross_entropy")


def test_a_config_built_in_code_is_checked_too():
    with pytest.raises(ValidationError, match="does not train"):
        FashionConfig(model=ModelConfig(head="softmax"))


# config.json ---------------------------------------------------------------------------------------------------------


def test_a_dumped_config_reads_back_the_same(job, tmp_path):
    loaded = load(job, "--loss.class-weights", "1,1,1,1,1,1,1,1,1,2", "--optim.name", "adamw")
    path = write(tmp_path / "config.json", json.dumps(dump_config(loaded)))
    assert read_config(path) == loaded


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        (b"", "Expecting value: line 1 column 1"),
        (b"[1]", r"got \[1\], expected sections: run, data"),
        (b"[" * 9000, "recursion"),
        (b'{"optim": {"lr": 0}}', "optim.lr: got 0, expected a number > 0"),
        (b'{"\\udcff": 1}', r"a section's name: got '\\udcff', expected text"),
        (b'{"optim": {"\\udcff": 1}}', "optim: got "),
    ],
)
def test_a_damaged_config_gives_a_one_line_error(tmp_path, text, message):
    path = tmp_path / "config.json"
    if text is not None:
        write(path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(path)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_differences_are_those_that_change_the_result(job):
    old = load(job)
    new = load(job, "--optim.lr", "0.001", "--run.root", "x", "--run.epochs", "9", "--optim.max-grad-norm", "1")
    lines = ["optim.lr: 0.003 -> 0.001", "optim.max_grad_norm: none -> 1.0"]
    assert changed_settings(old, new) == lines
    assert changed_settings(dump_config(old), new) == lines
    assert changed_settings(new, new) == []


def test_checkpoint_settings_and_max_restarts_do_not_change_the_result(job):
    """A resume may change them, and the run keeps its name."""
    others = "--checkpoint.every-seconds=1 --checkpoint.every-steps=7 --checkpoint.keep-last=5 --checkpoint.resume=new"
    new = load(job, *others.split(), "--parallel.max-restarts=0")
    assert changed_settings(load(job), new) == []
    assert new.run.name == "job"


def test_epochs_change_the_result_only_under_a_schedule(job):
    assert "run.epochs" not in result_settings(load(job))
    assert result_settings(load(job, "--schedule.name", "cosine"))["run.epochs"] == 3


def test_config_json_can_be_used_as_a_job_file_and_keeps_the_runs_name(job, tmp_path):
    """To restart or resume a run, its directory is enough."""
    before = load(job, "--run.name", "mine", "--optim.lr", "0.5", "--loss.class-weights", "1,1,1,1,1,1,1,1,1,2")
    path = write(tmp_path / "config.json", json.dumps(dump_config(before)))
    assert load(path) == before
    assert load(path, "--run.epochs", "9").run.name == "mine"
    assert error(write(path, b"{")).startswith(f"{path}: not valid JSON: ")
    assert error(write(path, b"[1]")) == f"{path}: expected sections: {', '.join(sections(FashionConfig))}"


def test_one_section_of_a_runs_settings_is_read_without_its_recipe(tmp_path):
    path = write(tmp_path / "config.json", '{"recipe": "no.such.module", "tracking": {"log_every_steps": 7}}')
    assert read_section(path, "tracking").log_every_steps == 7
    assert read_section(path, "run").evaluate_every_steps is None
    for text in ("[1]", '"tracking"', '{"tracking": 3}', '{"tracking": {"log_every_steps": "x"}}'):
        with pytest.raises(ConfigError, match=r"config\.json: section tracking cannot be used: "):
            read_section(write(tmp_path / "config.json", text), "tracking")


def test_variables_in_the_paths_of_a_job_file_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    job = write(tmp_path / "job.toml", "[run]\nroot = '${SCRATCH}/runs'\n[data]\nroot = '$SCRATCH/data'\n")
    config = load(job)
    assert (config.run.root, config.data.root) == ("/scratch/me/runs", "/scratch/me/data")
    assert load(job, "--run.root", "a $SCRATCH").run.root == "a $SCRATCH", "the shell expands what a person types"
    monkeypatch.setenv("SCRATCH", "")  # runs must not go to /runs
    assert error(job) == "run.root: '${SCRATCH}/runs': the variable SCRATCH is not set"
    monkeypatch.delenv("SCRATCH")
    assert error(job) == "run.root: '${SCRATCH}/runs': the variable SCRATCH is not set"
    write(job, "[run]\nroot = 'a/$$SCRATCH'\n")
    assert load(job).run.root == "a/$SCRATCH"
    write(job, "[run]\nroot = 'a/$ b'\n")
    assert error(job) == "run.root: 'a/$ b': a $ begins no variable's name; write it as $$"


@pytest.mark.parametrize("name", ["a\nb", os.fsdecode(b"not-utf-8-\xff")])
def test_a_relative_root_in_a_directory_that_no_text_can_name_is_refused(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    monkeypatch.delenv("PWD")
    job = write(tmp_path / "job.toml", "")
    assert error(job).endswith(": expected a path: 1 to 4000 printable characters")
    assert load(job, "--run.root", str(tmp_path)).run.root == str(tmp_path)
