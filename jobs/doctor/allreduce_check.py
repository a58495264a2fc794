"""Check that ranks can all-reduce, and measure how fast. Run with `-m`, this module starts the ranks of a node.

The ranks connect as in training: node 0's listening socket, one process group, NCCL on GPUs and gloo on CPUs.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from subprocess import DEVNULL

from fnet_dist.distributed.launch_env import LaunchEnv
from fnet_dist.errors import FnetError
from fnet_dist.processes import exit_with_parent, python_environment
from fnet_dist.run.run_dir import read_json, write_json
from jobs.doctor.python_env import last_line
from jobs.doctor.result import MISS, OK, WARN, Check
from jobs.launcher.node_spec import NodeSpec
from jobs.launcher.rendezvous import add_meeting, check_connection, meeting_place, open_listening_socket

ADDRESS_FILE = "address.json"
NETWORK_FIX = "another network: `interface` in slurm/site.toml, or GLOO_SOCKET_IFNAME; a firewall between nodes: ask"
TORCH_FIX = "repair torch first; with GPUs, NCCL_DEBUG=INFO shows more"
SLOWEST_MB_S = 100.0  # about what gigabit Ethernet carries: a slower link is probably the wrong network
TIMEOUT_S = 60.0  # for node 0's address, and for each collective
RANKS_S = 120.0  # for all ranks to end: torch may come from a cold disk
MIB = {"cpu": 8, "cuda": 256}  # large enough that bandwidth and not latency decides
ROUNDS = 5


def all_reduce(node_spec: NodeSpec, folder: Path, device: str = "auto") -> list[Check]:
    """Run all-reduces over the ranks of all nodes and return this node's check; [] if all is well and it is not node 0.

    `folder` takes the ranks' logs. On several nodes it is shared, and node 0 publishes there the address it listens on.
    """
    if node_spec.world_size < 2:  # one GPU or none: two ranks on the CPU test torch.distributed at least
        node_spec, device = NodeSpec(1, 0, 2), "cpu"
    is_first, over_a_network = node_spec.node_rank == 0, node_spec.nnodes > 1
    listen_fd = address = None
    try:
        with ExitStack() as stack:
            if over_a_network and is_first:
                try:
                    listener = stack.enter_context(open_listening_socket(node_spec.interface, node_spec.peer))
                    listen_fd, address = listener.fileno(), "{}:{}".format(*listener.getsockname())
                finally:  # after a failure too: the other nodes then stop at once, not only after TIMEOUT_S
                    write_json(folder / ADDRESS_FILE, {"address": address})
            if over_a_network:
                address = _wait_for_address(folder)
            meeting = stack.enter_context(meeting_place(address, node_spec.interface))
            place = (node_spec.ranks[0], 0, node_spec.world_size, node_spec.nproc_per_node)
            first = LaunchEnv(*place, init_method=meeting["FNET_INIT_METHOD"], listen_fd=listen_fd)
            exit_code, output = _run_ranks(first, device, meeting, folder / f"allreduce_{node_spec.node_rank}.log")
    except FnetError as error:
        return [Check("all-reduce", MISS, str(error), NETWORK_FIX)]
    return check_results(exit_code, output, reports_speed=is_first, over_a_network=over_a_network)


def check_results(exit_code: int, output: str, *, reports_speed: bool, over_a_network: bool) -> list[Check]:
    """Return the check for this node's ranks: a failure, wrong sums, or (if `reports_speed`) the bandwidth."""
    if exit_code:
        found = f"ranks here failed: {last_line(output, exit_code)}"
        return [Check("all-reduce", MISS, found, NETWORK_FIX if over_a_network else TORCH_FIX)]
    # Libraries may print too, at exit.
    results = [json.loads(line) for line in output.splitlines() if line.startswith('{"rank"')]
    if wrong := [result["rank"] for result in results if not result["right"]]:
        return [Check("all-reduce", MISS, f"a wrong sum on ranks {wrong}", "NCCL_DEBUG=INFO; another node, or driver")]
    if not reports_speed:
        return []
    speed = results[0]["mb_per_s"]
    found = f"{results[0]['world_size']} ranks, {results[0]['backend']}: right sums, {speed:,.0f} MB/s"
    if over_a_network and speed < SLOWEST_MB_S:
        return [Check("all-reduce", WARN, f"{found}; gigabit Ethernet carries {SLOWEST_MB_S:g}", NETWORK_FIX)]
    return [Check("all-reduce", OK, found)]


