"""Installing into a site's environment leaves the site's own torch alone."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

UV = Path(sys.executable).parent / "uv"


def test_an_environment_that_has_torch_keeps_it(repository: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    subprocess.run([UV, "venv", "--python", sys.executable, site], check=True, capture_output=True, timeout=60)
    packages = site / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    for name, version in (("torch", "2.11.0+site"), ("torchvision", "0.26.0+site")):
        info = packages / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "RECORD").write_text("")
        (info / "INSTALLER").write_text("site\n")
    plan = subprocess.run(
        [UV, "pip", "install", "--dry-run", "--python", site / "bin" / "python", "--editable", repository],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert plan.returncode == 0, plan.stderr
    changed = {line[3:].split("==")[0].split(" ")[0] for line in plan.stderr.splitlines() if line[:3] in (" + ", " - ")}
    assert {"fnet-dist", "pydantic"} <= changed
    assert {"torch", "torchvision"} & changed == set()
