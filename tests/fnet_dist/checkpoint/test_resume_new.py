"""New runs beside old ones (`new`, PATH), and launches of torchrun that repeat their command."""

import time

import pytest

from fnet_dist.checkpoint import resume
from fnet_dist.checkpoint.resume import check_run, choose_run, prepare_run, raise_if_stopped, source_of
from fnet_dist.checkpoint.storage import checkpoint_steps, prune, read_checkpoint
from fnet_dist.config.load import read_config
from fnet_dist.distributed.launch_env import LaunchEnv
from fnet_dist.errors import CheckpointError
from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import claim_attempt
from fnet_dist.run.outcome import end_attempt
from fnet_dist.run.run_dir import RunDir, read_json, run_dir_of
from fnet_dist.run.stop import StoppedError
from tests.helpers.checkpoint_faults import newest_without_warning
from tests.helpers.starts import begin, launch, leave, refusal, save, settings

# new and PATH ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["new", "PATH"])
def new_or_path(request, tmp_path):
    """Return a `checkpoint.resume` that starts a new run each time: `new`, or a checkpoint of a run elsewhere."""
    if request.param == "new":
        return "new"
    return save(begin(settings(tmp_path / "elsewhere"))[1], 5, 10)


def test_each_new_run_gets_the_first_free_name_and_overwrites_nothing(tmp_path, new_or_path):
    before = {}
    for name in ("r", "r-2", "r-3"):
        config, run = begin(settings(tmp_path, new_or_path))
        assert (run.name, config.run.name) == (name, name)
        assert check_run(settings(tmp_path, new_or_path)) is None
        ids = {other: read_json(tmp_path / other / "manifest.json")["id"] for other in (*before, name)}
        assert ids == before | {name: ids[name]}
        assert len({*ids.values()}) == len(ids)
        before = ids


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_a_new_run_may_have_other_settings_than_the_run_of_that_name(tmp_path, new_or_path, status):
    leave(settings(tmp_path), status)
    assert check_run(settings(tmp_path, new_or_path)) is None
    assert begin(settings(tmp_path, new_or_path, optim={"lr": 0.5}))[1].name == "r-2"


def test_restarts_of_a_new_run_resume_it(tmp_path, new_or_path, monkeypatch):
    """`new` and PATH apply to one start only: restarts read the run's config.json, from any directory."""
    begin(settings(tmp_path))
    monkeypatch.chdir(tmp_path)
    _, run = begin(settings(".", new_or_path))
    stored = read_config(tmp_path / "r-2" / "config.json")
    assert (stored.checkpoint.resume, stored.run.root, stored.run.name) == ("auto", str(tmp_path), "r-2")
    monkeypatch.chdir("/")
    assert check_run(stored) is None
    assert choose_run(stored, LaunchEnv()) == RunDir(tmp_path / "r-2")
    assert begin(stored)[1].path.name == run.name


def test_the_next_attempt_of_the_launcher_resumes_the_new_run(tmp_path, new_or_path):
    """`fnet run` claims each attempt with the config that the last claim returned."""
    for name in ("r", "r-2"):
        config, first = begin(settings(tmp_path, new_or_path))
        again, second = begin(config)
        assert (first.name, second.name, again.checkpoint.resume) == (name, name, "auto")


def test_wandb_shows_the_new_run_under_its_own_name(tmp_path, new_or_path):
    for name in ("r", "r-2"):
        config, _ = begin(settings(tmp_path, new_or_path, tracking={"name": "r optim.lr=0.1"}))
        assert config.tracking.name == f"{name} optim.lr=0.1"
    config, _ = begin(settings(tmp_path, new_or_path, tracking={"name": "mine"}))
    assert (config.run.name, config.tracking.name) == ("r-3", "mine")


def test_a_command_repeated_by_torchrun_resumes_the_run_of_its_launch(tmp_path, new_or_path):
    config = settings(tmp_path, new_or_path)
    begin(settings(tmp_path))
    _, run = begin(config, launch_id="mine")
    assert run.name == "r-2"
    begin(config, launch_id="another")
    assert choose_run(config, launch("mine")).name == "r-2"
    assert choose_run(config, launch("another")).name == "r-3"
    assert choose_run(config, launch("third")).name == choose_run(config, LaunchEnv()).name == "r-4"
    # With a static rendezvous all launches have one id: a first start is no restart, and an older run is not its own.
    assert choose_run(config, launch("mine", restart_count=0)).name == "r-4"
    assert choose_run(config, launch("mine", launched_at=time.time() + 1)).name == "r-4"
    again, _ = begin(config, launch_id="mine")
    assert (again.run.name, again.checkpoint.resume) == ("r-2", "auto")
    assert [path.name for path in sorted((tmp_path / "r-2" / "attempts").iterdir())] == ["0001", "0002"]


def test_a_launch_killed_before_config_json_completes_its_run(tmp_path, new_or_path):
    """Killed between the claim and config.json: the directory is not a run yet."""
    config = settings(tmp_path, new_or_path)
    attempt = claim_attempt(run_dir_of(config), launch_id="mine")
    end_attempt(attempt, "crash", 0, 1)
    _, run = begin(config, launch_id="mine")
    assert run == run_dir_of(config)
    assert checkpoint_steps(run) == ([] if new_or_path == "new" else [10])
    assert begin(config)[1].name == "r-2", "another launch leaves it alone"


