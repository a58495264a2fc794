"""Paths as other machines and shells know them, and output that cannot fail."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from fnet_dist.processes import absolute, is_others, quoted


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Make home/me, a link to export/me on this machine alone, with a project in it; the shell is there."""
    (tmp_path / "export/me/project/sub").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/me").symlink_to(tmp_path / "export/me")
    monkeypatch.chdir(tmp_path / "home/me/project")
    monkeypatch.setenv("PWD", str(tmp_path / "home/me/project"))
    return tmp_path


def test_paths_below_a_linked_home_have_the_name_that_the_shell_has(home):
    assert absolute(Path("runs/a")) == home / "home/me/project/runs/a"
    assert absolute(home / "export/me/project/sub") == home / "home/me/project/sub"
    assert absolute(home / "export/me/other/new") == home / "home/me/other/new"


def test_other_paths_and_other_names_stay(home, monkeypatch):
    assert absolute(home / "export/elsewhere") == home / "export/elsewhere"
    assert absolute(Path("/etc/hosts")) == Path("/etc/hosts")
    for stale in (str(home), "", "home/me/project", str(home / "gone")):
        monkeypatch.setenv("PWD", stale)
        assert absolute(Path("runs")) == home / "export/me/project/runs"


def test_closed_standard_streams_are_opened_before_a_file_takes_their_place(tmp_path):
    program = (
        "import sys; from fnet_dist.processes import prepare_output; prepare_output()\n"
        "with open(sys.argv[1], 'w') as file: print('lost', flush=True); print('lost', file=sys.stderr, flush=True)"
    )
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", program, str(tmp_path / "file")]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0
    assert (tmp_path / "file").read_text() == ""


def test_paths_are_printed_as_a_shell_reads_them(tmp_path):
    path = tmp_path / "an ö, a ' and a $HOME"
    path.touch()
    assert subprocess.run(["sh", "-c", f"ls {quoted(path)}"], capture_output=True, check=False).returncode == 0


OPEN_FILES = """
import resource
from fnet_dist.processes import raise_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 4096))
for needed in (32, 512, 10_000):
    raise_open_files(needed)
    print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def test_the_limit_of_open_files_is_raised_as_far_as_is_needed_and_allowed():
    done = subprocess.run([sys.executable, "-c", OPEN_FILES], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "64 4096\n512 4096\n4096 4096\n"


def test_a_process_of_another_user_is_known_to_live_even_where_proc_hides_it(gone_pid):
    assert not is_others(os.getpid())
    assert not is_others(gone_pid)
    if (child := os.fork()) == 0:
        with suppress(PermissionError):  # not root: another user already
            os.setuid(65534)
        os._exit(int(not is_others(1)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
