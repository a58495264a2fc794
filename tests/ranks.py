"""Runs a test's function on several gloo ranks, or a job under torchrun, always with a time limit."""

import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from fnet_dist.group import Group

REPOSITORY = Path(__file__).parents[1]


def run_ranks(function: Callable[..., None], world_size: int, *arguments: Any, timeout_s: float = 120) -> None:
    """Call `function(group, *arguments)` in `world_size` processes joined by gloo; a failed rank fails us."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _rank, (world_size, f"{folder}/meeting", function, arguments), world_size, join=False, start_method="spawn"
        )
        assert context is not None
        try:
            deadline = time.monotonic() + timeout_s
            while not context.join(timeout=1):  # returns whenever one has ended, and raises its error
                assert time.monotonic() < deadline, f"the ranks did not end within {timeout_s:g} s"
        finally:
            for process in context.processes:
                process.kill()
                process.join()


def _rank(rank: int, world_size: int, meeting: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    group = Group(rank, world_size, torch.device("cpu"))
    if world_size > 1:
        torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world_size)
    function(group, *arguments)
    if world_size > 1:
        gc.collect()
        torch.distributed.destroy_process_group()


def train(
    *arguments: str, nproc: int | None = None, cwd: Path = REPOSITORY, timeout_s: float = 180, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python -m fnet_dist.train ARGUMENTS` as a process of its own, or under torchrun with `nproc` ranks."""
    start = [sys.executable, "-m"]
    if nproc is not None:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", "-m"]
    return subprocess.run(
        [*start, "fnet_dist.train", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
