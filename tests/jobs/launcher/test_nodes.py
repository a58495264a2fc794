"""Two nodes, each with a torchrun of its own, as README starts them; both stand on this machine."""

import socket
from pathlib import Path

import pytest

from fnet_dist.run import metrics_log
from tests.helpers.processes import start

pytestmark = pytest.mark.processes


@pytest.mark.soak
def test_two_nodes_with_torchrun_train_one_run(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = [
        "--config",
        "jobs/quickstart.toml",
        "--data.dataset",
        "synthetic",
        "--run.max-steps",
        "12",
        "--run.name",
        "nodes",
    ]
    torchrun = f"-m torch.distributed.run --nnodes=2 --master-addr=127.0.0.1 --master-port={port} --nproc-per-node=1"
    trainer = ["-m", "fnet_dist.train", *job, "--run.root", str(tmp_path)]
    with (
        start(*torchrun.split(), "--node-rank=0", *trainer, GLOO_SOCKET_IFNAME="lo") as first,
        start(*torchrun.split(), "--node-rank=1", *trainer, GLOO_SOCKET_IFNAME="lo") as second,
    ):
        ended = [node.end(120) for node in (first, second)]
    assert [node.code for node in ended] == [0, 0], ended
    assert ended[0].out.splitlines()[-1].endswith(" report " + str(tmp_path / "nodes"))
    assert ended[1].out == ""
    steps = [line for line in metrics_log.read(tmp_path / "nodes" / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert all(len(line["loss_per_rank"]) == 2 for line in steps)
