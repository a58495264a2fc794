"""Do ranks exchange what they should, and how fast? They meet as in training: node 0's door, a process group, NCCL on
GPUs, gloo on CPUs. As a program, this is one of the ranks.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fnet_dist.distributed.launch_env import exit_with_launcher, read_launch_env
from fnet_dist.errors import FnetError
from fnet_dist.run.run_dir import read_json, write_json
from jobs.doctor.python_env import ROOT, last_words
from jobs.doctor.result import MISS, OK, WARN, Check
from jobs.launcher.node_spec import NodeSpec
from jobs.launcher.rendezvous import check_connection, meeting_place, open_listening_socket
from slurm.submit_env import variables

MEETING = "meeting.json"
NETWORK = "another network: `interface` in slurm/site.toml, or GLOO_SOCKET_IFNAME; a firewall between nodes: ask"
TORCH = "mend torch first; with GPUs, NCCL_DEBUG=INFO says more"
SLOWEST_MB_S = 100.0  # about what gigabit Ethernet carries
PATIENCE_S = 60.0  # with node 0's door, with ranks that do not meet, with one exchange
RANKS_S = 120.0
GRACE_S = 3.0  # for the others to say what happened, after one rank has failed
LOOK_EVERY_S = 0.1
MIB = {"cpu": 8, "cuda": 256}
ROUNDS = 5


@dataclass(frozen=True)
class Ended:
    """How a rank ended, what it printed, and its errors."""

    exit_code: int
    out: str
    error: str


def all_reduce(node_spec: NodeSpec, place: Path, device: str = "auto") -> list[Check]:
    """One all-reduce over the ranks of all nodes, checked by every rank, and its bandwidth, told by node 0.

    On several nodes node 0 publishes its door's address in the shared directory `place`.
    """
    sizes = node_spec.sizes
    try:
        with ExitStack() as stack:
            door = None
            if sizes.nnodes > 1 and sizes.node_rank == 0:
                address: str | None = None
                try:
                    door = stack.enter_context(open_listening_socket(node_spec.interface, node_spec.peer))
                    address = "{}:{}".format(*door.getsockname())
                finally:
                    write_json(place / MEETING, {"address": address})
            address = _meeting(place) if sizes.nnodes > 1 else None
            meeting = stack.enter_context(meeting_place(address, node_spec.interface))
            ended = _run(node_spec, device, meeting, None if door is None else door.fileno())
    except FnetError as error:
        return [Check("all-reduce", MISS, str(error), NETWORK)]
    return check_results(ended, leads=sizes.node_rank == 0, over_a_network=sizes.nnodes > 1)


def check_results(ended: Sequence[Ended], *, leads: bool, over_a_network: bool) -> list[Check]:
    """What to make of this node's ranks. Node 0, which `leads`, tells the speed."""
    failed = sorted((rank for rank in ended if rank.exit_code), key=lambda rank: rank.exit_code < 0)  # not those killed
    if failed:
        words = last_words(failed[0].error, failed[0].exit_code)
        found = f"{len(failed)} of {len(ended)} ranks here failed: {words}"
        return [Check("all-reduce", MISS, found, NETWORK if over_a_network else TORCH)]
    told: list[dict[str, Any]] = [json.loads(rank.out.splitlines()[-1]) for rank in ended]
    if wrong := [rank["rank"] for rank in told if not rank["right"]]:
        return [Check("all-reduce", MISS, f"a wrong sum on ranks {wrong}", "NCCL_DEBUG=INFO; another node, or driver")]
    if not leads:
        return []
    speed, kind = told[0]["mb_per_s"], f"{told[0]['world_size']} ranks, {told[0]['backend']}"
    found = f"{kind}: right sums, {speed:,.0f} MB/s"
    if over_a_network and speed < SLOWEST_MB_S:
        return [Check("all-reduce", WARN, f"{found}; gigabit Ethernet carries {SLOWEST_MB_S:g}", NETWORK)]
    return [Check("all-reduce", OK, found)]


