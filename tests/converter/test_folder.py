"""The output folder: where it may lie, what it may hold, and what is left of a run that stops."""

from __future__ import annotations

import errno
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from hostile.small import (
    qwen_shards,
    random,
    snapshot,
    write_json,
    write_pipeline,
    write_weights,
)

from omni_convert.converter.convert import convert, plan
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


def test_output_that_is_a_circle_of_links(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(OmniConvertError, match=r"out: "):
        to_int8(source, tmp_path / "out")


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
