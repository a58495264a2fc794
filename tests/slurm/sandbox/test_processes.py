"""The processes of a private Slurm are found in /proc, also during an exec."""

import os
import subprocess

from slurm.sandbox.processes import MARK, processes


def test_a_process_that_execs_all_the_time_is_always_found(tmp_path):
    again = 'exec sh -c "$0" "$0"'
    with subprocess.Popen(["sh", "-c", again, again], env={**os.environ, MARK: f"{tmp_path}/node0"}) as process:
        try:
            assert [processes(tmp_path, "node0") for _ in range(200)] == [{process.pid}] * 200
        finally:
            process.kill()
