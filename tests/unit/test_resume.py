"""What a start finds: nothing, something to go on with, the end, another run; and which directory it trains in."""

import time
from random import Random

import pytest

from fnet_dist import ledger
from fnet_dist.attempt import claim_attempt, end_attempt
from fnet_dist.checkpoint_dir import checkpoint_steps, newest_good, prune, read_checkpoint, save_checkpoint
from fnet_dist.config import Config
from fnet_dist.errors import CheckpointError, ConfigError
from fnet_dist.resume import check_run, choose_run, claim_run, source_of, stopped_by_this_launch
from fnet_dist.run_dir import RunDir, read_json, run_of, write_json
from fnet_dist.runtime import Runtime
from fnet_dist.settings import read_config
from tests.unit.checkpoint_faults import make_content

RESUME = "--checkpoint.resume"


def settings(root, resume="auto", **sections):
    run = {"name": "r", "root": str(root), **sections.pop("run", {})}
    checkpoint = {"resume": str(resume)}
    return Config.model_validate({"run": run, "data": {"dataset": "synthetic"}, "checkpoint": checkpoint, **sections})


def launch(launch_id, restart_count=1, launched_at=0.0):
    """A rank of torchrun's launch `launch_id`, restarted by it."""
    return Runtime(launch_id=launch_id, restart_count=restart_count, launched_at=launched_at)


def begin(config, launch_id=None):
    """A start that has ended: what it was told to train, and where."""
    config, attempt = claim_run(config, launch(launch_id), world_size=1)
    end_attempt(attempt, "crash", 0, 1)
    return config, attempt.run


def save(run, *steps):
    """Checkpoints of `steps`, as the run itself saves them."""
    for step in steps:
        content = make_content(step, Random(step), read_json(run.manifest)["id"])
        save_checkpoint(run, content, 1, lambda: None)
    return run.checkpoint(steps[-1])


def leave(config, status="finished", *, launch_id=None, steps=()):
    """A run that trained one step, and how it ended."""
    _, run = begin(config, launch_id)
    ledger.append(run.ledger, [{"kind": "train", "step": 1, "attempt": 1}])
    if steps:
        save(run, *steps)
    write_json(run.outcome, {"status": status, "step": 1, "reason": "signal_term", "launch_id": launch_id})
    return run


def refusal(config):
    with pytest.raises(ConfigError) as caught:
        check_run(config)
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in text
    return text


# Again in the same directory ------------------------------------------------------------------------------------------


def test_a_new_name_is_free_and_looking_writes_nothing(tmp_path):
    for resume in ("auto", "never"):
        assert check_run(settings(tmp_path, resume)) is None
        assert choose_run(settings(tmp_path, resume), Runtime()).name == "r"
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_gives_its_outcome_again(tmp_path):
    config = settings(tmp_path)
    leave(config)
    assert check_run(config)["status"] == "finished"


@pytest.mark.parametrize(
    "other",
    [
        {"run": {"epochs": 3}},
        {"run": {"max_steps": 5}},
        {"parallel": {"timeout_s": 9.0, "max_restarts": 0}},
        {"checkpoint": {"keep_last": 9, "every_seconds": 1.0, "every_steps": 3}},
        {"data": {"dataset": "synthetic", "root": "/elsewhere"}},
        {"data": {"dataset": "auto"}},
    ],
    ids=str,
)
def test_what_does_not_change_the_result_makes_no_difference(tmp_path, other):
    run = leave(settings(tmp_path), steps=(1,))
    config = settings(tmp_path).model_dump() | settings(tmp_path).model_dump(include={*other})
    for section, values in other.items():
        config[section] = config[section] | values
    config = Config.model_validate(config)
    assert check_run(config)["status"] == "finished"
    write_json(run.outcome, {"status": "failed"})
    assert check_run(config) is None


@pytest.mark.parametrize(
    ("before", "now", "goes_on"),
    [
        ({"epochs": 10}, {"epochs": 11}, True),
        ({"epochs": 10}, {"epochs": 20, "max_steps": 5}, True),
        ({"epochs": 10}, {"epochs": 10, "max_steps": 5}, False),
        ({"epochs": 10}, {"epochs": 9}, False),
        ({"max_steps": 8}, {"max_steps": 9}, True),
        ({"max_steps": 8}, {"max_steps": None}, True),
        ({"max_steps": 8}, {"max_steps": 8}, False),
        ({"max_steps": 8}, {"max_steps": 7}, False),
    ],
    ids=str,
)
def test_a_finished_run_goes_on_if_it_is_to_be_longer(tmp_path, before, now, goes_on):
    leave(settings(tmp_path, run=before))
    assert (check_run(settings(tmp_path, run=now)) is None) == goes_on


