"""Read how this rank's GPU is used, through torch from NVIDIA's management library (nvidia-ml-py, optional)."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

INTERVAL_S = 1.0


class GpuUsage(NamedTuple):
    """The usage of a rank's GPU, by all processes; NaN where it cannot be read."""

    percent: float  # of the time, some kernel ran
    memory_gib: float
    watts: float
    celsius: float


NO_USAGE = GpuUsage(math.nan, math.nan, math.nan, math.nan)


class GpuMeter:
    """The newest usage of one GPU. A thread reads it: a call may take milliseconds, for which no step should wait."""

    def __init__(self) -> None:
        self.usage = NO_USAGE

    def follow(self, device: torch.device, is_over: threading.Event) -> None:
        """Read the usage once a second until `is_over`, or until it cannot be read."""
        while not is_over.is_set():
            try:
                self.usage = read_usage(device)
            except Exception:  # no library or driver, or a virtual GPU: each has errors of its own
                self.usage = NO_USAGE
                return
            is_over.wait(INTERVAL_S)


def read_usage(device: torch.device) -> GpuUsage:
    """Return the usage of `device` at this moment. Raise what torch and the library raise."""
    return GpuUsage(
        percent=float(torch.cuda.utilization(device)),
        memory_gib=torch.cuda.device_memory_used(device) / 2**30,
        watts=torch.cuda.power_draw(device) / 1000,
        celsius=float(torch.cuda.temperature(device)),
    )


@contextmanager
def gpu_meter(device: torch.device) -> Iterator[GpuMeter]:
    """Measure the usage of `device` within the block; on a CPU there is none."""
    meter, is_over = GpuMeter(), threading.Event()
    if device.type == "cuda":
        # A daemon: a call that hangs in the driver must not keep the process alive.
        threading.Thread(target=meter.follow, args=(device, is_over), name="gpu meter", daemon=True).start()
    try:
        yield meter
    finally:
        is_over.set()
