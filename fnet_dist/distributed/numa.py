"""Bind a rank to the CPUs that are near its GPU, where a machine has several NUMA nodes."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

SYSFS = Path("/sys")


def near_cpus(pci_address: str, allowed: set[int], sysfs: Path = SYSFS) -> set[int]:
    """Return those of the CPUs `allowed` that are on the NUMA node of the device at `pci_address`, 0000:3b:00.0.

    Return all of them if the machine has one node, if the device's is not known, or if none of its CPUs is allowed.
    """
    node = (sysfs / "bus/pci/devices" / pci_address.lower() / "numa_node").read_text(encoding="ascii").strip()
    cpus = set[int]()
    if node != "-1":
        ranges = (sysfs / f"devices/system/node/node{node}/cpulist").read_text(encoding="ascii").strip().split(",")
        for first, _, last in (each.partition("-") for each in ranges if each):
            cpus |= {*range(int(first), int(last or first) + 1)}
    return cpus & allowed or allowed


def bind_to_numa_node(device: torch.device) -> int | None:
    """Let all threads of this process run near the GPU `device`; return their number of CPUs, None if nothing changes.

    What Slurm or torchrun --numa-binding has chosen is only narrowed.
    """
    found: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack its PCI address
    address = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    allowed = os.sched_getaffinity(0)
    with suppress(OSError, ValueError):  # a container may hide /sys, or forbid it
        if (cpus := near_cpus(address, allowed)) != allowed:
            for thread in Path("/proc/self/task").iterdir():  # CUDA has started some
                os.sched_setaffinity(int(thread.name), cpus)
            return len(cpus)
    return None