def test_a_run_that_was_made_longer_stays_so(tmp_path):
    leave(settings(tmp_path, run={"epochs": 1}))
    longer = settings(tmp_path, run={"epochs": 2})
    leave(longer)
    assert check_run(longer)["status"] == "finished"
    assert read_config(run_of(longer).config).run.epochs == 2


@pytest.mark.parametrize("status", [None, "failed", "stopped"])
def test_an_unfinished_run_goes_on_in_its_directory(tmp_path, status):
    config = settings(tmp_path)
    run = leave(config, status, steps=(1,))
    if status is None:
        run.outcome.unlink()
    assert check_run(config) is None
    assert choose_run(config, Runtime()) == run
    assert begin(config)[1] == run
    assert [path.name for path in sorted(run.attempts.iterdir())] == ["0001", "0002"]


def test_a_start_that_ended_before_its_first_step_may_begin_again(tmp_path):
    config = settings(tmp_path)
    begin(config)
    assert check_run(config) is None


# Other settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_other_settings_are_refused_with_each_difference_and_both_ways_out(tmp_path, status):
    run = leave(settings(tmp_path), status, steps=(5, 30, 200))
    text = refusal(settings(tmp_path, optim={"lr": 0.5}, run={"seed": 3}))
    assert "holds a run with other settings (run.seed: 0 -> 3; optim.lr: 0.001 -> 0.5); use" in text
    assert "use --run.name r-2 for a new run" in text
    assert text.endswith(f"and {RESUME} {run.checkpoint(200)} to start it from there")


def test_the_way_out_that_the_refusal_names_works(tmp_path):
    run = leave(settings(tmp_path), steps=(5,))
    other = settings(tmp_path, run.checkpoint(5), optim={"lr": 0.5})
    assert check_run(other) is None
    assert begin(other)[1].name == "r-2"


def test_where_there_is_no_checkpoint_none_is_named(tmp_path):
    leave(settings(tmp_path))
    assert f"{RESUME} PATH" in refusal(settings(tmp_path, run={"seed": 3}))


def test_the_real_data_is_not_the_synthetic_data(tmp_path):
    leave(settings(tmp_path))
    assert "data.dataset: synthetic -> fashion-mnist" in refusal(settings(tmp_path, data={"dataset": "fashion-mnist"}))


@pytest.mark.parametrize("status", ["finished", "stopped"])
@pytest.mark.parametrize("epochs", [9, 20])
def test_a_schedule_is_not_stretched_anew_in_the_middle_of_a_run(tmp_path, status, epochs):
    """Under it, another number of epochs gives another learning rate to the steps before."""
    schedule = {"name": "cosine"}
    leave(settings(tmp_path, schedule=schedule), status, steps=(5,))
    text = refusal(settings(tmp_path, schedule=schedule, run={"epochs": epochs}))
    assert f"(run.epochs: 10 -> {epochs})" in text
    assert f": schedule.name cosine was stretched over 10 epochs, not {epochs}; use" in text
    assert check_run(settings(tmp_path, schedule=schedule, run={"max_steps": 99})) is None or status == "finished"


# must -----------------------------------------------------------------------------------------------------------------


def test_where_going_on_is_a_must_there_has_to_be_a_checkpoint(tmp_path):
    must = settings(tmp_path, "must")
    text = refusal(must)
    assert text == (
        f"checkpoint.resume must: no checkpoint in {tmp_path / 'r' / 'checkpoints'}; see --run.name, or use auto"
    )
    _, run = begin(settings(tmp_path))
    assert refusal(must) == text
    save(run, 5)
    assert check_run(must) is None
    assert choose_run(must, Runtime()) == run


def test_must_acts_once(tmp_path):
    """A restart reads the run's config.json, and must not fail where only its first save had not come yet."""
    _, run = begin(settings(tmp_path))
    save(run, 5)
    config, _ = begin(settings(tmp_path, "must"))
    assert config.checkpoint.resume == "auto"
    assert read_config(run.config).checkpoint.resume == "auto"


