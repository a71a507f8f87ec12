"""What can happen to a run from outside: a clear error, nothing half-written that looks whole, and a way to go on."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile.small import QWEN_CONFIG, qwen_shards, snapshot, write_sharded

from omni_convert.converter.convert import Means, convert, plan
from omni_convert.converter.execute import Settings, fit, memory_bytes
from omni_convert.converter.files import parse_size
from omni_convert.converter.jobs import Worker
from omni_convert.converter.source import SourceFile
from omni_convert.formats.errors import OmniConvertError, SourceError, UsageError

DiskUsage = namedtuple("DiskUsage", "total used free")
SHARDS = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
MARKER = ".omni_convert.partial"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_sharded(tmp_path / "model", qwen_shards(width=128), QWEN_CONFIG)


def to_int8(source: Path, out: Path, **options: Any) -> None:
    convert(source, out, method="int8", threads=1, **options)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB: room for one and a half shards."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_disk_that_fills_up(source: Path, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, before = small_disk / "out", snapshot(source)
    with pytest.raises(OmniConvertError, match="the disk has"):
        to_int8(source, out)
    assert not out.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**9, 0, 10**9))  # it fills up meanwhile
    with pytest.raises(OmniConvertError, match=r"No space left.*Free some space.*1 of 2 files are finished and kept"):
        to_int8(source, out)
    assert sorted(os.listdir(out)) == [MARKER, SHARDS[0]]  # noqa: PTH208
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    to_int8(source, out, resume=True)
    to_int8(source, tmp_path / "fresh")
    assert snapshot(out) == snapshot(tmp_path / "fresh")
    assert snapshot(source) == before


def during(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object], reads: int = 3) -> None:
    """Let ``change`` happen after some pieces were read."""
    read, count = Worker.read, [0]

    def then_change(self: Worker, source: SourceFile, start: int, size: int) -> memoryview:
        count[0] += 1
        if count[0] == reads:
            change()
        return read(self, source, start, size)

    monkeypatch.setattr("omni_convert.converter.convert.PIECE_BYTES", 1 << 15)
    monkeypatch.setattr(Worker, "read", then_change)


@pytest.mark.parametrize("reads", [3, 20])
def test_source_that_is_truncated(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: int) -> None:
    during(monkeypatch, lambda: [os.truncate(source / name, 4000) for name in SHARDS], reads)
    with pytest.raises(SourceError, match=r"(ends at byte|has) 4000.*, expected .* during the run"):
        to_int8(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [0, 1])
def test_source_that_is_written_to(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def write() -> None:
        with (source / SHARDS[number]).open("r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(b"\0\0")

    during(monkeypatch, write)
    with pytest.raises(SourceError, match=rf"{SHARDS[number]}: was written to .*it changed during the run"):
        to_int8(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_source_that_is_replaced_by_a_file_of_the_same_size(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace() -> None:
        shutil.copyfile(source / SHARDS[1], source / "new")
        (source / "new").rename(source / SHARDS[1])

    during(monkeypatch, replace)
    with pytest.raises(SourceError, match="was written to"):
        to_int8(source, tmp_path / "out")


def test_source_that_disappears(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    during(monkeypatch, (source / SHARDS[1]).unlink)
    expected = rf"{SHARDS[1]}: cannot be opened \(No such file.*1 of 2 files are finished"
    with pytest.raises(OmniConvertError, match=expected):
        to_int8(source, tmp_path / "out")


def test_copied_file_that_changes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "notes").write_bytes(bytes(100_000))
    during(monkeypatch, lambda: (source / "notes").write_bytes(bytes(100_001)), reads=20)
    with pytest.raises(SourceError, match=r"notes: (has 100001|ends at byte 100001).*, expected 100000"):
        to_int8(source, tmp_path / "out")


def error_as_nobody(run: Callable[[], object]) -> str:
    """The error of ``run`` in a process whom rights mean something."""
    reader, writer = os.pipe()
    if not (pid := os.fork()):
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            run()
        except OmniConvertError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with open(reader, "rb") as file:  # noqa: PTH123
        return file.read().decode()


@pytest.fixture
def shared(source: Path) -> Iterator[Path]:
    """A folder that everybody may enter, with the source."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    shutil.copytree(source, folder / "model")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("place", ["absent", "empty", "resumed"])
