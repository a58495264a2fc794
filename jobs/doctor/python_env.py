"""The checks that come first, on nothing but the standard library: Python, the packages, torch in a process of its own.

A torch that is broken breaks that process, and not the doctor.
"""

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

from jobs.doctor.result import MISS, OK, WARN, Check

ROOT = Path(__file__).parents[2]
INSTALL = "`make run` installs into .venv; or in an environment of your own: pip install -e ."
ASK_S = 180.0  # torch from a cold shared disk

_TORCH = """
import json
import torch, torch.distributed, torchvision
def look(index):
    try:
        properties = torch.cuda.get_device_properties(index)
        torch.ones(1, device=f"cuda:{index}").add_(1).item()
    except Exception as error:
        return {"error": str(error).partition(chr(10))[0]}
    return {"name": properties.name, "bytes": properties.total_memory}
print(json.dumps({
    "torch": torch.__version__, "torchvision": torchvision.__version__, "cuda": torch.version.cuda,
    "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
    "gpus": [look(index) for index in range(torch.cuda.device_count())],
}))
"""


def python() -> Check:
    """Which Python this is; one that is too old has not got here (jobs/__main__.py)."""
    return Check("Python", OK, f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}")


def packages(project: Path = ROOT / "pyproject.toml") -> Check:
    """Whether what pyproject.toml asks for is installed, in a release that it asks for."""
    if project.exists():
        needed = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:  # installed without a checkout
        needed = [text for text in metadata.requires("fnet-dist") or () if "extra ==" not in text]
    installed = {requirement: _installed(requirement) for requirement in needed}
    if missing := [requirement for requirement, version in installed.items() if version is None]:
        return Check("packages", MISS, f"not installed: {', '.join(missing)}", INSTALL)
    other = [
        f"{requirement} is asked for, {version} is here"
        for requirement, version in installed.items()
        if version is not None and not _fits(version, requirement)
    ]
    if other:
        return Check("packages", WARN, "; ".join(other), INSTALL)
    return Check("packages", OK, f"all {len(needed)} of pyproject.toml")


def ask(program: str, timeout_s: float = ASK_S) -> dict[str, Any]:
    """What a Python program prints as JSON in its last line; {"error": its last words} where it fails."""
    try:
        ended = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout_s:g} s"}
    if ended.returncode:
        return {"error": last_words(ended.stderr, ended.returncode)}
    answer: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return answer


def last_words(text: str, exit_code: int) -> str:
    """What a program that failed said last, in one line."""
    said = [line.strip() for line in text.splitlines() if line.strip()]
    return said[-1][:300] if said else f"exit code {exit_code}, without a word"


def ask_torch() -> dict[str, Any]:
    """What torch says of itself and of the GPUs that it sees."""
    return ask(_TORCH)


def torch(answer: dict[str, Any]) -> Check:
    """Whether torch and torchvision can be imported together."""
    if "error" in answer:
        return Check("torch", MISS, f"import torch, torchvision: {answer['error']}", INSTALL)
    found = f"{answer['torch']}, torchvision {answer['torchvision']}"
    if not answer["gloo"]:
        return Check("torch", MISS, f"{found}, built without gloo", "a build of torch with torch.distributed and gloo")
    return Check("torch", OK, found)


def _installed(requirement: str) -> str | None:
    try:
        return metadata.version(re.split("[<>=]", requirement)[0])
    except metadata.PackageNotFoundError:
        return None


def _fits(version: str, requirement: str) -> bool:
    """Whether "2.15.0+cu132" is in ">=2.11,<3"; only the numbers count."""
    bounds = re.findall(r"(>=|<)([\d.]+)", requirement)
    return all((_numbers(version) >= _numbers(bound)) == (sign == ">=") for sign, bound in bounds)


def _numbers(version: str) -> list[int]:
    leading = re.match(r"[\d.]*", version)
    return [int(number) for number in re.findall(r"\d+", leading[0] if leading else "")]
