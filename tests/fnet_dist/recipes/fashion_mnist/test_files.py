"""Fashion-MNIST is read to the bit, synthetic data is labelled as such, and damaged files give one clear line."""

import os
import subprocess
import sys
from hashlib import sha256

import pytest
import torch
from torchvision import transforms
from torchvision.datasets import FashionMNIST

from fnet_dist.errors import DataError
from fnet_dist.recipes.fashion_mnist.dataset import CLASS_NAMES, build_dataset
from fnet_dist.recipes.fashion_mnist.settings import DataConfig
from fnet_dist.recipes.fashion_mnist.synthetic import make_synthetic
from jobs.commands.data import main

CPU = torch.device("cpu")
# The name in tables and plots, data.dataset in config.json, and whether a warning is shown.
REAL = ("Fashion-MNIST", "fashion-mnist", False)
SYNTHETIC = ("synthetic data, not Fashion-MNIST", "synthetic", True)
LABELS_SHA256 = "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"


def build(root, split="test", dataset="fashion-mnist"):
    return build_dataset(DataConfig(dataset=dataset, root=str(root)), split, CPU)


@pytest.fixture
def labels(root):
    """The test labels in `root`, as a regular file to damage."""
    path = root / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    return path


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize(("split", "count"), [("train", 60_000), ("test", 10_000)])
def test_values_are_those_of_torchvisions_own_transforms(real_data, split, count):
    ours = build(real_data, split)
    normalize = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    theirs = FashionMNIST(str(real_data), train=split == "train", transform=normalize)
    assert len(ours) == len(theirs) == count
    indices = torch.arange(0, count, 11)
    inputs = ours.batch(indices, 0)[0]
    assert inputs.dtype == torch.float32
    assert torch.equal(inputs, torch.stack([theirs[index][0] for index in indices.tolist()]))
    assert torch.equal(ours.batch(torch.arange(count), 0)[1], theirs.targets)
    assert len(inputs.unique()) == 256
    assert (ours.info.name, ours.info.config.dataset, ours.info.is_synthetic) == REAL
    assert ours.info.sha256 == sha256(theirs.data.numpy().tobytes() + bytes(theirs.targets.tolist())).hexdigest()
    assert ours.info.class_names == tuple(theirs.classes)


def truncate(path):
    path.write_bytes(path.read_bytes()[:5_000])
    return "found 5,000 bytes"


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return f"found 10,008 bytes with sha256 {sha256(content).hexdigest()}"


def put_a_foreign_file(path):
    path.write_bytes(b"<html>please log in</html>" * 1000)
    return f"found 26,000 bytes with sha256 {sha256(path.read_bytes()).hexdigest()}"


def put_a_directory(path):
    path.unlink()
    path.mkdir()
    return "Is a directory"


def put_a_fifo(path):
    path.unlink()
    os.mkfifo(path)
    return "is not a regular file"


def put_a_link_to_itself(path):
    path.unlink()
    path.symlink_to(path)
    return "Too many levels of symbolic links"


def put_a_link_to_nothing(path):
    path.unlink()
    path.symlink_to("moved-away")
    return "is a link to moved-away, which does not exist"


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_a_bit,
        put_a_foreign_file,
        put_a_directory,
        put_a_fifo,
        put_a_link_to_itself,
        put_a_link_to_nothing,
    ],
)
def test_a_damaged_file_is_named_and_neither_changed_nor_replaced_by_synthetic_data(root, labels, damage):
    found = damage(labels)
    before = os.lstat(labels)
    for dataset in ("fashion-mnist", "auto"):
        with pytest.raises(DataError) as caught:
            build(root, dataset=dataset)
        message = str(caught.value)
        assert f"{labels} " in message
        assert found in message
        assert f"fnet data fetch --root {root}" in message
        assert "\n" not in message
        if "sha256" in message:
            assert f"expected 10,008 bytes with sha256 {LABELS_SHA256}" in message
    assert os.lstat(labels) == before


def test_a_file_where_the_folder_should_be_is_refused(tmp_path):
    (tmp_path / "FashionMNIST").write_text("")
    with pytest.raises(DataError, match="Not a directory"):
        build(tmp_path)