def _wait_for_address(folder: Path) -> str:
    """Return node 0's address once it is published and reachable. Raises FnetError if it is not."""
    began = time.monotonic()
    # An NFS client caches that a file is absent; listing the directory asks the server again.
    while folder / ADDRESS_FILE not in folder.iterdir():
        if time.monotonic() - began > TIMEOUT_S:
            raise FnetError(f"node 0 has published no address within {TIMEOUT_S:g} s; see its own checks")
        time.sleep(0.1)
    address: str | None = read_json(folder / ADDRESS_FILE)["address"]
    if address is None:
        raise FnetError("node 0 could not open a listening socket; see its own checks")
    check_connection(address, lambda: False)
    return address


def _run_ranks(first: LaunchEnv, device: str, meeting: Mapping[str, str], log: Path) -> tuple[int, str]:
    """Run this node's ranks, counted from `first`. Return the exit code of their launcher, and what all printed."""
    command = [sys.executable, "-m", "jobs.doctor.allreduce_check", json.dumps(asdict(first)), device]
    environment = add_meeting(python_environment(), meeting) | {"OMP_NUM_THREADS": "1"}  # as torchrun: shared cores
    fds = [] if first.listen_fd is None else [first.listen_fd]
    with log.open("wb") as output:
        try:
            code = subprocess.run(
                command, env=environment, stdin=DEVNULL, stdout=output, stderr=output, pass_fds=fds, timeout=RANKS_S
            ).returncode
        except subprocess.TimeoutExpired:
            code = 1
            output.write(f"the ranks did not end within {RANKS_S:g} s".encode())
    return code, log.read_text(encoding="utf-8", errors="replace")


def start_ranks(first: str, device: str) -> None:
    """Start this node's ranks and wait for them. Raises the error of the first that fails, and ends the others."""
    exit_with_parent()  # a doctor that is killed leaves no rank behind
    # Imported here: the doctor itself must survive a broken torch, to report it.
    from torch.multiprocessing.spawn import start_processes

    launch_env = LaunchEnv(**json.loads(first))
    # fork: torch is read from the disk once, and rank 0 inherits the listening socket. CUDA is not initialized yet.
    start_processes(measure, (launch_env, device), launch_env.local_world_size, start_method="fork")


def measure(local_rank: int, first: LaunchEnv, device: str) -> None:
    """Run all-reduces as one rank. Print if the sum is right, and the MB/s that each link carries.

    A ring all-reduce sends every byte of the tensor 2 (n - 1) / n times over each link (nccl-tests, "bus bandwidth").
    """
    exit_with_parent()
    import torch
    import torch.distributed as dist

    from fnet_dist.distributed.device import VisibleGpus, choose_device
    from fnet_dist.distributed.process_group import open_process_group

    listen_fd = None if local_rank else first.listen_fd  # the rank that has it serves the store
    launch_env = replace(first, rank=first.rank + local_rank, local_rank=local_rank, listen_fd=listen_fd)
    world_size = launch_env.world_size
    chosen = choose_device(device, launch_env, VisibleGpus(torch.cuda.device_count()))
    with open_process_group(launch_env, chosen, TIMEOUT_S) as group:
        # Integers below 7 in float32: their sums are exact, so that any wrong bit is an error.
        pattern = (torch.arange(MIB[group.device.type] << 18, device=group.device) % 7).float()
        summed = pattern * (group.rank + 1)
        dist.all_reduce(summed)
        right = torch.equal(summed, pattern * (world_size * (world_size + 1) // 2))
        times = []
        for _ in range(ROUNDS):
            dist.barrier()  # so that no rank measures the lateness of another
            began = time.perf_counter()
            dist.all_reduce(summed)
            summed[0].item()  # wait for the GPU: NCCL's all_reduce returns once it is queued
            times.append(time.perf_counter() - began)
        backend = dist.get_backend()
    speed = 2 * (world_size - 1) / world_size * pattern.nbytes / 1e6 / statistics.median(times)
    result = {"rank": group.rank, "world_size": world_size, "right": right, "mb_per_s": speed, "backend": backend}
    print(json.dumps(result))


if __name__ == "__main__":
    start_ranks(*sys.argv[1:])