@pytest.mark.parametrize("start", [begin, prepare_run])
def test_a_start_reads_the_source_checkpoint_once(tmp_path, start, monkeypatch):
    """A checkpoint can have many GB."""
    source, read = save(begin(settings(tmp_path))[1], 5), []
    monkeypatch.setattr(resume, "read_checkpoint", lambda path: read.append(path) or read_checkpoint(path))
    config = settings(tmp_path, source)
    assert check_run(config) is None
    start(config)
    assert read == [source]
    assert checkpoint_steps(RunDir(tmp_path / "r-2")) == [5]


def test_a_start_checks_its_run_once(tmp_path, monkeypatch):
    config, checked = settings(tmp_path), []
    monkeypatch.setattr(resume, "check_run", lambda config: checked.append(config.run.name))
    begin(config)
    assert checked == ["r"]


def test_a_new_run_from_a_checkpoint_copies_it_and_records_its_path(tmp_path):
    _, old = begin(settings(tmp_path))
    source = save(old, 5, 10)
    before = read_checkpoint(source)
    _, run = begin(settings(tmp_path, source))
    assert (run.name, checkpoint_steps(run)) == ("r-2", [10])
    manifest = read_json(run.manifest)
    assert manifest["resumed_from"] == {"path": str(source), "step": 10}
    copied = newest_without_warning(run, manifest["id"])
    assert (copied.model, copied.optimizer, copied.values["step"]) == (before.model, before.optimizer, 10)
    assert list(metrics_log.read(run.metrics_log)) == [], "the metrics log begins after that step"
    assert read_json(run.attempt(1) / "begin.json")["committed_step"] == 0
    assert read_checkpoint(source) == before


def test_a_restart_does_not_go_back_to_the_source_checkpoint(tmp_path):
    """torchrun repeats the path too; by then the run has later checkpoints, and the first may be pruned."""
    source = save(begin(settings(tmp_path / "elsewhere"))[1], 10)
    _, run = begin(settings(tmp_path, source), launch_id="mine")
    save(run, 20, 30)
    prune(run, read_json(run.manifest)["id"], 2, lambda: None)
    _, again = begin(settings(tmp_path, source), launch_id="mine")
    assert again == RunDir(run.path)
    assert checkpoint_steps(run) == [30, 20]


def test_a_path_may_be_relative_or_in_the_home_directory(tmp_path, monkeypatch):
    source = save(begin(settings(tmp_path))[1], 5)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in ("r/checkpoints/step_00000005/", "~/r/checkpoints/step_00000005"):
        _, run = begin(settings(tmp_path, path))
        assert read_json(run.manifest)["resumed_from"]["path"] == str(source)


@pytest.mark.parametrize("path", ["no/such/place", "ever", "Auto", "r/config.json"])
def test_a_path_without_a_checkpoint_is_refused_with_the_valid_values(tmp_path, path, monkeypatch):
    begin(settings(tmp_path))
    monkeypatch.chdir(tmp_path)
    text = refusal(settings(tmp_path, path))
    assert text.startswith(f"checkpoint.resume {path}: no checkpoint is there; expected auto, required, new or a ")


@pytest.mark.parametrize("start", [begin, prepare_run])
def test_a_corrupt_source_checkpoint_starts_no_run(tmp_path, start):
    """It is refused before anything is written, with the exit code of a checkpoint that no restart repairs."""
    source = save(begin(settings(tmp_path))[1], 5)
    (source / "model.safetensors").write_bytes(b"spoilt")
    with pytest.raises(
        CheckpointError, match=r"^checkpoint\.resume: .*model\.safetensors: sha256 .*; use another one$"
    ) as caught:
        start(settings(tmp_path, source))
    assert caught.value.exit_code == 65
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


@pytest.mark.parametrize("word", ["auto", "required", "new", "must", "never"])
def test_the_words_are_no_paths(tmp_path, word):
    assert source_of(settings(tmp_path, word)) is None


# Stopped as asked, and restarted by torchrun --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "launch_env", "stays_stopped"),
    [
        ("stopped", LaunchEnv(launch_id="mine", restart_count=1), True),
        ("stopped", LaunchEnv(launch_id="mine", restart_count=0), False),
        ("stopped", LaunchEnv(launch_id="another", restart_count=1), False),
        ("stopped", LaunchEnv(launch_id="mine", restart_count=1, launched_at=4e9), False),
        ("stopped", LaunchEnv(), False),
        ("failed", LaunchEnv(launch_id="mine", restart_count=1), False),
    ],
    ids=str,
)
@pytest.mark.parametrize(("resume", "name"), [("auto", "r"), ("new", "r-2")])
def test_only_a_restart_by_the_launch_that_was_stopped_exits_at_once(
    tmp_path, status, launch_env, stays_stopped, resume, name
):
    config = settings(tmp_path, resume)
    begin(settings(tmp_path, run={"seed": 9} if resume == "new" else {}))
    leave(config, status, launch_id="mine")
    if not stays_stopped:
        raise_if_stopped(config, launch_env)
        return
    with pytest.raises(StoppedError, match=r"^stopped at step 1 as asked \(signal_term\), checkpointed$") as caught:
        raise_if_stopped(config, launch_env)
    assert (caught.value.reason, caught.value.exit_code, caught.value.run.name) == ("signal_term", 75, name)


def test_a_restart_without_an_outcome_trains(tmp_path):
    raise_if_stopped(settings(tmp_path), LaunchEnv(launch_id="mine", restart_count=1))
