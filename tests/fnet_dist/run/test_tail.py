"""FileTail: what it returns of a file that grows, is not there yet, or ends in an unfinished line."""

import os
import tracemalloc
from pathlib import Path

import pytest

from fnet_dist.run.tail import FileTail


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_each_call_returns_only_what_was_appended_since_the_last(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = FileTail(path)
    assert [*tail.read_lines()] == []
    append(path, b"a\nb")
    assert ([*tail.read_lines()], tail.offset) == ([b"a\n"], 2)
    assert ([*tail.read_lines()], tail.offset) == ([], 2)
    append(path, b"c\n\xff\n")
    assert ([*tail.read_lines()], tail.offset) == ([b"bc\n", b"\xff\n"], 7)


def test_an_unfinished_last_line_is_returned_only_if_asked_for(tmp_path: Path) -> None:
    append(tmp_path / "log", b"a\nb")
    tail = FileTail(tmp_path / "log")
    assert ([*tail.read_lines(partial=True)], tail.offset) == ([b"a\n", b"b"], 3)
    append(tmp_path / "log", b"c\n")
    assert [*tail.read_lines()] == [b"c\n"]


def test_it_can_begin_in_the_middle_of_the_file(tmp_path: Path) -> None:
    append(tmp_path / "log", b"a\nb\n")
    assert [*FileTail(tmp_path / "log", 2).read_lines()] == [b"b\n"]


def test_reading_stops_where_the_caller_stops(tmp_path: Path) -> None:
    append(tmp_path / "log", b"a\nb\n")
    tail = FileTail(tmp_path / "log")
    assert next(tail.read_lines()) == b"a\n"
    assert [*tail.read_lines()] == [b"b\n"]


def test_a_long_line_comes_in_parts_and_is_not_held_in_memory(tmp_path: Path) -> None:
    path, part = tmp_path / "log", 1 << 18
    path.touch()
    os.truncate(path, 16 * part)
    tail = FileTail(path)
    tracemalloc.start()
    try:
        assert sum(map(len, tail.read_lines(max_bytes=part))) == 16 * part
        assert tracemalloc.get_traced_memory()[1] < 4 * part
    finally:
        tracemalloc.stop()


def test_a_directory_in_the_place_of_the_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        [*FileTail(tmp_path).read_lines()]