def test_must_shows_a_finished_run_and_refuses_another(tmp_path):
    leave(settings(tmp_path), steps=(5,))
    assert check_run(settings(tmp_path, "must"))["status"] == "finished"
    assert "seed: 0 -> 1" in refusal(settings(tmp_path, "must", run={"seed": 1}))


# never and PATH -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["never", "PATH"])
def anew(request, tmp_path):
    """What starts a new run each time: `never`, or a checkpoint of a run elsewhere."""
    if request.param == "never":
        return "never"
    return save(begin(settings(tmp_path / "elsewhere"))[1], 5, 10)


def test_a_new_run_takes_the_first_free_name_each_time_and_nothing_is_overwritten(tmp_path, anew):
    before = {}
    for name in ("r", "r-2", "r-3"):
        config, run = begin(settings(tmp_path, anew))
        assert (run.name, config.run.name) == (name, name)
        assert check_run(settings(tmp_path, anew)) is None
        ids = {other: read_json(tmp_path / other / "manifest.json")["id"] for other in (*before, name)}
        assert ids == before | {name: ids[name]}
        assert len({*ids.values()}) == len(ids)
        before = ids


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_a_new_run_is_asked_for_beside_one_that_ended_or_has_other_settings(tmp_path, anew, status):
    leave(settings(tmp_path), status)
    assert check_run(settings(tmp_path, anew)) is None
    assert begin(settings(tmp_path, anew, optim={"lr": 0.5}))[1].name == "r-2"


def test_the_new_run_goes_on_by_itself_from_then_on(tmp_path, anew, monkeypatch):
    """`never` and PATH act once: restarts read the run's config.json, from any directory."""
    begin(settings(tmp_path))
    monkeypatch.chdir(tmp_path)
    _, run = begin(settings(".", anew))
    stored = read_config(tmp_path / "r-2" / "config.json")
    assert (stored.checkpoint.resume, stored.run.root, stored.run.name) == ("auto", str(tmp_path), "r-2")
    monkeypatch.chdir("/")
    assert check_run(stored) is None
    assert choose_run(stored, Runtime()) == RunDir(tmp_path / "r-2")
    assert begin(stored)[1].path.name == run.name


def test_the_launchers_next_attempt_goes_on_with_the_new_run(tmp_path, anew):
    """`jobs run` claims each attempt with what the last claim gave it."""
    for name in ("r", "r-2"):
        config, first = begin(settings(tmp_path, anew))
        again, second = begin(config)
        assert (first.name, second.name, again.checkpoint.resume) == (name, name, "auto")


def test_torchruns_repeated_command_goes_on_with_what_its_launch_began(tmp_path, anew):
    config = settings(tmp_path, anew)
    begin(settings(tmp_path))
    _, run = begin(config, launch_id="mine")
    assert run.name == "r-2"
    begin(config, launch_id="another")
    assert choose_run(config, launch("mine")).name == "r-2"
    assert choose_run(config, launch("another")).name == "r-3"
    assert choose_run(config, launch("third")).name == choose_run(config, Runtime()).name == "r-4"
    # With a static rendezvous all launches have one id: a first start is no restart, and what is older is not its own.
    assert choose_run(config, launch("mine", restart_count=0)).name == "r-4"
    assert choose_run(config, launch("mine", launched_at=time.time() + 1)).name == "r-4"
    again, _ = begin(config, launch_id="mine")
    assert (again.run.name, again.checkpoint.resume) == ("r-2", "auto")
    assert [path.name for path in sorted((tmp_path / "r-2" / "attempts").iterdir())] == ["0001", "0002"]


def test_a_launch_that_died_before_its_run_was_complete_completes_it(tmp_path, anew):
    """Killed between the claim and config.json: the directory is nobody's run yet."""
    config = settings(tmp_path, anew)
    attempt = claim_attempt(run_of(config), launch_id="mine", committed_step=0)
    end_attempt(attempt, "crash", 0, 1)
    _, run = begin(config, launch_id="mine")
    assert run == run_of(config)
    assert checkpoint_steps(run) == ([] if anew == "never" else [10])
    assert begin(config)[1].name == "r-2", "another launch leaves it alone"


