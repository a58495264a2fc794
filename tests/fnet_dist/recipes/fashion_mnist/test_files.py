"""Fashion-MNIST is read to the bit, synthetic data is labelled as such, and damaged files give one clear line."""

import gzip
import os
import subprocess
import sys
from hashlib import sha256

import pytest
import torch
from torchvision import transforms
from torchvision.datasets import FashionMNIST

from fnet_dist.errors import DataError
from fnet_dist.recipes.fashion_mnist import missing_data
from fnet_dist.recipes.fashion_mnist.dataset import CLASS_NAMES, build_dataset
from fnet_dist.recipes.fashion_mnist.files import FOLDERS, OFFICIAL
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


@pytest.fixture(scope="module")
def archives(tmp_path_factory, real_data):
    """A folder with the four files as they are published, NAME.gz."""
    folder = tmp_path_factory.mktemp("archives")
    for name in OFFICIAL:
        content = (real_data / FOLDERS[0] / name).read_bytes()
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, compresslevel=1))
    return folder


def state(folder):
    """All that is in `folder`, and when it was changed."""
    return {path: path.lstat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


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


def put_a_link_to_a_device(path):
    path.unlink()
    path.symlink_to("/dev/null")
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
        put_a_link_to_a_device,
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


@pytest.mark.parametrize("name", ["FashionMNIST", ""])
def test_a_file_where_the_folder_should_be_is_refused(tmp_path, name):
    file = tmp_path / "data" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    with pytest.raises(DataError, match=f"cannot be read: Not a directory: {file};"):
        build(tmp_path / "data")


PUBLISHED = ("{name}", "{name}.gz")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("place", "files"),
    [
        ("FashionMNIST/raw", ["{name}.gz"]),
        ("", PUBLISHED),
        ("raw", PUBLISHED),  # data.root is .../FashionMNIST
        ("FashionMNIST", PUBLISHED),
        ("data/fashion", ["{name}.gz"]),  # a clone of the authors' repository
        ("", ["{name}/{dotted}", "{dotted}", "{dotted}.gz"]),  # archives of Kaggle
        ("FashionMNIST/raw", ["{upper}", "{upper}.GZ"]),
        ("", ["{name} (1).gz", "{name}(1).gz", "{name}.gz.1", "{name}.1"]),  # a second download, by browsers and wget
    ],
)
def test_files_are_found_as_people_copy_them_and_nothing_is_written(tmp_path, real_data, archives, place, files):
    for number, name in enumerate(OFFICIAL):
        spellings = {"name": name, "dotted": name.replace("-idx", ".idx"), "upper": name.upper()}
        file = tmp_path / place / files[number % len(files)].format(**spellings)
        file.parent.mkdir(parents=True, exist_ok=True)
        is_packed = ".gz" in file.name.lower()
        file.symlink_to(archives / f"{name}.gz" if is_packed else real_data / FOLDERS[0] / name)
    before = state(tmp_path)
    found, expected = build(tmp_path), build(real_data)
    assert found.info.sha256 == expected.info.sha256
    everything = torch.arange(len(expected))
    assert all(map(torch.equal, found.batch(everything, 0), expected.batch(everything, 0)))
    assert missing_data(DataConfig(root=str(tmp_path))) is None
    assert state(tmp_path) == before


def test_training_data_that_is_packed_is_the_same_data(real_data, archives):
    assert build(archives, "train").info.sha256 == build(real_data, "train").info.sha256


def test_a_whole_file_beside_damaged_ones_is_used(root, labels, archives):
    packed = labels.with_name(f"{labels.name}.gz")
    whole = (archives / packed.name).read_bytes()
    packed.write_bytes(whole[:1_000])
    assert len(build(root)) == 10_000
    packed.write_bytes(whole)
    truncate(labels)
    assert len(build(root)) == 10_000
    packed.rename(packed.with_suffix(""))  # unpacked by a browser, or not: the content tells
    assert len(build(root)) == 10_000


@pytest.mark.parametrize("damage", [lambda whole: whole[:1_000], lambda whole: whole[:1_000] + bytes(1_000)])
def test_a_damaged_archive_is_named_with_what_is_expected_and_not_replaced_by_synthetic_data(
    root, labels, archives, damage
):
    labels.unlink()
    packed = labels.with_name(f"{labels.name}.gz")
    packed.write_bytes(damage((archives / packed.name).read_bytes()))
    before = state(root)
    for dataset in ("fashion-mnist", "auto"):
        with pytest.raises(DataError) as caught:
            build(root, dataset=dataset)
        message = str(caught.value)
        assert f"{packed} is not the official file: found a damaged .gz (" in message
        assert f"expected 10,008 bytes with sha256 {LABELS_SHA256}" in message
        assert "\n" not in message
    assert state(root) == before


def test_a_run_writes_nothing_among_other_files_and_says_what_it_saw(tmp_path, no_network):
    (tmp_path / "photos").mkdir()
    (tmp_path / "fashion-mnist_test.csv").write_text("label,pixel1")
    before = state(tmp_path)
    seen = f"{tmp_path} holds 'fashion-mnist_test.csv', 'photos'"
    with pytest.raises(DataError, match="a run downloads only into a new or empty folder") as caught:
        build(tmp_path)
    for part in (seen, "train-images-idx3-ubyte", f"{tmp_path}/FashionMNIST/raw", "fnet data fetch --root DIR"):
        assert part in str(caught.value)
    assert seen in missing_data(DataConfig(root=str(tmp_path)))
    with pytest.raises(DataError, match=seen):
        main(["verify", "--root", str(tmp_path)])
    assert build(tmp_path, dataset="auto").info.is_synthetic
    assert state(tmp_path) == before
    with pytest.raises(DataError, match="Connection refused"):  # what was asked for, in a folder of its own
        main(["fetch", "--root", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"FashionMNIST", "fashion-mnist_test.csv", "photos"}


def test_without_the_right_to_write_packed_files_are_read_and_missing_ones_explained(tmp_path, archives):
    empty = tmp_path / "empty"
    empty.mkdir(mode=0o555)
    archives.chmod(0o555)
    program = (
        "import sys; from pathlib import Path; from fnet_dist.recipes.fashion_mnist import download, files\n"
        "packed, empty = map(Path, sys.argv[1:])\n"
        "assert not any(files.verify(packed).values()); download.fetch_for_run(packed); download.fetch(packed)\n"
        "try: download.fetch_for_run(empty)\n"
        "except download.MissingDataError as error: sys.exit(str(error))"
    )
    # root may write everywhere, unless it is without this capability
    drop = ["setpriv", "--bounding-set=-dac_override", "--"] if os.geteuid() == 0 else []
    ended = subprocess.run([*drop, sys.executable, "-c", program, archives, empty], capture_output=True, text=True)
    assert f"(Permission denied: {empty}/FashionMNIST" in ended.stderr
    assert ended.stderr.startswith("Fashion-MNIST is missing: ")
    assert ended.stderr.count("\n") == 1


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
    monkeypatch.setenv("FNET_DATA", "")
    monkeypatch.setenv("HOME", str(root))
    with pytest.raises(DataError, match=f"{root}/.pytorch/F_MNIST_data is empty or missing"):
        main(["verify"])
    (root / "site.toml").write_text(f"data_root = '{root}'")
    monkeypatch.setenv("FNET_SITE", str(root / "site.toml"))
    with pytest.raises(DataError, match="1 of 4 files"):
        main(["verify"])


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
