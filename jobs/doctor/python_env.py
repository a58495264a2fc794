"""Check Python and the installed packages, and import torch in a process of its own: one that crashes is reported."""

import json
import re
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

from fnet_dist.processes import CODE_ROOT
from fnet_dist.versions import requirements
from jobs.doctor.result import MISS, OK, WARN, Check

INSTALL = "`make run` installs into .venv; or in an environment of your own: pip install -e ."
TIMEOUT_S = 180.0  # torch from a cold shared disk

# Prints torch's and torchvision's versions, the CUDA version, `gloo` and `gpus`.
INSPECT_TORCH = """
import json
import torch, torch.distributed, torchvision
def properties_of(index):
    try:
        properties = torch.cuda.get_device_properties(index)
        torch.ones(1, device=f"cuda:{index}").add_(1).item()  # a GPU can be visible and yet run no kernel
    except Exception as error:
        return {"error": str(error).partition(chr(10))[0]}
    return {"name": properties.name, "bytes": properties.total_memory}
print(json.dumps({
    "torch": torch.__version__, "torchvision": torchvision.__version__, "cuda": torch.version.cuda,
    "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
    "gpus": [properties_of(index) for index in range(torch.cuda.device_count())],
}))
"""


def python() -> Check:
    """Return the version of this Python. jobs/__main__.py has already refused one that is too old."""
    return Check("Python", OK, f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}")


def packages(project: Path = CODE_ROOT / "pyproject.toml") -> Check:
    """Check that the dependencies in pyproject.toml are installed, in versions that it allows."""
    needed, versions, missing = requirements(project), dict[str, str](), list[str]()
    for requirement in needed:
        name = re.split("[<>=]", requirement)[0]
        try:
            versions[requirement] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if find_spec(name) is None:  # else it is vendored without a dist-info, and its version not checked
                missing.append(requirement)
    if missing:
        return Check("packages", MISS, f"not installed: {', '.join(missing)}", INSTALL)
    from packaging.requirements import Requirement  # imported here: it may be one of those that are missing

    wrong = [
        f"{requirement} is asked for, {version} is here"
        for requirement, version in versions.items()
        # A nightly torch (2.16.0.dev) is as good as a release.
        if not Requirement(requirement).specifier.contains(version, prereleases=True)
    ]
    if wrong:
        return Check("packages", WARN, "; ".join(wrong), INSTALL)
    return Check("packages", OK, f"all {len(needed)} of pyproject.toml")


def run_python(program: str, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """Run a Python program and return the JSON in its last line, or {"error": the last line of its traceback}."""
    command = [sys.executable, "-c", program]
    try:
        ended = subprocess.run(command, cwd=CODE_ROOT, stdin=DEVNULL, capture_output=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout_s:g} s"}
    if ended.returncode:
        return {"error": last_line(ended.stderr.decode(errors="replace"), ended.returncode)}
    answer: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])  # libraries may print lines before
    return answer


def last_line(output: str, exit_code: int) -> str:
    """Return the last line that a program printed, at most 300 characters: of a traceback, the error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"exit code {exit_code}, and no output"


def torch(found: dict[str, Any]) -> Check:
    """Check that torch and torchvision can be imported together, and that torch has gloo, by INSPECT_TORCH's answer."""
    if "error" in found:
        return Check("torch", MISS, f"import torch, torchvision: {found['error']}", INSTALL)
    versions = f"{found['torch']}, torchvision {found['torchvision']}"
    if found["gloo"]:
        return Check("torch", OK, versions)
    return Check("torch", MISS, f"{versions}, built without gloo", "a build of torch with torch.distributed and gloo")
