"""Narrow gaps: moments and names at which an earlier version lost or misread something."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hostile.small import (
    QWEN_CONFIG,
    entry,
    file_bytes,
    qwen_shards,
    random,
    snapshot,
    write_model,
    write_pipeline,
    write_sharded,
)
from signals import default_signals

from omni_convert.converter.convert import convert, plan
from omni_convert.converter.folder import OutputFolder
from omni_convert.converter.output import OutputFile, partial_files, partial_path
from omni_convert.formats.errors import OmniConvertError, SourceError

MARKER = ".omni_convert.partial"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_pipeline(tmp_path / "model")


def to_int8(source: Path, out: Path, **options: Any) -> None:
    convert(source, out, method="int8", **options)


def killed(source: Path, out: Path, method: str, **options: Any) -> None:
    """Leave what a process leaves that dies when ``OutputFolder.method`` is called."""

    def die(self: OutputFolder, *_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputFolder, method, die)
        patch.setattr(OutputFolder, "stop", lambda self, keep: self._unlock())
        with pytest.raises(KeyboardInterrupt):
            to_int8(source, out, **options)


def test_partial_link_to_a_name_that_looks_like_an_attempt(tmp_path: Path) -> None:
    path = tmp_path / "notes.20240101"
    partial_path(path).touch()
    partial_path(path, "0123abcd").touch()
    assert set(partial_files([path])) == {partial_path(path), partial_path(path, "0123abcd")}


def test_partial_link_is_never_written_through(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"precious")
    os.link(tmp_path / "source", partial_path(tmp_path / "x"))
    OutputFile(tmp_path / "x", [(0, 4)]).write(0, b"mine")
    assert (tmp_path / "source").read_bytes() == b"precious"
    assert (tmp_path / "x").read_bytes() == b"mine"


def test_file_is_named_once(tmp_path: Path) -> None:
    """A thread that saw work for the hash, and finds all of it done when it has the lock."""
    names: list[str] = []
    file = OutputFile(tmp_path / "x", [(0, 1), (1, 1)], whole=lambda file: names.append(file.path.name))
    file.write(0, b"a")
    file.write(1, b"b")
    ready, seen = file._ready, [True]
    file._ready = lambda: seen.pop() if seen else ready()  # type: ignore[method-assign]
    file._advance(1, b"b")
    assert not seen
    assert names == ["x"]
    file.close()


def test_folder_of_the_source_that_cannot_be_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("assets"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(OmniConvertError, match=r"assets: cannot be read \(Permission denied\)"):
        plan(source, method="int8")


def test_empty_tensor_comes_before_the_one_at_its_place(tmp_path: Path) -> None:
    tensors = {"a.weight": random(8, 8), "b.weight": random(8, 8)}
    source = write_model(tmp_path / "model", {}, tensors)
    path = source / "diffusion_pytorch_model.safetensors"
    header = {"a.weight": entry("BF16", [8, 8], 0, 128), "e": entry("BF16", [0], 0, 0)}
    header["b.weight"] = entry("BF16", [8, 8], 128, 256)
    path.write_bytes(file_bytes(header, bytes(256)))
    (shard,) = plan(source, method="int8").components[0].shards
    assert [tensor.name for tensor in shard.tensors] == ["e", "a.weight", "b.weight"]


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGHUP), (signal.SIGINT, signal.SIGINT)])
def test_signals_that_come_together(tmp_path: Path, numbers: tuple[signal.Signals, ...]) -> None:
    """The second must not disturb what the first began: no work goes on, and what is left is what the error says."""
    model, out = tmp_path / "model", tmp_path / "out"
    write_model(model, {}, {f"blocks.{n}.fc.weight": random(2048, 2048) for n in range(24)})
    command = [sys.executable, "-m", "omni_convert", "--method", "int8", "--threads", "2", model, out]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, preexec_fn=default_signals)
    while not list(out.glob("*.safetensors*")) and process.poll() is None:
        time.sleep(0.001)
    for number in numbers:
        process.send_signal(number)
    assert process.stderr is not None
    error = process.stderr.read()
    kept = "1 of 1 files are finished and kept" in error  # they came in the moment before the seals
    assert kept or "Interrupted. Nothing of this run is kept." in error
    assert "Traceback" not in error
    assert process.wait() == 1
    assert out.exists() == kept
    assert not (out / "config.json").exists()


def test_hangup_that_is_ignored_ends_nothing(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    write_model(model, {}, {f"blocks.{n}.fc.weight": random(1024, 1024) for n in range(24)})
    command = ["nohup", sys.executable, "-m", "omni_convert", "--method", "int8", str(model), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(out.glob("*.safetensors*")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 0
    assert (out / "config.json").is_file()


def test_interrupt_after_the_seal_leaves_a_whole_output(source: Path, tmp_path: Path) -> None:
    unlock, calls = OutputFolder._unlock, []

    def interrupted(self: OutputFolder) -> None:
        calls.append(self)
        if len(calls) == 1:
            raise KeyboardInterrupt
        unlock(self)

    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputFolder, "_unlock", interrupted)
        with pytest.raises(KeyboardInterrupt, match="out is complete"):
            to_int8(source, out)
    to_int8(source, tmp_path / "fresh")
    assert snapshot(out) == snapshot(tmp_path / "fresh")


def test_durable_run_sends_kept_files_to_the_disk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, synced = tmp_path / "out", set()
    killed(source, out, "sync")
    fsync = os.fsync

    def note(fd: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{fd}"))  # noqa: PTH115
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note)
    to_int8(source, out, durable=True)
    assert {str(path) for path in out.rglob("*") if path.is_file()} <= {name.removesuffix(MARKER) for name in synced}


def test_no_component_looks_complete_before_the_seals(source: Path, tmp_path: Path) -> None:
    killed(source, tmp_path / "out", "sync")
    left = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert any(name.endswith(".safetensors") for name in left)
    assert "config.json" not in left
    assert not any(name.endswith(".index.json") for name in left)


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json", "README.md"])
def test_small_file_of_the_source_that_changes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    take = OutputFolder.take

    def then_change(self: OutputFolder, *arguments: Any) -> None:
        take(self, *arguments)
        (source / name).write_text("{}")

    monkeypatch.setattr(OutputFolder, "take", then_change)
    with pytest.raises(SourceError, match=r"during the run"):
        to_int8(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_that_is_finished_just_before_the_marker_is_opened(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    killed(source, out, "sync")
    open_ = os.open

    def then_another_finishes(path: Any, *rest: Any, **more: Any) -> int:
        if str(path).endswith(f"/{MARKER}"):
            monkeypatch.setattr(os, "open", open_)
            to_int8(source, out)
        return open_(path, *rest, **more)

    monkeypatch.setattr(os, "open", then_another_finishes)
    with pytest.raises(OmniConvertError, match="was written by another run just now"):
        to_int8(source, out)
    to_int8(source, tmp_path / "fresh")
    assert snapshot(out) == snapshot(tmp_path / "fresh")


def test_overwriting_another_unfinished_output(tmp_path: Path) -> None:
    """Weights that only its journal names are not left beside ours."""
    other = write_sharded(tmp_path / "other", qwen_shards(), QWEN_CONFIG, stem="model")
    killed(other, tmp_path / "out", "sync")
    source = write_sharded(tmp_path / "model", qwen_shards(), QWEN_CONFIG)
    to_int8(source, tmp_path / "out", overwrite=True)
    to_int8(source, tmp_path / "fresh")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "fresh")
