"""Check that ranks can all-reduce, and measure how fast. Run with `-m`, this module is one of the ranks.

The ranks meet as in training: node 0's listening socket, one process group, NCCL on GPUs and gloo on CPUs.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from subprocess import DEVNULL, CompletedProcess
from typing import Any

from fnet_dist.distributed.launch_env import exit_with_launcher, read_launch_env
from fnet_dist.errors import FnetError
from fnet_dist.run.run_dir import read_json, write_json
from jobs.doctor.python_env import ROOT, last_line
from jobs.doctor.result import MISS, OK, WARN, Check
from jobs.launcher.node_spec import NodeSpec
from jobs.launcher.rendezvous import check_connection, meeting_place, open_listening_socket
from slurm.submit_env import variables

ADDRESS_FILE = "address.json"
NETWORK_FIX = "another network: `interface` in slurm/site.toml, or GLOO_SOCKET_IFNAME; a firewall between nodes: ask"
TORCH_FIX = "repair torch first; with GPUs, NCCL_DEBUG=INFO shows more"
SLOWEST_MB_S = 100.0  # about what gigabit Ethernet carries: a slower link is probably the wrong network
TIMEOUT_S = 60.0  # for node 0's address, and for each collective
RANKS_S = 120.0  # for all ranks to end: torch may come from a cold disk
GRACE_S = 3.0  # for the other ranks to report their own error after one rank has failed
LOOK_EVERY_S = 0.1
MIB = {"cpu": 8, "cuda": 256}  # large enough that bandwidth and not latency decides
ROUNDS = 5


def all_reduce(node_spec: NodeSpec, folder: Path, device: str = "auto") -> list[Check]:
    """Run all-reduces over the ranks of all nodes and return this node's check; [] if all is well and it is not node 0.

    `folder` takes the ranks' logs. On several nodes it is shared, and node 0 publishes there the address it listens on.
    """
    if node_spec.world_size < 2:  # one GPU or none: two ranks on the CPU test torch.distributed at least
        node_spec, device = NodeSpec(1, 0, 2), "cpu"
    sizes = node_spec
    listener = address = None
    try:
        with ExitStack() as stack:
            if sizes.nnodes > 1:
                if sizes.node_rank == 0:
                    listener = stack.enter_context(_listen(node_spec, folder))
                address = _wait_for_address(folder)
            rendezvous = stack.enter_context(meeting_place(address, node_spec.interface))
            ranks = _run_ranks(sizes, folder, device, rendezvous, listener)
    except FnetError as error:
        return [Check("all-reduce", MISS, str(error), NETWORK_FIX)]
    return check_results(ranks, reports_speed=sizes.node_rank == 0, over_a_network=sizes.nnodes > 1)


def check_results(ranks: Sequence[CompletedProcess[str]], *, reports_speed: bool, over_a_network: bool) -> list[Check]:
    """Return the check for this node's ranks: failures, wrong sums, or (if `reports_speed`) the bandwidth."""
    # Ranks killed by us (negative return code) come last: they only waited for the one that failed.
    failed = sorted((rank for rank in ranks if rank.returncode), key=lambda rank: rank.returncode < 0)
    if failed:
        error = last_line(failed[0].stdout, failed[0].returncode)
        found = f"{len(failed)} of {len(ranks)} ranks here failed: {error}"
        return [Check("all-reduce", MISS, found, NETWORK_FIX if over_a_network else TORCH_FIX)]
    lines = (line for rank in ranks for line in rank.stdout.splitlines())
    results = [json.loads(line) for line in lines if line.startswith('{"rank"')]  # libraries may print too, at exit
    if wrong := [result["rank"] for result in results if not result["right"]]:
        return [Check("all-reduce", MISS, f"a wrong sum on ranks {wrong}", "NCCL_DEBUG=INFO; another node, or driver")]
    if not reports_speed:
        return []
    speed = results[0]["mb_per_s"]
    found = f"{results[0]['world_size']} ranks, {results[0]['backend']}: right sums, {speed:,.0f} MB/s"
    if over_a_network and speed < SLOWEST_MB_S:
        return [Check("all-reduce", WARN, f"{found}; gigabit Ethernet carries {SLOWEST_MB_S:g}", NETWORK_FIX)]
    return [Check("all-reduce", OK, found)]


