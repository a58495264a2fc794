"""What a machine has for training: devices, data, a disk for runs, W&B, names that resolve."""

import os
import shutil
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fnet_dist.config.schema import Config
from fnet_dist.errors import FnetError
from jobs.doctor.python_env import ask
from jobs.doctor.result import MISS, OK, WARN, Check
from jobs.launcher.node_spec import address_of_node
from jobs.submission.preflight import is_official, missing_data
from slurm.errors import SlurmError
from slurm.job_env import Allocation, binding_gaps

LEAST_FREE_GB = 1.0
DRIVER = Path("/proc/driver/nvidia/gpus")
WANDB_S = 60.0

_WANDB = """
import json, wandb
from wandb.sdk import wandb_setup
from fnet_dist.tracking import mode as place
url = wandb_setup.singleton().settings.base_url
print(json.dumps({"version": wandb.__version__, "url": url, "key": place.missing_key(),
                  "answers": place.server_answers(url, place.PROBE_S)}))
"""


def devices(answer: dict[str, Any], gpus_asked: int = 0, driver: Path = DRIVER) -> list[Check]:
    """The GPUs that torch sees and can compute on, or the CPUs. Nothing where torch itself is broken."""
    if "error" in answer:
        return []
    gpus = answer["gpus"]
    if broken := [gpu["error"] for gpu in gpus if "error" in gpu]:
        return [Check("devices", MISS, f"{len(broken)} of {len(gpus)} GPUs: {broken[0]}", "nvidia-smi; another node")]
    cpus = f"{len(os.sched_getaffinity(0))} CPUs for this process"
    names = [f"{gpu['name']} ({gpu['bytes'] / 2**30:.0f} GiB)" for gpu in gpus]
    counts = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    build = f"torch is built for {'CUDA ' + answer['cuda'] if answer['cuda'] else 'the CPU alone'}"
    if len(gpus) < gpus_asked:
        found = f"{len(gpus)} of {gpus_asked} GPUs asked for are visible to torch; {build}"
        return [Check("devices", MISS, found, "nvidia-smi on the node; a torch for its driver; or fewer GPUs")]
    if not gpus and driver.exists() and any(driver.iterdir()):
        return [Check("devices", WARN, f"a GPU is here, torch sees none; {build}", "a torch for this driver")]
    return [Check("devices", OK, ", ".join([*counts, cpus]))]


def bindings(allocation: Allocation, cpus_asked: int) -> Check:
    """Whether Slurm gives this node's task the CPUs that were asked for. GPUs are for torch to see."""
    gaps = binding_gaps(allocation, cpus_asked, 0)
    if gaps:
        return Check("CPUs", WARN, "; ".join(gaps), "--cpus-per-task to srun too, or another TaskPlugin: ask the site")
    return Check("CPUs", OK, f"{cpus_asked} asked for, {len(os.sched_getaffinity(0))} may be used")


def data(config: Config) -> Check:
    """Whether the data set is there, to the last byte."""
    missing = missing_data(config)
    if missing is None:
        dataset = getattr(config.data, "dataset", "one of your own")
        looked = f"every byte in {config.data.root}" if is_official(config) else "nothing known to look for"
        return Check("data", OK, f"{dataset}: {looked}")
    found, _, fix = missing.partition("; ")
    return Check("data", MISS, found, fix)


def disk(root: Path) -> Check:
    """Whether runs can be written, by writing, and the space for them."""
    root = root.absolute()
    existing = next(path for path in (root, *root.parents) if path.exists())
    fix = "another --run.root, or run_root in slurm/site.toml"
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".doctor-") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Check("disk", MISS, f"{root}: {existing} cannot be written: {error.strerror}", fix)
    free_gb = shutil.disk_usage(existing).free / 1e9
    found = f"{root}: {free_gb:,.1f} GB free"
    if free_gb < LEAST_FREE_GB:
        return Check("disk", WARN, f"{found}, less than {LEAST_FREE_GB:g}", f"make room, or {fix}")
    return Check("disk", OK, found)


def wandb(config: Config) -> Check:
    """Whether the SDK is there, a key, and a server that answers. The key itself is never shown."""
    mode = config.tracking.wandb
    if mode == "disabled":
        return Check("W&B", OK, "disabled, as the settings say")
    answer = ask(_WANDB, WANDB_S)
    if "error" in answer:
        return Check("W&B", WARN, f"import wandb: {answer['error']}", "pip install -e .; or --tracking.wandb disabled")
    lacking = [answer["key"]] if answer["key"] else []
    lacking += [] if answer["answers"] else [f"{answer['url']} does not answer"]
    if not lacking:
        return Check("W&B", OK, f"{answer['version']}, {mode}: a key, and {answer['url']} answers")
    if mode == "offline":
        return Check("W&B", OK, f"{answer['version']}, offline, as the settings say")
    fix = "`wandb login` or WANDB_API_KEY, on a node with internet"
    verdict, so = (MISS, "or --tracking.wandb auto") if mode == "online" else (WARN, "until then runs are offline")
    return Check("W&B", verdict, f"{answer['version']}, {mode}: {'; '.join(lacking)}", f"{fix}; {so}")


def own_name() -> Check:
    """Whether this machine's own name resolves: torchrun on several nodes asks for it, `jobs run` does not."""
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, None)[0][4][0]
    except OSError as error:
        found = f"{name}: {error.strerror}; torchrun on several nodes would wait for it, `jobs run` does not"
        return Check("own name", WARN, found, f"a line in /etc/hosts for {name}")
    return Check("own name", OK, f"{name} is {address}")


def node_names(names: Sequence[str], otherwise: str = MISS) -> Check:
    """Whether nodes have addresses, by their names or by what Slurm knows; the verdict `otherwise` if not."""
    lost = []
    for name in names:
        try:
            address_of_node(name)
        except (FnetError, SlurmError) as error:
            lost.append(f"{name} ({error})")
    if lost:
        found = f"{len(lost)} of {len(names)} nodes have no address: {lost[0]}"
        return Check("node names", otherwise, found, "NodeAddr in slurm.conf, or the site's name service")
    return Check("node names", OK, f"{len(names)} of {len(names)} nodes have addresses")
