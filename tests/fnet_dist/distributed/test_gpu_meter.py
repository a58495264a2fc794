"""The usage of a GPU, read by torch from a stand-in for NVIDIA's library with recorded answers."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

PYNVML = """
from types import SimpleNamespace as S
class NVMLError(Exception): pass
class NVMLError_DriverNotLoaded(NVMLError): pass
def nvmlInit(): pass
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetUtilizationRates(handle): return S(gpu=90 + handle, memory=40)
def nvmlDeviceGetMemoryInfo(handle): return S(total=80 * 2**30, used=(3 + handle) * 2**30)
def nvmlDeviceGetPowerUsage(handle): return 412_300 + 1000 * handle
def nvmlDeviceGetTemperature(handle, sensor): return 55 + handle
"""
PROGRAM = """
import json, threading, torch
from fnet_dist.distributed.gpu_meter import GpuMeter, gpu_meter
torch._utils._get_current_device_index = lambda: 0  # torch asks for it too, and finds no GPU here
meter, is_over = GpuMeter(), threading.Event()
meter_of_cpu = gpu_meter(torch.device("cpu"))
with meter_of_cpu as cpu: pass
threading.Timer(0.3, is_over.set).start()
meter.follow(torch.device("cuda", 1), is_over)
print(json.dumps([list(meter.usage), list(cpu.usage)]))
"""


def usages(folder: Path, text: str, **environment: str) -> list[list[float]]:
    """Return the usage of GPU 1 and of the CPU, where the library is `text`."""
    (folder / "pynvml.py").write_text(text)
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={"PYTHONPATH": f"{folder}:{Path.cwd()}", "CUDA_VISIBLE_DEVICES": "3,2", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found: list[list[float]] = json.loads(ended.stdout)
    return found


def test_the_usage_is_that_of_the_visible_device(tmp_path: Path) -> None:
    gpu, cpu = usages(tmp_path, PYNVML)
    assert gpu == [92.0, 5.0, 414.3, 57.0]  # device 1 of the visible "3,2" is GPU 2
    assert all(map(math.isnan, cpu))


@pytest.mark.parametrize("text", ["raise ImportError('no library')", PYNVML + "\nnvmlDeviceGetPowerUsage = None"])
def test_without_the_library_or_one_of_its_answers_there_are_no_figures(tmp_path: Path, text: str) -> None:
    gpu, _ = usages(tmp_path, text)
    assert all(map(math.isnan, gpu))