def _listen(node_spec: NodeSpec, folder: Path) -> socket.socket:
    address = None
    try:
        listener = open_listening_socket(node_spec.interface, node_spec.peer)
        address = "{}:{}".format(*listener.getsockname())
    finally:
        # After a failure too: the other nodes then stop at once, instead of waiting for TIMEOUT_S.
        write_json(folder / ADDRESS_FILE, {"address": address})
    return listener


def _wait_for_address(folder: Path) -> str:
    """Return node 0's address once it is published and reachable. Raises FnetError if it is not."""
    began = time.monotonic()
    # An NFS client caches that a file is absent; listing the directory asks the server again.
    while folder / ADDRESS_FILE not in folder.iterdir():
        if time.monotonic() - began > TIMEOUT_S:
            raise FnetError(f"node 0 has published no address within {TIMEOUT_S:g} s; see its own checks")
        time.sleep(LOOK_EVERY_S)
    address: str | None = read_json(folder / ADDRESS_FILE)["address"]
    if address is None:
        raise FnetError("node 0 could not open a listening socket; see its own checks")
    check_connection(address, lambda: False)
    return address


def _run_ranks(
    sizes: NodeSpec, folder: Path, device: str, rendezvous: Mapping[str, str], listener: socket.socket | None
) -> list[CompletedProcess[str]]:
    """Run this node's ranks to their end. Kill them after RANKS_S, or GRACE_S after one of them has failed."""
    command = [sys.executable, "-m", "jobs.doctor.allreduce_check", device]
    inherited = {name: value for name, value in variables().items() if not name.startswith("TORCHELASTIC_")}
    first = sizes.node_rank * sizes.nproc_per_node
    processes: list[tuple[subprocess.Popen[bytes], Path]] = []
    with ExitStack() as stack:
        for local_rank in range(sizes.nproc_per_node):
            launch = {"RANK": first + local_rank, "LOCAL_RANK": local_rank, "FNET_LAUNCHER": os.getpid()}
            launch |= {"WORLD_SIZE": sizes.world_size, "LOCAL_WORLD_SIZE": sizes.nproc_per_node, "OMP_NUM_THREADS": 1}
            fds = []
            if listener is not None and local_rank == 0:
                fds = [listener.fileno()]
                launch["FNET_LISTEN_FD"] = listener.fileno()
            environment = {**inherited, **{name: str(value) for name, value in launch.items()}, **rendezvous}
            log = folder / f"rank_{first + local_rank}.log"
            output = stack.enter_context(log.open("wb"))
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=DEVNULL, stdout=output, stderr=output, pass_fds=fds
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append((process, log))
        deadline = time.monotonic() + RANKS_S
        while any(process.poll() is None for process, _ in processes) and time.monotonic() < deadline:
            if any(process.returncode for process, _ in processes):
                deadline = min(deadline, time.monotonic() + GRACE_S)
            time.sleep(LOOK_EVERY_S)
    # The stack has killed and waited for what still ran.
    return [CompletedProcess(command, ended.returncode, log.read_text(errors="replace")) for ended, log in processes]


def measure(device: str) -> dict[str, Any]:
    """Run all-reduces as one rank. Return if the sum is right, and the MB/s that each link carries.

    A ring all-reduce sends every byte of the tensor 2 (n - 1) / n times over each link (nccl-tests, "bus bandwidth").
    """
    # Imported here: the process that starts the ranks must survive a broken torch, to report it.
    import torch
    import torch.distributed as dist

    from fnet_dist.distributed.process_group import choose_device, open_process_group

    launch_env = read_launch_env()
    exit_with_launcher(launch_env)
    world_size = launch_env.world_size
    chosen = choose_device(device, launch_env, torch.cuda.device_count())
    with open_process_group(launch_env, chosen, TIMEOUT_S) as group:
        # Integers below 7 in float32: their sums are exact, so that any wrong bit is an error.
        pattern = (torch.arange(MIB[group.device.type] << 18, device=group.device) % 7).float()
        summed = pattern * (group.rank + 1)
        dist.all_reduce(summed)
        right = torch.equal(summed, pattern * (world_size * (world_size + 1) // 2))
        times = []
        for _ in range(ROUNDS):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(summed)
            summed[0].item()  # wait for the GPU: NCCL's all_reduce returns once it is queued
            times.append(time.perf_counter() - began)
        sent = 2 * (world_size - 1) / world_size * pattern.nbytes
        backend = dist.get_backend()
    speed = sent / 1e6 / statistics.median(times)
    return {"rank": group.rank, "world_size": world_size, "right": right, "mb_per_s": speed, "backend": backend}


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
