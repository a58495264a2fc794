"""Two nodes, each with a torchrun of its own, as README starts them; both stand on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from fnet_dist import ledger
from tests.ranks import REPOSITORY


def test_two_nodes_train_one_run(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = "jobs/quickstart.toml --data.dataset synthetic --run.max-steps 12".split()
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}"]
            + ["--master-addr=127.0.0.1", f"--master-port={port}", "--nproc-per-node=1"]
            + ["-m", "fnet_dist.train", "--config", *job, "--run.root", str(tmp_path), "--run.name", "nodes"],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    try:
        ended = [node.communicate(timeout=120) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], ended
    assert ended[0][0].splitlines()[-1].endswith("-m jobs report " + str(tmp_path / "nodes"))
    assert ended[1][0] == ""
    steps = [line for line in ledger.read(tmp_path / "nodes" / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert all(len(line["loss_per_rank"]) == 2 for line in steps)
