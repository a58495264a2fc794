"""The rank of this process, read from torchrun's variables: all of them or none."""

import json
import os
import subprocess
import sys
import time
from unittest.mock import ANY

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from fnet_dist.distributed.launch_env import LaunchEnv, read_launch_env, torchrun_warning, write_error_file
from fnet_dist.errors import ConfigError
from fnet_dist.processes import is_running

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}


def test_without_torchrun_it_is_one_process_alone():
    assert read_launch_env({"PATH": "/bin"}) == LaunchEnv(0, 0, 1, 1, None)
    assert read_launch_env(dict.fromkeys(TORCHRUN, "")) == LaunchEnv(), "an empty variable is one that is not set"


def test_torchruns_variables_give_rank_and_world_size(tmp_path):
    file = tmp_path / "error.json"
    launch_env = read_launch_env({**TORCHRUN, "TORCHELASTIC_ERROR_FILE": str(file)})
    assert launch_env == LaunchEnv(rank=5, local_rank=1, world_size=8, local_world_size=4, error_file=file)
    assert not launch_env.is_rank0
    assert read_launch_env({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0"}).is_rank0


def test_the_environment_is_that_of_the_process_unless_one_is_given(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert read_launch_env().rank == 5
    assert "RANK" in os.environ


@pytest.mark.parametrize("missing", TORCHRUN)
def test_a_half_set_environment_names_what_is_missing(missing):
    env = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(ConfigError, match=f" set but {missing} missing; start the ranks with torchrun") as caught:
        read_launch_env(env)
    assert caught.value.exit_code == 2


def test_one_variable_alone_names_all_the_others():
    with pytest.raises(ConfigError, match="RANK set but LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER"):
        read_launch_env({"RANK": "0"})


@pytest.mark.parametrize("text", ["-1", "two", "1.0", "²", " 1"])
def test_a_variable_that_is_no_whole_number_is_shown(text):
    with pytest.raises(ConfigError, match=r"LOCAL_RANK=.*, expected a whole number") as caught:
        read_launch_env({**TORCHRUN, "LOCAL_RANK": text})
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [{"RANK": "8"}, {"LOCAL_RANK": "4"}, {"LOCAL_WORLD_SIZE": "9"}, {"WORLD_SIZE": "0"}], ids=str
)
def test_numbers_that_contradict_each_other_are_shown(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ConfigError, match=f"\\b{name}={value}\\b.* contradict each other"):
        read_launch_env({**TORCHRUN, **wrong})


# Variables of `fnet run` ----------------------------------------------------------------------------------------------


def test_the_launchers_variables_give_attempt_rendezvous_and_deadline():
    given = {
        "TORCHELASTIC_RUN_ID": "abc",
        "TORCHELASTIC_RESTART_COUNT": "2",
        "FNET_ATTEMPT": "7",
        "FNET_INIT_METHOD": "tcp://node0:4711",
        "FNET_LISTEN_FD": "5",
        "FNET_DEADLINE": "1790000000.5",
        "FNET_LAUNCHER": "99",
    }
    assert read_launch_env({**TORCHRUN, **given}) == LaunchEnv(
        rank=5,
        local_rank=1,
        world_size=8,
        local_world_size=4,
        launch_id="abc",
        restart_count=2,
        launched_at=ANY,
        attempt=7,
        init_method="tcp://node0:4711",
        listen_fd=5,
        deadline=1_790_000_000.5,
        launcher=99,
    )
    assert read_launch_env({**TORCHRUN, **dict.fromkeys(given, "")}).restart_count == 0


def test_a_process_alone_may_have_a_deadline_too():
    assert read_launch_env({"FNET_DEADLINE": "1790000000"}) == LaunchEnv(deadline=1_790_000_000.0)


@pytest.mark.parametrize("name", ["FNET_ATTEMPT", "FNET_LISTEN_FD", "FNET_LAUNCHER", "TORCHELASTIC_RESTART_COUNT"])
def test_a_launchers_variable_that_is_no_whole_number_is_shown(name):
    with pytest.raises(ConfigError, match=f"{name}='-1', expected a whole number"):
        read_launch_env({**TORCHRUN, name: "-1"})


def test_a_deadline_that_is_no_number_is_shown():
    with pytest.raises(ConfigError, match="FNET_DEADLINE='soon', expected Unix time in seconds"):
        read_launch_env({"FNET_DEADLINE": "soon"})


LAUNCHER = """
import subprocess, sys
with subprocess.Popen([sys.executable, "-c", sys.argv[1]]) as rank:  # waits for it, whatever happens to us
    pass
"""
RANK = """
import os, sys, time
from fnet_dist.distributed.launch_env import LaunchEnv, exit_with_launcher
exit_with_launcher(LaunchEnv(launcher={launcher}))
print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_a_rank_dies_with_its_launcher():
    program = RANK.format(launcher="os.getppid()")
    with subprocess.Popen([sys.executable, "-c", LAUNCHER, program], stdout=subprocess.PIPE, text=True) as launcher:
        rank = int(launcher.stdout.readline())
        assert is_running(rank)
        launcher.kill()
    deadline = time.monotonic() + 2
    while is_running(rank) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(rank), "an orphan"


def test_a_rank_whose_launcher_died_before_the_check_dies_too():
    program = RANK.format(launcher=2**22 + 1)  # no process has so high a number
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout) == (-9, "")


# The error file that a launcher reads -------------------------------------------------------------------------------


def test_torchrun_itself_reads_our_error_file(tmp_path):
    file = tmp_path / "error.json"
    trace = "Traceback ...\nValueError: what went wrong"
    write_error_file(LaunchEnv(error_file=file), "ValueError: what went wrong", trace, "crash")
    failure = ProcessFailure(local_rank=1, pid=7, exitcode=1, error_file=str(file))
    assert failure.message["message"] == "ValueError: what went wrong"
    assert failure.message["extraInfo"]["py_callstack"].startswith("Traceback ...\n")
    assert abs(failure.timestamp - time.time()) < 60


def test_a_rank_that_only_lost_another_is_not_the_first_to_fail(tmp_path):
    """torchrun takes the earliest for the root cause, in whole seconds."""
    lost, cause = tmp_path / "lost.json", tmp_path / "cause.json"
    write_error_file(LaunchEnv(error_file=lost), "lost a connection", "", "crash", aftermath=True)
    write_error_file(LaunchEnv(error_file=cause), "loss is nan", "", "non_finite")
    first, second = (ProcessFailure(0, 7, 1, str(file)).timestamp for file in (cause, lost))
    assert first < second
    errors = json.loads(cause.read_text()), json.loads(lost.read_text())
    assert [(one["reason"], one["aftermath"]) for one in errors] == [("non_finite", False), ("crash", True)]


def test_without_a_launcher_no_error_file_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_error_file(LaunchEnv(), "text", "trace", "crash")
    assert list(tmp_path.iterdir()) == []


def test_several_tasks_of_srun_without_a_launcher_are_refused():
    task = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_ID": "7"}
    with pytest.raises(ConfigError, match=r"^srun started 2 tasks, each of which would train the whole run alone; "):
        read_launch_env(task)
    assert read_launch_env({**task, "SLURM_STEP_NUM_TASKS": "1"}) == LaunchEnv(slurm_job="7")
    assert read_launch_env({"SLURM_STEP_NUM_TASKS": "2"}) == LaunchEnv(), "a batch script's shell"


def test_a_torchrun_in_a_slurm_job_that_would_die_of_slurms_warning_is_told_the_flag():
    default = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
    env = {"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_SIGNALS_TO_HANDLE": default}
    warning = torchrun_warning(env)
    assert warning is not None
    assert warning.endswith(f"start it with --signals-to-handle {default},SIGUSR1,SIGUSR2")
    assert torchrun_warning({**env, "TORCHELASTIC_SIGNALS_TO_HANDLE": f"{default},SIGUSR1,SIGUSR2"}) is None
    assert torchrun_warning({**env, "SLURM_JOB_ID": ""}) is None
