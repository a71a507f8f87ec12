"""The output folder: where it may lie, what it may hold, and what is left of a run that stops."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile.small import (
    QWEN_CONFIG,
    entry,
    file_bytes,
    qwen_shards,
    random,
    read_json,
    snapshot,
    write_json,
    write_model,
    write_pipeline,
    write_sharded,
    write_weights,
)

from omni_convert.converter.convert import convert, plan
from omni_convert.converter.folder import OutputFolder
from omni_convert.converter.output import PARTIAL_SUFFIX
from omni_convert.formats.errors import OmniConvertError

MARKER = ".omni_convert.partial"
DiskUsage = namedtuple("DiskUsage", "total used free")


def to_int8(source: Path, out: Path, **options: Any) -> None:
    convert(source, out, method="int8", **options)


def refused(source: Path, out: Path, *expected: object, **options: Any) -> None:
    """One paragraph that holds ``expected``; source and output stay as they are."""
    before = snapshot(source.parent)
    with pytest.raises(OmniConvertError) as caught:
        to_int8(source, out, **options)
    for part in expected:
        assert str(part) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert snapshot(source.parent) == before


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_pipeline(tmp_path / "model")


@pytest.fixture
def interrupted(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a run leaves that was killed while it wrote the first shard of ``source``."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("omni_convert.converter.folder.OutputFolder.give_back", OutputFolder._unlock)
        patch.setattr("omni_convert.converter.execute.run_jobs", _run_two_jobs)
        with pytest.raises(KeyboardInterrupt):
            to_int8(source, out)
    return out


def _run_two_jobs(jobs: list[Any], threads: int, progress: object) -> None:
    buffer = memoryview(bytearray(max(job.size for job in jobs)))
    for job in jobs[:2]:
        job.run(buffer)
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["model", "model/out", "model/transformer", "model/a/b", ".", "link", "link/out"])
def test_output_in_or_around_the_source(source: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "link").symlink_to("model")
    refused(source, tmp_path / place, tmp_path / place, "source", "choose")


def test_output_beside_a_source_of_a_similar_name(source: Path, tmp_path: Path) -> None:
    to_int8(source, tmp_path / "model-int8")
    assert (tmp_path / "model-int8" / "model_index.json").is_file()


def test_single_file_may_lie_beside_its_output(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "models" / "x.safetensors", {"a.weight": random(4, 4)})
    refused(path, tmp_path / "models", "source")
    to_int8(path, tmp_path / "models" / "out")
    assert (tmp_path / "models" / "out" / "x.safetensors").is_file()


def test_output_that_leads_into_the_source_through_a_link(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "transformer").symlink_to(source / "transformer")
    refused(source, tmp_path / "out", "leads into the source", overwrite=True)


def test_output_is_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    refused(source, tmp_path / "out", "is a file", "expected a folder")
    refused(source, tmp_path / "out" / "deeper", tmp_path / "out")


def test_output_that_is_not_empty(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    to_int8(source, tmp_path / "out")  # empty is fine
    refused(source, tmp_path / "out", "not empty", "--overwrite")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refused(source, tmp_path / "out", "not empty", "--overwrite")


def test_overwrite_replaces_an_earlier_conversion(source: Path, tmp_path: Path) -> None:
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    (source / "assets" / "old.txt").write_text("old")
    to_int8(source, out)
    (source / "assets" / "old.txt").unlink()
    (out / "mine.txt").write_text("mine")
    to_int8(source, out, overwrite=True, ignore=["to_qkv"])
    to_int8(source, fresh, ignore=["to_qkv"])
    assert (out / "mine.txt").read_text() == "mine"
    (out / "mine.txt").unlink()
    assert snapshot(out) == snapshot(fresh)


def test_overwriting_hard_links_leaves_the_source_alone(source: Path, tmp_path: Path) -> None:
    before = snapshot(source)
    to_int8(source, tmp_path / "out", link=True)
    to_int8(source, tmp_path / "out", overwrite=True)
    assert snapshot(source) == before
    assert not (tmp_path / "out" / "README.md").samefile(source / "README.md")


def test_overwrite_does_not_leave_other_weights_beside_its_own(source: Path, tmp_path: Path) -> None:
    other = write_weights(tmp_path / "out" / "transformer" / "other.safetensors", {"a.weight": random(2, 2)})
    refused(source, tmp_path / "out", other, "could load both", overwrite=True)


@pytest.mark.parametrize("names", [["../precious"], ["/{}/precious"], [""], ["."], ["transformer/../../precious"]])
def test_manifest_of_others_cannot_delete_files_outside(source: Path, tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "precious").write_text("precious")
    files = {name.format(str(tmp_path).lstrip("/")): {} for name in names}
    write_json(tmp_path / "out" / "omni_convert.json", {"files": files})
    to_int8(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "out" / "model_index.json").is_file()


@pytest.mark.parametrize("free", [0, 10_000])
def test_disk_that_is_too_small(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**9, 10**9 - free, free))
    out = tmp_path / "deep" / "out"
    refused(source, out, out, "bytes", f"{free} free", "choose another disk")


def test_disk_that_is_just_large_enough(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(source, method="int8")
    shards = sum(shard.size for part in planned.components for shard in part.shards)
    free = shards + planned.bytes_copied
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**9, 10**9 - free, free))
    to_int8(source, tmp_path / "copied")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**9, 10**9 - shards, shards))
    to_int8(source, tmp_path / "linked", link=True)
    refused(source, tmp_path / "copied again", "--link")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_disk_that_fills_up_during_the_run(tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "model", {}, {f"blocks.{n}.ff.weight": random(256, 256) for n in range(6)})
    refused_before = snapshot(source)
    with pytest.raises(OmniConvertError, match="the disk has"):
        to_int8(source, small_disk / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**9, 0, 10**9))
    with pytest.raises(OmniConvertError, match=r"cannot be written \(No space left"):
        to_int8(source, small_disk / "out")
    assert snapshot(source) == refused_before
    assert not any(small_disk.iterdir())


def test_interrupted_output_looks_unfinished(source: Path, interrupted: Path) -> None:
    assert (interrupted / MARKER).is_file()
    assert any(interrupted.rglob(f"*.safetensors{PARTIAL_SUFFIX}"))
    left = {path.relative_to(interrupted).as_posix() for path in interrupted.rglob("*") if path.is_file()}
    assert not left & {"model_index.json", "omni_convert.json", "transformer/config.json"}
    assert not any((interrupted / "transformer").glob("*.index.json"))
    with pytest.raises(OmniConvertError, match="unfinished"):
        plan(interrupted, method="int8")


def test_interrupted_output_is_finished_by_the_same_job(source: Path, interrupted: Path, tmp_path: Path) -> None:
    to_int8(source, interrupted)
    to_int8(source, tmp_path / "fresh")
    assert snapshot(interrupted) == snapshot(tmp_path / "fresh")


@pytest.mark.parametrize(
    "options", [{"ignore": ["to_qkv"]}, {"components": ["text_encoder"], "target": "omni-convert"}], ids=str
)
def test_interrupted_output_of_another_job(source: Path, interrupted: Path, options: dict[str, Any]) -> None:
    refused(source, interrupted, interrupted, "another conversion", "--overwrite", **options)
    to_int8(source, interrupted, overwrite=True, **options)
    assert (interrupted / "model_index.json").is_file()


def test_interrupted_output_of_another_source(interrupted: Path, tmp_path: Path) -> None:
    refused(write_pipeline(tmp_path / "other"), interrupted, "another conversion")


def test_interrupted_output_does_not_need_its_space_twice(
    source: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(source, method="int8")
    needed = sum(shard.size for part in planned.components for shard in part.shards) + planned.bytes_copied
    used = sum(path.stat().st_size for path in interrupted.rglob(f"*{PARTIAL_SUFFIX}") if path.name != MARKER)
    assert used > 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(needed, used, needed - used))
    to_int8(source, interrupted)


@pytest.mark.parametrize("content", [b"", b'{\n  "omni'])
def test_killed_while_the_marker_was_written(source: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).write_bytes(content)
    to_int8(source, tmp_path / "out")


def test_failed_run_gives_back_an_empty_folder(source: Path, tmp_path: Path) -> None:
    write_weights(source / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors", _with_nan())
    (tmp_path / "empty").mkdir()
    before = snapshot(source)
    for out in (tmp_path / "new" / "out", tmp_path / "empty"):
        with pytest.raises(OmniConvertError, match="holds NaN or Inf at row 3, column 5"):
            to_int8(source, out)
        assert not out.exists() or not any(out.iterdir())
    assert snapshot(source) == before


def _with_nan() -> Any:
    shard = dict(qwen_shards()[1])
    shard["transformer_blocks.1.attn.to_out.0.weight"].bits[3, 5] = 0x7FC0
    return shard


def test_error_while_sealing_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = OutputFolder.write

    def fail_at_the_config(self: OutputFolder, name: str, data: bytes) -> None:
        if name.endswith("config.json"):
            raise OSError(28, "No space left on device", str(self.path / name))
        write(self, name, data)

    monkeypatch.setattr(OutputFolder, "write", fail_at_the_config)
    with pytest.raises(OmniConvertError, match="No space left"):
        to_int8(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("link", [False, True])
def test_killed_process(tmp_path: Path, link: bool) -> None:
    """SIGKILL in the middle: nothing looks whole, the source is untouched, the same command finishes the job."""
    source, out = write_pipeline(tmp_path / "model"), tmp_path / "out"
    _add_large_layers(source / "transformer", 96)
    before = snapshot(source)
    command = [sys.executable, "-m", "omni_convert.converter.cli", "--method", "int8", "--threads", "1"]
    command += (["--link"] if link else []) + [str(source), str(out)]
    _kill_at_the_first_partial_file(command, out)
    left = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert MARKER in left
    assert any(name.endswith(f".safetensors{PARTIAL_SUFFIX}") for name in left)
    assert not left & {"model_index.json", "omni_convert.json", "transformer/config.json"}
    assert not any(name.endswith(".index.json") for name in left if name.startswith("transformer/"))
    assert snapshot(source) == before
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    to_int8(source, tmp_path / "fresh", link=link)
    assert snapshot(out) == snapshot(tmp_path / "fresh")
    assert snapshot(source) == before


def _add_large_layers(folder: Path, megabytes: int) -> None:
    """A third shard of layers of 4 MB: mostly zeros, so that the file system need not hold them."""
    name, size = "diffusion_pytorch_model-00000-of-00002.safetensors", 2 * 1024 * 2048
    layers = [f"transformer_blocks.{block}.img_mlp.net.2.weight" for block in range(100, 100 + megabytes // 4)]
    header = {layer: entry("BF16", [1024, 2048], n * size, (n + 1) * size) for n, layer in enumerate(layers)}
    with (folder / name).open("wb") as file:
        start = file.write(file_bytes(header))
        file.truncate(start + len(layers) * size)
    index = read_json(folder / "diffusion_pytorch_model.safetensors.index.json")
    index["weight_map"] |= dict.fromkeys(layers, name)
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)


def _kill_at_the_first_partial_file(command: list[str], out: Path) -> None:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    try:
        while not any(out.rglob(f"*.safetensors{PARTIAL_SUFFIX}")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_marker_names_the_job(source: Path, interrupted: Path) -> None:
    job = json.loads((interrupted / MARKER).read_bytes())
    assert (job["recipe"]["method"], job["recipe"]["ignored_layers"]) == ("int8", [])
    assert len(job["headers"]) == 2


def test_component_folder_killed_and_resumed_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_sharded(tmp_path / "model", qwen_shards(), QWEN_CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr("omni_convert.converter.folder.OutputFolder.finish", _interrupt)
        patch.setattr("omni_convert.converter.folder.OutputFolder.give_back", OutputFolder._unlock)
        with pytest.raises(KeyboardInterrupt):
            to_int8(model, tmp_path / "out")
    to_int8(model, tmp_path / "out")
    to_int8(model, tmp_path / "fresh")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "fresh")


def _interrupt(self: object) -> None:
    raise KeyboardInterrupt


def test_overwrite_spares_weights_that_no_manifest_lists(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(source, out)
    before = snapshot(out)
    with pytest.raises(OmniConvertError, match="was not written by omni-convert"):
        convert(source, out, method="int8", overwrite=True)
    assert snapshot(out) == before


def test_file_system_without_locks_is_written_with_a_warning(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    to_int8(source, tmp_path / "out")
    assert (tmp_path / "out" / "omni_convert.json").is_file()
    assert "cannot be locked" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_a_run_tidily(number: signal.Signals, tmp_path: Path) -> None:
    """A process that is told to stop leaves no output, and says so."""
    model, out = tmp_path / "model", tmp_path / "out"
    write_model(model, {}, {f"blocks.{n}.fc.weight": random(2048, 2048) for n in range(24)})
    command = [sys.executable, "-m", "omni_convert.converter.cli", "--method", "int8", "--threads", "1", model, out]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    while not list(out.glob("*.safetensors*")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(number)
    assert process.stderr is not None
    assert "Interrupted" in process.stderr.read()
    assert process.wait() == 1
    assert not out.exists()


def test_same_job_twice_at_the_same_time(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, codes = tmp_path / "out", []
    command = [sys.executable, "-m", "omni_convert.converter.cli", "--method", "int8", str(source), str(out)]
    write = OutputFolder.write

    def run_another_first(self: OutputFolder, name: str, data: bytes) -> None:
        if not codes:
            codes.append(subprocess.run(command, capture_output=True).returncode)
        write(self, name, data)

    monkeypatch.setattr(OutputFolder, "write", run_another_first)
    to_int8(source, out)
    to_int8(source, tmp_path / "fresh")
    assert codes == [1]
    assert snapshot(out) == snapshot(tmp_path / "fresh")
