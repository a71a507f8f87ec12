"""A source on the Hub between its plan and its conversion: pinned to a commit, and refused where it has no room."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hostile.small import QWEN_CONFIG, qwen_shards, write_sharded
from hub_cli import contents
from hub_server import HubServer
from publishing import use

import omni_convert
from omni_convert import OmniConvertError
from omni_convert.converter.convert import Means, plan, run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_sharded(tmp_path / "model", qwen_shards(), QWEN_CONFIG)
    (folder / "notes.txt").write_text("old")
    return folder


@pytest.fixture
def other_disk() -> Iterator[Path]:
    if not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == Path(tempfile.gettempdir()).stat().st_dev:
        pytest.skip("needs a second disk, looked for one at /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.parametrize("name", ["hub", "xet_hub"])
def test_the_plan_s_commit_is_converted(
    name: str, request: pytest.FixtureRequest, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large and small files of main change meanwhile, with the same names, sizes and headers."""
    hub: HubServer = request.getfixturevalue(name)
    hub.store.add_folder("org/base", source)
    use(hub, monkeypatch, tmp_path / "home")
    omni_convert.convert(source, tmp_path / "expected", method="int8")
    planned = plan("org/base", method="int8")
    changed = write_sharded(tmp_path / "changed", qwen_shards(seed=7), QWEN_CONFIG)
    (changed / "notes.txt").write_text("new")
    hub.store.add_folder("org/base", changed)
    run(planned, tmp_path / "out", Means(), progress=False, started=time.perf_counter())
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_another_disk_without_room_for_downloads(
    hub: HubServer, source: Path, tmp_path: Path, other_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.store.add_folder("org/base", source)
    use(hub, monkeypatch, tmp_path / "home")
    size = sum(path.stat().st_size for path in source.glob("*.safetensors")) + len("old")
    real = shutil.disk_usage
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(other_disk))
    monkeypatch.setattr(
        "shutil.disk_usage",
        lambda path: SimpleNamespace(free=size - 1) if Path(path).is_relative_to(other_disk) else real(path),
    )
    with pytest.raises(OmniConvertError, match=rf"{other_disk}.*downloads take {size} bytes.*Free 1 bytes.*HF_HOME"):
        omni_convert.convert("org/base", tmp_path / "out", method="int8")
    assert not (tmp_path / "out").exists()
    assert not list(other_disk.rglob("*.safetensors"))
