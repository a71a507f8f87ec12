"""A run that stops goes on where it was, or says why not; the bytes are those of a run that did not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hostile.small import qwen_shards, random, snapshot, write_model, write_pipeline, write_weights
from signals import default_signals

from omni_convert.converter import execute as engine
from omni_convert.converter.convert import convert, plan
from omni_convert.converter.folder import OutputFolder
from omni_convert.converter.jobs import Job, Worker
from omni_convert.converter.output import PARTIAL_SUFFIX
from omni_convert.formats.errors import OmniConvertError, UsageError

MARKER = ".omni_convert.partial"
SHARDS = [f"transformer/diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
DiskUsage = namedtuple("DiskUsage", "total used free")


def to_int8(source: Path, out: Path, **options: Any) -> None:
    convert(source, out, method="int8", **options)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_pipeline(tmp_path / "model")


def stopped(out: Path, *, after: int | None = None) -> Callable[..., None]:
    """A stand-in for ``run_jobs`` that ends in the middle: when one shard is whole, or after some jobs."""

    def run_jobs(files: Iterator[Iterator[Job]], *_: object) -> None:
        worker = Worker()
        for place, job in enumerate(chain.from_iterable(files)):
            whole = (out / SHARDS[0]).exists()
            job.run(worker)
            if place == after or (after is None and whole):
                raise KeyboardInterrupt

    return run_jobs


def leave(source: Path, out: Path, *, after: int | None = None, killed: bool = True, **options: Any) -> Path:
    """What a run leaves that is stopped, or killed."""
    with pytest.MonkeyPatch.context() as patch:
        if killed:
            patch.setattr(OutputFolder, "stop", lambda self, keep: self._unlock())
        patch.setattr(engine, "run_jobs", stopped(out, after=after))
        with pytest.raises(KeyboardInterrupt):
            to_int8(source, out, **options)
    return out


@pytest.fixture
def interrupted(source: Path, tmp_path: Path) -> Path:
    """The first of two shards is whole, the second was begun."""
    return leave(source, tmp_path / "out")


def refused(source: Path, out: Path, *expected: object, **options: Any) -> str:
    before = snapshot(out)
    with pytest.raises(OmniConvertError) as caught:
        to_int8(source, out, **options)
    for part in expected:
        assert str(part) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert snapshot(out) == before
    return str(caught.value)


def changed(out: Path, before: dict[str, float]) -> set[str]:
    """The files that were written since."""
    return {name for name, time in modified(out).items() if before.get(name) != time}


def modified(out: Path) -> dict[str, int]:
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_interrupted_output_looks_unfinished(source: Path, interrupted: Path) -> None:
    left = {path.relative_to(interrupted).as_posix() for path in interrupted.rglob("*") if path.is_file()}
    assert left == {MARKER, SHARDS[0], SHARDS[1] + PARTIAL_SUFFIX}
    with pytest.raises(OmniConvertError, match="unfinished"):
        plan(interrupted, method="int8")


@pytest.mark.parametrize("after", [0, 1, 2, None])
@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("piece", [100, 1 << 20])
def test_same_bytes_as_in_one_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int | None, killed: bool, piece: int
) -> None:
    monkeypatch.setattr("omni_convert.converter.convert.PIECE_BYTES", piece)
    out = leave(source, tmp_path / "out", after=after, killed=killed)
    to_int8(source, out)
    to_int8(source, tmp_path / "fresh")
    assert snapshot(out) == snapshot(tmp_path / "fresh")


def test_what_is_whole_is_kept(source: Path, interrupted: Path) -> None:
    before = modified(interrupted)
    to_int8(source, interrupted, resume=True)
    assert SHARDS[0] not in changed(interrupted, before)
    assert SHARDS[1] in changed(interrupted, before)


@pytest.mark.parametrize("damage", ["zeros", "shorter", "gone", "unlisted"])
def test_what_a_loss_of_power_took_is_written_again(
    source: Path, interrupted: Path, tmp_path: Path, damage: str
) -> None:
    shard, marker = interrupted / SHARDS[0], interrupted / MARKER
    if damage == "zeros":
        shard.write_bytes(bytes(shard.stat().st_size))
    elif damage == "shorter":
        os.truncate(shard, 100)
    elif damage == "gone":
        shard.unlink()
    else:
        lines = marker.read_bytes().splitlines(keepends=True)
        marker.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
    to_int8(source, interrupted)
    to_int8(source, tmp_path / "fresh")
    assert snapshot(interrupted) == snapshot(tmp_path / "fresh")


def test_figures_are_those_of_one_run(source: Path, interrupted: Path, tmp_path: Path) -> None:
    went_on, fresh = (convert(source, out, method="int8").to_dict() for out in (interrupted, tmp_path / "fresh"))
    for key in ("out", "seconds", "gigabytes_per_second"):
        del went_on[key], fresh[key]
    assert went_on == fresh
    assert went_on["layers"] == 24


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ignore": ["to_qkv"]}, "the recipe differs: ignored_layers was [], now is ['to_qkv']"),
        ({"components": ["text_encoder"], "target": "omni-convert"}, "the recipe differs: "),
    ],
)
def test_output_of_another_recipe(source: Path, interrupted: Path, options: dict[str, Any], reason: str) -> None:
    refused(source, interrupted, interrupted, "another job", reason, "--overwrite", **options)
    to_int8(source, interrupted, overwrite=True, **options)
    assert (interrupted / "model_index.json").is_file()


def test_output_of_another_version(source: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni_convert.__version__", "9.9")
    refused(source, interrupted, "begun by omni-convert ", "this is 9.9")


def test_source_that_was_touched(source: Path, interrupted: Path) -> None:
    os.utime(source / SHARDS[1])
    refused(source, interrupted, f"the source differs: {SHARDS[1]}: mtime_ns was")


def test_source_with_other_weights(source: Path, interrupted: Path) -> None:
    other = dict(qwen_shards(width=16, seed=5)[1])
    write_weights(source / SHARDS[1], other)
    refused(source, interrupted, f"the source differs: {SHARDS[1]}")


def test_source_that_moved_is_the_same(source: Path, interrupted: Path, tmp_path: Path) -> None:
    source.rename(tmp_path / "elsewhere")
    to_int8(tmp_path / "elsewhere", interrupted, resume=True)
    assert (interrupted / "model_index.json").is_file()


def test_overwrite_begins_anew(source: Path, interrupted: Path) -> None:
    before = modified(interrupted)
    to_int8(source, interrupted, overwrite=True)
    assert SHARDS[0] in changed(interrupted, before)


def test_resume_with_nothing_to_go_on_with(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to go on with"):
        to_int8(source, tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="Give one of them"):
        to_int8(source, tmp_path / "out", resume=True, overwrite=True)


def test_space_is_not_needed_twice(source: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(source, method="int8")
    needed = planned.disk_bytes(linked=False)
    used = sum((interrupted / name).stat().st_size for name in (SHARDS[0], SHARDS[1] + PARTIAL_SUFFIX))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(needed, used, needed - used - 1))
    refused(source, interrupted, "Free 1 bytes")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(needed, used, needed - used))
    to_int8(source, interrupted)


@pytest.mark.parametrize("content", [b"", b'{"job": {"omni'])
def test_killed_while_the_marker_was_written(source: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).write_bytes(content)
    to_int8(source, tmp_path / "out")


@pytest.mark.parametrize(
    "line",
    [b"not json\n", b"[]\n", b'{"file": 1}\n', b'{"file": "x", "sha256": 1, "size": [], "errors": 5}\n', b"\xff\n"],
)
def test_damaged_marker(source: Path, interrupted: Path, line: bytes) -> None:
    with (interrupted / MARKER).open("ab") as file:
        file.write(line)
    message = refused(source, interrupted, interrupted / MARKER, "is damaged", "--overwrite")
    assert message.isprintable()
    to_int8(source, interrupted, overwrite=True)


def test_marker_cannot_name_files_outside(source: Path, interrupted: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    entry = {"file": "../precious", "sha256": "0", "size": 8, "errors": {}, "largest": {}}
    with (interrupted / MARKER).open("a") as file:
        file.write(json.dumps(entry) + "\n")
    to_int8(source, interrupted)
    assert (tmp_path / "precious").read_text() == "precious"


def test_error_while_sealing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, write = tmp_path / "out", OutputFolder.write

    def fail_at_the_config(self: OutputFolder, name: str, data: bytes) -> None:
        if name.endswith("config.json"):
            raise OSError(28, "No space left on device", str(self.path / name))
        write(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "write", fail_at_the_config)
        with pytest.raises(OmniConvertError, match=r"No space left.*7 of 7 files are finished and kept"):
            to_int8(source, out)
    assert not any(out.rglob("transformer/config.json")) and not any(out.rglob("transformer/*.index.json"))
    assert not (out / "omni_convert.json").exists()
    to_int8(source, out, resume=True)
    to_int8(source, tmp_path / "fresh")
    assert snapshot(out) == snapshot(tmp_path / "fresh")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_a_run_tidily(number: signal.Signals, tmp_path: Path) -> None:
    """A process that is told to stop keeps what is whole, says so, and goes on when started again."""
    model, out = tmp_path / "model", tmp_path / "out"
    write_model(model, {}, {f"blocks.{n}.fc.weight": random(2048, 2048) for n in range(24)})
    (model / "first.bin").write_bytes(b"x")
    command = [sys.executable, "-m", "omni_convert", "--method", "int8", "--threads", "1", model, out]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, preexec_fn=default_signals)
    while not list(out.glob("*.safetensors*")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(number)
    assert process.stderr is not None
    assert "Interrupted. Nothing of this run is kept." in process.stderr.read()
    assert process.wait() == 1
    assert not out.exists()


def test_interrupt_says_what_is_kept(source: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "run_jobs", stopped(tmp_path / "out"))
        with pytest.raises(KeyboardInterrupt, match="1 of 7 files are finished and kept: the same command goes on"):
            to_int8(source, tmp_path / "out")
    left = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert left == {MARKER, SHARDS[0]}


def test_second_run_says_who_holds_the_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, results = tmp_path / "out", []
    command = [sys.executable, "-m", "omni_convert", "--method", "int8", str(source), str(out)]
    write = OutputFolder.write

    def run_another_first(self: OutputFolder, name: str, data: bytes) -> None:
        if not results:
            results.append(subprocess.run(command, capture_output=True, text=True))
        write(self, name, data)

    monkeypatch.setattr(OutputFolder, "write", run_another_first)
    to_int8(source, out)
    to_int8(source, tmp_path / "fresh")
    assert results[0].returncode == 1
    assert f"process {os.getpid()} on {os.uname().nodename} is writing there now" in results[0].stderr
    assert snapshot(out) == snapshot(tmp_path / "fresh")


def test_folder_that_was_finished_between_looking_and_locking(
    source: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = OutputFolder.check

    def then_another_finishes(self: OutputFolder, *args: Any, **kwargs: Any) -> None:
        check(self, *args, **kwargs)
        monkeypatch.undo()
        to_int8(source, interrupted)

    monkeypatch.setattr(OutputFolder, "check", then_another_finishes)
    with pytest.raises(OmniConvertError, match="was written by another run just now"):
        to_int8(source, interrupted)
    assert (interrupted / "model_index.json").is_file()
    assert not (interrupted / MARKER).exists()