def _meeting(place: Path) -> str:
    """Node 0's address, once it is published and can be reached."""
    began = time.monotonic()
    while place / MEETING not in place.iterdir():  # a shared disk is asked anew, as it may not be for a file
        if time.monotonic() - began > PATIENCE_S:
            raise FnetError(f"node 0 has opened no door within {PATIENCE_S:g} s; see its own checks")
        time.sleep(LOOK_EVERY_S)
    address: str | None = read_json(place / MEETING)["address"]
    if address is None:
        raise FnetError("node 0 could open no door; see its own checks")
    check_connection(address, lambda: False)
    return address


def _run(node_spec: NodeSpec, device: str, meeting: Mapping[str, str], listen_fd: int | None) -> list[Ended]:
    """Start this node's ranks, and wait until all have ended; none outlives RANKS_S, or another's failure for long."""
    with ExitStack() as stack:
        ranks = []
        for local_rank in range(node_spec.sizes.nproc_per_node):
            out, error = (stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in range(2))
            process = subprocess.Popen(
                [sys.executable, "-m", "jobs.doctor.allreduce_check", device],
                cwd=ROOT,
                env=_environment(node_spec, local_rank, meeting, listen_fd),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=error,
                pass_fds=() if listen_fd is None or local_rank else (listen_fd,),
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            ranks.append((process, out, error))
        deadline = time.monotonic() + RANKS_S
        while any(process.poll() is None for process, _, _ in ranks) and time.monotonic() < deadline:
            if any(process.returncode for process, _, _ in ranks):
                deadline = min(deadline, time.monotonic() + GRACE_S)
            time.sleep(LOOK_EVERY_S)
        ended = []
        for process, out, error in ranks:
            process.kill()
            code = process.wait()
            out.seek(0)
            error.seek(0)
            ended.append(Ended(code, out.read(), error.read()))
        return ended


def _environment(
    node_spec: NodeSpec, local_rank: int, meeting: Mapping[str, str], listen_fd: int | None
) -> dict[str, str]:
    sizes = node_spec.sizes
    own: dict[str, object] = {
        "RANK": sizes.node_rank * sizes.nproc_per_node + local_rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": sizes.world_size,
        "LOCAL_WORLD_SIZE": sizes.nproc_per_node,
        "FNET_LAUNCHER": os.getpid(),
        "OMP_NUM_THREADS": 1,
    }
    if listen_fd is not None and local_rank == 0:
        own["FNET_LISTEN_FD"] = listen_fd
    given = {name: value for name, value in variables().items() if not name.startswith("TORCHELASTIC_")}
    return {**given, **{name: str(value) for name, value in own.items()}, **meeting}


def rank(device: str) -> dict[str, Any]:
    """This process as one of the ranks: whether its sum is right, and MB/s that every link carries (each byte of an
    all-reduce goes 2 (n - 1) / n times over each: the bus bandwidth of NCCL's own tests)."""
    import torch
    import torch.distributed as dist

    from fnet_dist.distributed.process_group import choose_device, open_process_group

    launch_env = read_launch_env()
    exit_with_launcher(launch_env)
    world_size = launch_env.world_size
    with open_process_group(
        launch_env, choose_device(device, launch_env, torch.cuda.device_count()), PATIENCE_S
    ) as group:
        pattern = (torch.arange(MIB[group.device.type] << 18, device=group.device) % 7).float()  # sums stay exact
        summed = pattern * (group.rank + 1)
        dist.all_reduce(summed)
        right = torch.equal(summed, pattern * (world_size * (world_size + 1) // 2))
        times = []
        for _ in range(ROUNDS):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(summed)
            summed[0].item()  # a GPU says when it has done it
            times.append(time.perf_counter() - began)
        carried = 2 * (world_size - 1) / world_size * pattern.nbytes
        backend = dist.get_backend()
    speed = carried / 1e6 / statistics.median(times)
    return {"rank": group.rank, "world_size": world_size, "right": right, "mb_per_s": speed, "backend": backend}


if __name__ == "__main__":
    print(json.dumps(rank(*sys.argv[1:])))
