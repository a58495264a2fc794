"""Which rank this process is: all that torchrun says, or nothing; a guess is never made."""

import os
import time

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from fnet_dist.errors import ConfigError
from fnet_dist.runtime import Runtime, read_runtime, tell_torchrun

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}


def test_without_torchrun_it_is_one_process_alone():
    assert read_runtime({"PATH": "/bin"}) == Runtime(0, 0, 1, 1, None)
    assert read_runtime(dict.fromkeys(TORCHRUN, "")) == Runtime(), "an empty variable is one that is not set"


def test_torchrun_says_who_is_who(tmp_path):
    file = tmp_path / "error.json"
    runtime = read_runtime({**TORCHRUN, "TORCHELASTIC_ERROR_FILE": str(file)})
    assert runtime == Runtime(rank=5, local_rank=1, world_size=8, local_world_size=4, error_file=file)
    assert not runtime.is_main
    assert read_runtime({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0"}).is_main


def test_the_environment_is_that_of_the_process_unless_one_is_given(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert read_runtime().rank == 5
    assert "RANK" in os.environ


@pytest.mark.parametrize("missing", TORCHRUN)
def test_a_half_set_environment_names_what_is_missing(missing):
    env = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(ConfigError, match=f" set but {missing} missing; start the ranks with torchrun") as caught:
        read_runtime(env)
    assert caught.value.exit_code == 2


def test_one_variable_alone_names_all_the_others():
    with pytest.raises(ConfigError, match="RANK set but LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER"):
        read_runtime({"RANK": "0"})


@pytest.mark.parametrize("text", ["-1", "two", "1.0", "²", " 1"])
def test_what_is_no_whole_number_is_shown(text):
    with pytest.raises(ConfigError, match=r"LOCAL_RANK=.*, expected a whole number") as caught:
        read_runtime({**TORCHRUN, "LOCAL_RANK": text})
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [{"RANK": "8"}, {"LOCAL_RANK": "4"}, {"LOCAL_WORLD_SIZE": "9"}, {"WORLD_SIZE": "0"}], ids=str
)
def test_numbers_that_contradict_each_other_are_shown(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ConfigError, match=f"\\b{name}={value}\\b.* contradict each other"):
        read_runtime({**TORCHRUN, **wrong})


def test_torchrun_itself_reads_our_error_file(tmp_path):
    file = tmp_path / "error.json"
    tell_torchrun(Runtime(error_file=file), "ValueError: what went wrong", "Traceback ...\nValueError: what went wrong")
    failure = ProcessFailure(local_rank=1, pid=7, exitcode=1, error_file=str(file))
    assert failure.message["message"] == "ValueError: what went wrong"
    assert failure.message["extraInfo"]["py_callstack"].startswith("Traceback ...\n")
    assert abs(failure.timestamp - time.time()) < 60


def test_without_torchrun_nothing_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tell_torchrun(Runtime(), "text", "trace")
    assert list(tmp_path.iterdir()) == []
