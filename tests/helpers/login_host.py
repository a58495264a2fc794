"""A laptop and a cluster's login node on this machine: a checkout, a home directory, and an sshd on loopback."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fnet_dist.run.git import code_files
from tests.conftest import REPOSITORY
from tests.helpers.processes import wait_until

SSHD = "/usr/sbin/sshd"
GIT = ("git", "-c", "user.name=n", "-c", "user.email=e@x")


@dataclass(frozen=True)
class Laptop:
    """A checkout, and the environment in which ssh knows the host `cluster`. `there` is its directory on the cluster,
    whose home directory is `home`."""

    checkout: Path
    home: Path
    there: Path
    environment: dict[str, str]

    def fnet(self, *words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `fnet WORDS` to its end, with a Python that has no packages."""
        return subprocess.run(
            self.command(*words),
            cwd=cwd or self.checkout,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def command(self, *words: str) -> list[str]:
        """Return the command line of `fnet WORDS`."""
        return [sys.executable, "-S", "-m", "jobs", *words]


@contextmanager
def login_host(folder: Path) -> Iterator[Laptop]:
    """Run sshd inside the block. Everything that it needs lies in `folder`, so does everything that is written."""
    checkout, home, binaries = folder / "laptop" / "fnet", folder / "home", folder / "bin"
    for path in (checkout, home, binaries):
        path.mkdir(parents=True)
    copy_checkout(checkout)
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True, timeout=10)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
        f"PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nSetEnv HOME={home}\n"
        'ForceCommand cd "$HOME" && exec sh -c "$SSH_ORIGINAL_COMMAND"\n'  # as if that were the user's own
    )
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    (folder / "ssh_config").write_text(
        f"Host cluster\n  HostName 127.0.0.1\n  Port {port}\n"
        f"Host nobody\n  HostName 127.0.0.1\n  Port 1\n"
        f"Host *\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n  BatchMode yes\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n"
    )
    wrapper = binaries / "ssh"  # ssh reads the home directory from the list of users, not from HOME
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    wrapper.chmod(0o755)
    there = home / "fnet"
    (folder / "site.toml").write_text(f'login = "cluster:{there.name}"\npython = "{sys.executable}"\n')
    environment = {
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "HOME": str(folder / "laptop"),
        "FNET_SITE": str(folder / "site.toml"),
        "PYTHONPATH": str(checkout),
        "TERM": "xterm",
    }
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # Debian's service makes it
    with (folder / "sshd.log").open("wb") as log:
        sshd = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    try:
        wait_until(lambda: b"listening on" in (folder / "sshd.log").read_bytes(), 10)
        yield Laptop(checkout, home, there, environment)
    finally:
        sshd.kill()
        sshd.wait()


def copy_checkout(to: Path) -> None:
    """Make a git checkout with the files of this one."""
    for file in code_files(REPOSITORY):
        (to / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / file, to / file, follow_symlinks=False)
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*GIT, *words], cwd=to, check=True, timeout=30)
