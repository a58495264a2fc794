"""Run a test's function on several gloo ranks, with a time limit."""

import gc
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any

import torch
import torch.multiprocessing as mp

from fnet_dist.distributed.process_group import Group

# A fresh process imports these for seconds, the first backward pass symbolic_shapes: ranks are forked from one that has
# done so.
PRELOAD = ["fnet_dist.training.trainer", "torch._dynamo", "torch.fx.experimental.symbolic_shapes", "pytest"]


def run_ranks(function: Callable[..., None], world_size: int, *arguments: Any, timeout_s: float = 120) -> None:
    """Call `function(group, *arguments)` in `world_size` gloo processes; raise the error of a rank that fails."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        rank_arguments = (world_size, f"{folder}/meeting", function, arguments)
        context = mp.start_processes(_rank, rank_arguments, world_size, join=False, start_method="forkserver")
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
    warnings.simplefilter("error", FutureWarning)  # users would read it once a rank
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    group = Group(rank, world_size, torch.device("cpu"))
    if world_size > 1:
        torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world_size)
    function(group, *arguments)
    if world_size > 1:
        gc.collect()
        torch.distributed.destroy_process_group()
