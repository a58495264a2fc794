"""Check what a machine has for training: devices, data, a disk for runs, W&B, names that resolve."""

import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fnet_dist.config.load_recipe import load_recipe
from fnet_dist.config.schema import Config
from fnet_dist.errors import FnetError
from jobs.doctor.python_env import INSPECT_TORCH, run_python, torch
from jobs.doctor.result import MISS, OK, WARN, Check
from jobs.launcher.node_spec import address_of_node
from jobs.submission.preflight import missing_data, not_writable
from slurm.errors import SlurmError
from slurm.job_env import Allocation, binding_gaps

MIN_FREE_GB = 1.0  # a few checkpoints and logs of the model that is shipped
DRIVER = Path("/proc/driver/nvidia/gpus")  # the kernel driver's own list: there without CUDA, and without torch
WANDB_S = 60.0

_WANDB = """
import json, wandb
from fnet_dist.tracking import mode
print(json.dumps({"version": wandb.__version__, "url": mode.server_url(), "problem": mode.why_not_online()}))
"""


def check_machine(config: Config, gpus_wanted: int = 0) -> tuple[list[Check], int]:
    """Return the checks that this machine and each node have in common, and the number of GPUs that torch sees."""
    found = run_python(INSPECT_TORCH)
    runs = Path(config.run.root).expanduser().absolute()
    checks = [torch(found), *devices(found, gpus_wanted), data(config), disk(runs), wandb(config)]
    return checks, len(found.get("gpus", []))


def devices(found: dict[str, Any], gpus_wanted: int = 0, driver: Path = DRIVER) -> list[Check]:
    """Check the GPUs that torch sees and can compute on, or count the CPUs. Return [] if torch itself is broken."""
    if "error" in found:
        return []
    gpus = found["gpus"]
    if broken := [gpu["error"] for gpu in gpus if "error" in gpu]:
        return [Check("devices", MISS, f"{len(broken)} of {len(gpus)} GPUs: {broken[0]}", "nvidia-smi; another node")]
    build = f"torch is built for {'CUDA ' + found['cuda'] if found['cuda'] else 'the CPU alone'}"
    if len(gpus) < gpus_wanted:
        text = f"{len(gpus)} of {gpus_wanted} GPUs asked for are visible to torch; {build}"
        return [Check("devices", MISS, text, "nvidia-smi on the node; a torch for its driver; or fewer GPUs")]
    if not gpus and driver.exists() and any(driver.iterdir()):  # torch may be built for the CPU, or for another driver
        return [Check("devices", WARN, f"a GPU is here, torch sees none; {build}", "a torch for this driver")]
    names = [f"{gpu['name']} ({gpu['bytes'] / 2**30:.0f} GiB)" for gpu in gpus]
    counts = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]  # in the order of the devices
    return [Check("devices", OK, ", ".join([*counts, f"{len(os.sched_getaffinity(0))} CPUs for this process"]))]


def bindings(allocation: Allocation, cpus_wanted: int) -> Check:
    """Check that Slurm binds this node's task to as many CPUs as were asked for. `devices` checks the GPUs."""
    if gaps := binding_gaps(allocation, cpus_wanted, 0):  # 0: `devices` counts the GPUs
        return Check("CPUs", WARN, "; ".join(gaps), "--cpus-per-task to srun too, or another TaskPlugin: ask the site")
    return Check("CPUs", OK, f"{cpus_wanted} asked for, {len(os.sched_getaffinity(0))} may be used")


def data(config: Config) -> Check:
    """Check that the data set is there, by the sha256 of each file."""
    if (problem := missing_data(config)) is not None:
        return Check("data", MISS, *problem.split("; ", 1))
    knows = hasattr(load_recipe(config.recipe), "missing_data")
    return Check("data", OK, f"recipe {config.recipe}: {'complete' if knows else 'it does not check its data'}")


def disk(root: Path) -> Check:
    """Check that runs can be written below `root`, by writing a file, and that there is space."""
    if (problem := not_writable(root)) is not None:
        return Check("disk", MISS, *problem.split("; ", 1))
    existing = next(path for path in (root, *root.parents) if path.exists())  # the first run makes the rest
    free_gb = shutil.disk_usage(existing).free / 1e9
    found = f"{root}: {free_gb:,.1f} GB free"
    if free_gb < MIN_FREE_GB:
        fix = "make room, or another --run.root, or run_root in slurm/site.toml"
        return Check("disk", WARN, f"{found}, less than {MIN_FREE_GB:g}", fix)
    return Check("disk", OK, found)


def wandb(config: Config) -> Check:
    """Check that the SDK, an API key and a server that answers are there. The key itself is never shown."""
    mode = config.tracking.wandb
    if mode == "disabled":
        return Check("W&B", OK, "disabled by tracking.wandb")
    found = run_python(_WANDB, WANDB_S)  # in its own process: a broken SDK can crash
    if "error" in found:
        return Check("W&B", WARN, f"import wandb: {found['error']}", "pip install -e .; or --tracking.wandb disabled")
    if found["problem"] is None:
        return Check("W&B", OK, f"{found['version']}, {mode}: a key, and {found['url']} answers")
    if mode == "offline":
        return Check("W&B", OK, f"{found['version']}, offline by tracking.wandb")
    fix = "`wandb login` or WANDB_API_KEY, on a node with internet"
    verdict, then = (MISS, "or --tracking.wandb auto") if mode == "online" else (WARN, "until then runs are offline")
    return Check("W&B", verdict, f"{found['version']}, {mode}: {found['problem']}", f"{fix}; {then}")


def own_name() -> Check:
    """Check that this machine's own name resolves. torchrun on several nodes needs that, `fnet run` does not."""
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, None)[0][4][0]
    except OSError as error:
        found = f"{name}: {error.strerror}; torchrun on several nodes would wait for it, `fnet run` does not"
        return Check("own name", WARN, found, f"a line in /etc/hosts for {name}")
    return Check("own name", OK, f"{name} is {address}")


def node_names(names: Sequence[str], verdict: str = MISS) -> Check:
    """Check that the nodes' names resolve, or that Slurm knows their addresses; `verdict` is the result if not."""
    unresolved = []
    for name in names:
        try:
            address_of_node(name)  # as the launcher resolves it
        except (FnetError, SlurmError) as error:
            unresolved.append(f"{name} ({error})")
    if unresolved:
        found = f"{len(unresolved)} of {len(names)} nodes have no address: {unresolved[0]}"
        return Check("node names", verdict, found, "NodeAddr in slurm.conf, or the site's name service")
    return Check("node names", OK, f"{len(names)} of {len(names)} nodes have addresses")
