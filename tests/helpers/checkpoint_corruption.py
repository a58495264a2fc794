"""Corrupt checkpoints in the ways that a disk or a person does; for tests and the soak."""

import os
import shutil
from pathlib import Path
from random import Random

from fnet_dist.checkpoint.storage import (
    MODEL,
    OPTIMIZER,
    STATE,
    CorruptCheckpointError,
    newest_valid,
    read_checkpoint,
)
from tests.helpers.checkpoint_faults import RUN_ID, holds, make_run, same
from tests.helpers.log_lines import log_lines


def corruptions(folder: Path, seed: int, cases: int) -> tuple[int, int]:
    """Corrupt the newest of three checkpoints in `cases` ways.

    Each corruption that changes a byte must be detected and named, and the checkpoint before must be used.
    """
    random = Random(seed)
    run, contents = make_run(folder / "run", random, (10, 20, 30))
    other, _ = make_run(folder / "other", random, (30,), run_id="0ddba11")
    newest, pristine = run.checkpoint(30), folder / "pristine"
    shutil.copytree(newest, pristine)
    sources = [run.checkpoint(20), other.checkpoint(30)]

    def check() -> None:
        if _bytes_in(newest) == _bytes_in(pristine):  # a zero was zeroed
            assert same(read_checkpoint(newest, RUN_ID), contents[2]), "a good one is not read"
            return
        damaged = ""
        try:
            read_checkpoint(newest, RUN_ID)
        except CorruptCheckpointError as error:
            damaged = str(error)
        assert str(newest) in damaged, damaged or "a silent load"
        with log_lines() as lines:
            assert same(newest_valid(run, RUN_ID), contents[1]), "the one before"
        assert [str(newest) in line and "\n" not in line for line in lines] == [True], lines

    held = 0
    for number in range(cases):
        kind = random.choice(CORRUPTIONS)
        kind(newest, random, sources)
        held += holds(check, f"case {number} of seed {seed}: {kind.__name__}")
        shutil.rmtree(newest)
        shutil.copytree(pristine, newest)
    return held, cases


def _bytes_in(checkpoint: Path) -> dict[str, bytes | None]:
    return {path.name: path.read_bytes() if path.is_file() else None for path in checkpoint.iterdir()}


def _a_file(checkpoint: Path, random: Random) -> Path:
    return checkpoint / random.choice([MODEL, OPTIMIZER, STATE])


def truncated(checkpoint: Path, random: Random, sources: list[Path]) -> None:
    file = _a_file(checkpoint, random)
    os.truncate(file, random.randrange(file.stat().st_size))


def longer(checkpoint: Path, random: Random, sources: list[Path]) -> None:
    with _a_file(checkpoint, random).open("ab") as file:
        file.write(random.choice([b"\n", b"\0", b" ", random.randbytes(50)]))


def bits_flipped(checkpoint: Path, random: Random, sources: list[Path]) -> None:
    file = _a_file(checkpoint, random)
    data = bytearray(file.read_bytes())
    for bit in random.sample(range(8 * len(data)), random.choice([1, 1, 1, 2, 50])):
        data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def block_zeroed(checkpoint: Path, random: Random, sources: list[Path]) -> None:
    file = _a_file(checkpoint, random)
    data = bytearray(file.read_bytes())
    start, size = random.randrange(len(data)), random.choice([1, 64, 512, 4096])
    data[start : start + size] = bytes(len(data[start : start + size]))
    file.write_bytes(data)


def file_of_another(checkpoint: Path, random: Random, sources: list[Path]) -> None:
    file = _a_file(checkpoint, random)
    shutil.copy(random.choice(sources) / file.name, file)


def files_swapped(checkpoint: Path, random: Random, sources: list[Path]) -> None:
    one, other = (checkpoint / name for name in random.sample([MODEL, OPTIMIZER, STATE], 2))
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def another_under_this_name(checkpoint: Path, random: Random, sources: list[Path]) -> None:
    """Replace it by a valid checkpoint of another step, or of the same step of another run."""
    shutil.rmtree(checkpoint)
    shutil.copytree(random.choice(sources), checkpoint)


def file_missing(checkpoint: Path, random: Random, sources: list[Path]) -> None:
    file = _a_file(checkpoint, random)
    file.unlink()
    if random.random() < 0.3:
        file.mkdir()


def overwritten(checkpoint: Path, random: Random, sources: list[Path]) -> None:
    _a_file(checkpoint, random).write_bytes(random.choice([b"", b"{}", b"\xff" * 500, random.randbytes(900)]))


CORRUPTIONS = (
    truncated,
    longer,
    bits_flipped,
    block_zeroed,
    file_of_another,
    files_swapped,
    another_under_this_name,
    file_missing,
    overwritten,
)