def test_output_folder_that_may_not_be_written(shared: Path, place: str) -> None:
    model, out = shared / "model", shared / "out"
    if place != "absent":
        out.mkdir()
    if place == "resumed":
        (out / MARKER).touch()
    shared.chmod(0o555)
    message = error_as_nobody(lambda: to_int8(model, out))
    assert str(out) in message
    assert "cannot be written (Permission denied). Check the folder, its rights" in message
    assert not out.exists() or not (out / SHARDS[0]).exists()


def test_output_folder_that_may_not_be_read(shared: Path) -> None:
    (shared / "out").mkdir(mode=0o000)
    message = error_as_nobody(lambda: to_int8(shared / "model", shared / "out"))
    assert f"{shared / 'out'}/" in message
    assert "cannot be written (Permission denied). Check the folder, its rights" in message


def test_source_that_may_not_be_read(shared: Path) -> None:
    (shared / "model" / SHARDS[1]).chmod(0o000)
    message = error_as_nobody(lambda: to_int8(shared / "model", shared / "out"))
    assert f"{shared / 'model' / SHARDS[1]}: cannot be read (Permission denied)" in message


def test_read_only_file_system(source: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro,size=4m", str(small_disk)], check=True)
    with pytest.raises(OmniConvertError, match=r"out: cannot be written \(Read-only file system\)"):
        to_int8(source, small_disk / "out")


def test_durable_output_is_on_the_disk_before_it_has_a_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file's bytes before its name, and every name of a weight before the first seal's."""
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def note_sync(fd: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{fd}")))  # noqa: PTH115
        fsync(fd)

    def note_replace(self: Path, target: Path) -> Path:
        events.append(("name", str(target)))
        assert ("sync", str(self)) in events
        return replace(self, target)

    out = tmp_path / "new" / "out"
    (source / "notes").write_text("hello")
    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    to_int8(source, out, durable=True)
    named = [Path(path).name for kind, path in events if kind == "name"]
    assert named == [*SHARDS, "notes", "omni_convert.json", f"{SHARDS[0][:23]}.safetensors.index.json", "config.json"]
    place = {path: index for index, (kind, path) in enumerate(events) if kind == "name"}
    seals = min(place[str(out / name)] for name in ("omni_convert.json", "config.json"))
    between = events[place[str(out / "notes")] : seals]
    assert {("sync", str(folder)) for folder in (out, out.parent, tmp_path)} <= set(between)
    assert ("sync", str(out)) in events[place[str(out / "config.json")] :]


def test_memory_is_a_limit(source: Path) -> None:
    planned = plan(source, method="int8")
    usual = Settings(threads=4, piece_bytes=4 << 20)
    assert fit(planned, usual, 10**9) == usual
    for limit, threads in ((16 << 20, 4), (4 << 20, 4), (1 << 20, 1)):
        fitted = fit(planned, usual, limit)
        assert memory_bytes(planned, fitted) <= limit
        assert fitted.threads == threads
    with pytest.raises(UsageError, match=r"--memory 1000: found a need of at least .*transformer_blocks\.0\.attn"):
        fit(planned, usual, 1000)


def test_memory_does_not_change_the_bytes(source: Path, tmp_path: Path) -> None:
    to_int8(source, tmp_path / "usual")
    to_int8(source, tmp_path / "tight", memory=1 << 20)
    assert snapshot(tmp_path / "tight") == snapshot(tmp_path / "usual")
    with pytest.raises(UsageError, match="--memory"):
        to_int8(source, tmp_path / "out", memory=1)
    assert Means(memory=1 << 20, threads=2).settings(plan(source, method="int8")).piece_bytes < 1 << 19


@pytest.mark.parametrize(
    ("text", "size"),
    [("400M", 400e6), ("1.5GB", 1.5e9), ("512MiB", 512 << 20), ("2g", 2e9), ("7", 7), ("7 b", 7), ("1ki", 1024)],
)
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1M", "1X", "1e9", "0x10", "1ib", "1 000"])
def test_texts_that_are_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        parse_size(text)