def test_processed_files_of_an_old_torchvision_are_not_read(root):
    processed = root / "FashionMNIST" / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(10_000, 28, 28, dtype=torch.uint8), torch.zeros(10_000)), processed / name)
    assert build(root).batch(torch.arange(10), 0)[1].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]


@pytest.mark.timeout(30)
def test_the_error_without_a_network_names_missing_files_their_directory_and_the_fix(root, labels, no_network):
    labels.unlink()
    for split in ("test", "train"):
        with pytest.raises(DataError) as caught:
            build(root, split)
        message = str(caught.value)
        assert f"missing: t10k-labels-idx1-ubyte not in {labels.parent}" in message
        assert "http://127.0.0.1:9/t10k-labels-idx1-ubyte.gz: <urlopen error [Errno 111] Connection refused>" in message
        assert "fnet data fetch --root DIR" in message
        assert "--data.dataset synthetic" in message
        assert "\n" not in message
    assert not list(labels.parent.glob(".fetching-*"))


def test_a_folder_that_cannot_be_written_is_named(no_network):
    with pytest.raises(DataError, match=r"missing: .*train-images.*\(.*: /proc/1/fashion\)"):
        build("/proc/1/fashion")


def test_auto_uses_the_real_data_if_it_is_there(real_data):
    dataset = build(real_data, dataset="auto")
    assert (dataset.info.name, dataset.info.config.dataset, dataset.info.is_synthetic) == REAL


def test_auto_without_files_or_network_uses_synthetic_data_and_prints_nothing(tmp_path, no_network, capfd):
    dataset = build(tmp_path, dataset="auto")
    assert (dataset.info.name, dataset.info.config.dataset, dataset.info.is_synthetic) == SYNTHETIC
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("split", "count", "digest"),
    [
        ("train", 60_000, "f573438c26fee27fdc67345f6e5aea7401135f3ed3f8f1d5509ee254d71962cd"),
        ("test", 10_000, "13cdb6a5501d8a72300fda176fe0d8b745b4f732bdad9b2edc9153ee427e3a7d"),
    ],
)
def test_synthetic_data_has_the_real_shapes_and_the_same_bytes_on_every_machine(tmp_path, split, count, digest):
    dataset = build(tmp_path, split, "synthetic")
    assert dataset.info.sha256 == digest
    inputs, targets = dataset.batch(torch.arange(count), 0)
    assert inputs.shape == (count, 1, 28, 28)
    assert inputs.dtype == torch.float32
    assert (inputs.min(), inputs.max() > 0.5) == (-1, True)
    assert torch.bincount(targets).tolist() == [count // 10] * 10
    assert (dataset.info.name, dataset.info.config.dataset, dataset.info.is_synthetic) == SYNTHETIC
    assert dataset.info.class_names == CLASS_NAMES


def test_synthetic_data_is_neither_trivial_nor_impossible_to_learn():
    """The class with the nearest mean image is a simple model's guess: right often, but far from always."""
    images, labels = (torch.from_numpy(array) for array in make_synthetic("test"))
    images = images.reshape(-1, 784).float()
    means = torch.stack([images[:5000][labels[:5000] == kind].mean(0) for kind in range(10)])
    found = torch.cdist(images[5000:], means).argmin(1)
    assert 0.4 < (found == labels[5000:]).float().mean() < 0.9


def test_the_data_command_checks_each_file_and_reads_fnet_data(root, labels, monkeypatch, capsys):
    monkeypatch.setenv("FNET_DATA", str(root))
    assert main(["verify"]) == 0
    out = capsys.readouterr().out
    assert f"{labels}: ok\n" in out
    assert f"FNET_DATA={root}" in out
    assert main(["fetch", "--root", str(root)]) == 0
    labels.unlink()
    with pytest.raises(DataError, match="1 of 4 files"):
        main(["verify"])
    assert f"{labels}: is missing\n" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["mend"])


def test_a_login_node_needs_no_torch_to_check_the_files():
    program = "import sys, jobs.commands.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_workers_stream_the_same_bits_in_the_same_order() -> None:
    on_device, streamed = (
        build_dataset(DataConfig(dataset="synthetic", num_workers=count), "test", CPU) for count in (0, 2)
    )
    order = torch.randperm(len(on_device))[:300].split(64)
    for ours, theirs in zip(on_device.batches(order, 0), streamed.batches(order, 0), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
