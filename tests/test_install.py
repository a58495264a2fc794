"""Installing: a site's own torch is left alone, and `fnet` works in every directory."""

import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from fnet_dist.run.run_dir import RunDir, read_json

pytestmark = pytest.mark.processes

UV = Path(sys.executable).parent / "uv"
JOB = """
data = {dataset = "synthetic", global_batch_size = 600}
run = {epochs = 1, max_steps = 5}
parallel = {device = "cpu"}
tracking = {wandb = "disabled"}
"""


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `pip install .` makes."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [UV, "build", "--wheel", "--python", sys.executable, "--out-dir", folder, repository]
    built = subprocess.run(build, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def fnet(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script `fnet` of an environment with that wheel, which finds all other packages in the one that runs now."""
    environment = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([UV, "venv", "--python", sys.executable, environment], check=True, capture_output=True, timeout=60)
    install = [UV, "pip", "install", "--no-deps", "--python", environment / "bin" / "python", wheel]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    packages = environment / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "others.pth").write_text("\n".join(others) + "\n")
    return environment / "bin" / "fnet"


def run_fnet(fnet: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`fnet WORDS` in `cwd`, to its end."""
    environment = {**os.environ, "PATH": f"{fnet.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(["fnet", *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_the_wheel_holds_all_three_packages_and_their_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {*archive.namelist()}
    assert names >= {
        "fnet_dist/train.py",
        "jobs/__main__.py",
        "jobs/commands/status.py",
        "jobs/quickstart.toml",
        "slurm/client.py",
        "slurm/train.sbatch",
        "slurm/site.example.toml",
    }
    assert "slurm/site.toml" not in names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fnet_dist", "jobs", "slurm"}


def test_fnet_trains_and_reports_in_a_directory_that_holds_only_a_job_file(fnet: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(JOB)
    shown = run_fnet(fnet, tmp_path, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("usage: fnet COMMAND")
    unknown = run_fnet(fnet, tmp_path, "stats")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr.startswith("error: unknown command 'stats'; nearest: status; all: ask, cancel, ")
    trained = run_fnet(fnet, tmp_path, "run", "mine.toml", "--nproc-per-node", "2")
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.splitlines()[-1] == "next: fnet report mine"
    run = RunDir(tmp_path / "runs" / "mine")
    assert (read_json(run.outcome)["step"], read_json(run.attempt(1) / "begin.json")["world_size"]) == (5, 2)
    status = run_fnet(fnet, tmp_path, "status")
    assert status.returncode == 0, status.stderr
    assert "finished" in status.stdout
    refused = run_fnet(fnet, tmp_path, "run", "other.toml")
    assert refused.stderr == f"error: other.toml: no such file in {tmp_path}; nearest: mine.toml\n"


def test_the_ranks_run_the_launchers_code_in_a_directory_with_another_checkout(fnet: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(JOB)
    (tmp_path / "fnet_dist").mkdir()
    (tmp_path / "fnet_dist" / "__init__.py").write_text("raise ImportError('another checkout')")
    trained = run_fnet(fnet, tmp_path, "run", "mine.toml")
    assert trained.returncode == 0, trained.stdout + trained.stderr


def test_a_checkout_on_pythonpath_trains_without_any_dist_info(repository: Path, tmp_path: Path) -> None:
    """As where the dependencies are vendored, or a site's modules put them on the path."""
    environment = tmp_path / "venv"
    subprocess.run([UV, "venv", "--python", sys.executable, environment], check=True, capture_output=True, timeout=60)
    packages = environment / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    for folder in map(Path, (path for path in sys.path if path.endswith("site-packages"))):
        for path in folder.iterdir():
            if path.suffix != ".dist-info" and "fnet_dist" not in path.name and not (packages / path.name).exists():
                (packages / path.name).symlink_to(path)
    (tmp_path / "mine.toml").write_text(JOB)
    given = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [environment / "bin" / "python", *words]
        return subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True, timeout=120)

    trained = run("-m", "jobs", "run", "mine.toml")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    versions = read_json(RunDir(tmp_path / "runs" / "mine").manifest)["versions"]
    assert versions["torch"].startswith(version("torch"))
    assert versions["fnet_dist"] == version("fnet-dist")
    checked = run("-c", "from jobs.doctor.python_env import packages; print(packages())")
    assert "verdict='OK'" in checked.stdout, checked.stdout + checked.stderr


def test_an_environment_that_has_torch_keeps_it(repository: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    subprocess.run([UV, "venv", "--python", sys.executable, site], check=True, capture_output=True, timeout=60)
    packages = site / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    for name, release in (("torch", "2.11.0+site"), ("torchvision", "0.26.0+site")):
        info = packages / f"{name}-{release}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")
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
