"""One output file: any order, any thread, the same hash, and a name only when it is whole."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omni_convert.converter.output import PARTIAL_SUFFIX, OutputFile
from omni_convert.converter.source import read_into
from omni_convert.formats.errors import OmniConvertError


def cut(sizes: list[int]) -> list[tuple[int, int]]:
    return [(sum(sizes[:place]), size) for place, size in enumerate(sizes)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.just([0]) | st.lists(st.integers(1, 9), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_any_order_gives_the_same_file(tmp_path: Path, sizes: list[int], rng: random.Random) -> None:
    data, spans = rng.randbytes(sum(sizes)), cut(sizes)
    file = OutputFile(tmp_path / "x", spans)
    order = list(range(len(spans)))
    rng.shuffle(order)
    (tmp_path / "x").unlink(missing_ok=True)
    for place in order:
        assert not (tmp_path / "x").exists()
        assert file.sha256 is None
        offset, size = spans[place]
        file.write(offset, data[offset : offset + size])
    assert (tmp_path / "x").read_bytes() == data
    assert file.sha256 == hashlib.sha256(data).hexdigest()
    assert file.size == len(data)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_many_threads(tmp_path: Path) -> None:
    for attempt in range(20):
        data, spans = os.urandom(400), cut([1] * 400)
        file = OutputFile(tmp_path / str(attempt), spans)
        with ThreadPoolExecutor(8) as pool:
            tasks = [pool.submit(file.write, place, data[place : place + 1]) for place in reversed(range(400))]
        assert all(task.exception() is None for task in tasks)
        assert file.path.read_bytes() == data
        assert file.sha256 == hashlib.sha256(data).hexdigest()


def test_piece_that_arrives_while_the_hash_is_being_let_go(tmp_path: Path) -> None:
    class LateFile(OutputFile):
        late = False

        def _ready(self) -> bool:
            ready = super()._ready()
            if not ready and self._hashing.locked() and not self.late:
                self.late = True
                self.write(1, b"b")  # as another thread would, that finds the lock taken
            return ready

    file = LateFile(tmp_path / "x", cut([1, 1]))
    file.write(0, b"a")
    assert (tmp_path / "x").read_bytes() == b"ab"
    assert file.sha256 == hashlib.sha256(b"ab").hexdigest()


def test_hard_link(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"0123456789")
    file = OutputFile(tmp_path / "x", cut([4, 6]), link_to=tmp_path / "source")
    file.write(4, b"456789")
    assert not (tmp_path / "x").exists()
    file.write(0, b"0123")
    assert (tmp_path / "x").samefile(tmp_path / "source")
    assert file.sha256 == hashlib.sha256(b"0123456789").hexdigest()


def test_hard_link_across_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    (tmp_path / "source").write_bytes(b"0123")
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OmniConvertError, match="on one file system: leave out --link"):
        OutputFile(tmp_path / "x", cut([4]), link_to=tmp_path / "source").write(0, b"0123")


def test_piece_of_the_wrong_size_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="4 bytes belong at 0, got 3"):
        OutputFile(tmp_path / "x", cut([4])).write(0, b"abc")


def test_stopped_file_stays_unfinished(tmp_path: Path) -> None:
    file = OutputFile(tmp_path / "x", cut([2, 2]))
    file.write(0, b"ab")
    file.close()
    assert [path.name for path in tmp_path.iterdir()] == [f"x{PARTIAL_SUFFIX}"]


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OmniConvertError, match=r"x: cannot be written \(No such file"):
        OutputFile(tmp_path / "absent" / "x", cut([1])).write(0, b"a")


def test_reading_says_where_a_file_ends(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    fd = os.open(tmp_path / "x", os.O_RDONLY)
    try:
        buffer = memoryview(bytearray(4))
        read_into(fd, buffer, 6, tmp_path / "x")
        assert buffer == b"6789"
        with pytest.raises(OmniConvertError, match="ends at byte 10, expected at least 11"):
            read_into(fd, buffer, 7, tmp_path / "x")
    finally:
        os.close(fd)
