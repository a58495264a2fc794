"""The CPUs of a GPU's NUMA node, as the kernel lists them; no GPU is needed."""

import pytest

from fnet_dist.distributed.numa import near_cpus

ADDRESS = "0000:3B:00.0"


@pytest.fixture
def sysfs(tmp_path):
    """Two nodes of four cores with two threads each; the GPU is on node 1."""
    for node, cpus in (("0", "0-3,8-11"), ("1", "4-7,12-15")):
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cpus}\n")
    device = tmp_path / "bus/pci/devices" / ADDRESS.lower()
    device.mkdir(parents=True)
    (device / "numa_node").write_text("1\n")
    return tmp_path


@pytest.mark.parametrize(
    ("allowed", "near"),
    [
        ({*range(16)}, {*range(4, 8), *range(12, 16)}),
        ({3, 4, 5}, {4, 5}),  # of those that Slurm has bound
        ({0, 1}, {0, 1}),  # bound to the other node: better there than nowhere
    ],
)
def test_of_the_allowed_cpus_those_near_the_gpu_are_taken(sysfs, allowed, near):
    assert near_cpus(ADDRESS, allowed, sysfs) == near


def test_an_unknown_node_changes_nothing(sysfs):
    (sysfs / "bus/pci/devices" / ADDRESS.lower() / "numa_node").write_text("-1\n")
    assert near_cpus(ADDRESS, {0, 5}, sysfs) == {0, 5}
    with pytest.raises(FileNotFoundError):
        near_cpus("0000:00:00.0", {0, 5}, sysfs)