def test_a_new_run_from_a_checkpoint_holds_a_copy_of_it_and_says_where_from(tmp_path):
    _, old = begin(settings(tmp_path))
    source = save(old, 5, 10)
    before = read_checkpoint(source)
    _, run = begin(settings(tmp_path, source))
    assert (run.name, checkpoint_steps(run)) == ("r-2", [10])
    manifest = read_json(run.manifest)
    assert manifest["resumed_from"] == {"path": str(source), "step": 10}
    copied = newest_good(run, manifest["id"], pytest.fail)
    assert (copied.model, copied.optimizer, copied.values["step"]) == (before.model, before.optimizer, 10)
    assert list(ledger.read(run.ledger)) == [], "the ledger begins after that step"
    assert read_json(run.attempt(1) / "begin.json")["committed_step"] == 0
    assert read_checkpoint(source) == before


def test_a_restart_does_not_go_back_to_where_the_run_began(tmp_path):
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
def test_what_is_no_checkpoints_directory_is_told_with_what_is_expected(tmp_path, path, monkeypatch):
    begin(settings(tmp_path))
    monkeypatch.chdir(tmp_path)
    text = refusal(settings(tmp_path, path))
    assert text.startswith(f"checkpoint.resume {path}: no checkpoint is there; expected auto, must, never or a ")


def test_a_damaged_checkpoint_starts_no_run(tmp_path):
    source = save(begin(settings(tmp_path))[1], 5)
    (source / "model.safetensors").write_bytes(b"spoilt")
    with pytest.raises(
        CheckpointError, match=r"^checkpoint\.resume: .*model\.safetensors: sha256 .*; take another one$"
    ):
        check_run(settings(tmp_path, source))
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


@pytest.mark.parametrize("word", ["auto", "must", "never"])
def test_the_three_words_are_no_paths(tmp_path, word):
    assert source_of(settings(tmp_path, word)) is None


# Claiming -------------------------------------------------------------------------------------------------------------


def test_an_attempt_says_what_it_was_told_and_where_it_began(tmp_path):
    config, run = begin(settings(tmp_path), launch_id="abc")
    save(run, 5)
    (run.checkpoints / ".step_00000009-half").mkdir()
    config, attempt = claim_run(settings(tmp_path, run={"epochs": 20}), launch("abc"), world_size=4, address="node0:1")
    begun = read_json(attempt.begin)
    assert (begun["launch_id"], begun["committed_step"], begun["world_size"]) == ("abc", 5, 4)
    assert (begun["address"], begun["settings"]) == ("node0:1", config.model_dump(mode="json"))
    assert begun["settings"]["run"]["epochs"] == read_json(run.config)["run"]["epochs"] == 20
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_00000005"], "what a kill left is swept up"
    end_attempt(attempt, "crash", 0, 1)


def test_a_run_that_was_finished_between_the_look_and_the_claim_is_not_trained_on(tmp_path):
    config = settings(tmp_path)
    run = leave(config)
    before = sorted(run.path.rglob("*"))
    with pytest.raises(ConfigError, match="was finished by another start meanwhile; start again to see its table"):
        claim_run(config, Runtime())
    assert sorted(run.path.rglob("*")) == before


def test_a_run_of_other_settings_is_not_claimed_either(tmp_path):
    """Its owner may have made it between the look and the claim."""
    run = leave(settings(tmp_path))
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        claim_run(settings(tmp_path, run={"seed": 5}), Runtime())
    assert read_json(run.config)["run"]["seed"] == 0


# Stopped as asked, and restarted by torchrun --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "runtime", "stays_stopped"),
    [
        ("stopped", Runtime(launch_id="mine", restart_count=1), True),
        ("stopped", Runtime(launch_id="mine", restart_count=0), False),
        ("stopped", Runtime(launch_id="another", restart_count=1), False),
        ("stopped", Runtime(launch_id="mine", restart_count=1, launched_at=4e9), False),
        ("stopped", Runtime(), False),
        ("failed", Runtime(launch_id="mine", restart_count=1), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_only_a_restart_by_the_launch_that_was_asked_to_stop_leaves_at_once(
    tmp_path, status, runtime, stays_stopped, resume
):
    config = settings(tmp_path, resume)
    begin(settings(tmp_path, run={"seed": 9} if resume == "never" else {}))
    leave(config, status, launch_id="mine")
    outcome = stopped_by_this_launch(config, runtime)
    assert (outcome is not None) == stays_stopped
    if outcome is not None:
        assert (outcome["step"], outcome["reason"]) == (1, "signal_term")


def test_where_there_is_no_outcome_yet_a_restart_goes_on(tmp_path):
    assert stopped_by_this_launch(settings(tmp_path), Runtime(launch_id="mine", restart_count=1)) is None
