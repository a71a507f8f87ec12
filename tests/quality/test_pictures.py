"""Pictures of the layer report: real PNGs that show what the report says, or a clear word why not."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hostile.small import to_bits, write_weights
from PIL import Image

import omni_convert
from omni_convert.formats.errors import OmniConvertError
from omni_convert.quality.pictures import write_pictures
from omni_convert.quality.report import LayerReport, report


@pytest.fixture(scope="module")
def found(qwen_image: Path, tmp_path_factory: pytest.TempPathFactory) -> LayerReport:
    folder = tmp_path_factory.mktemp("pictures") / "out"
    done = omni_convert.convert(qwen_image, folder, method="int8", ignore=["img_mlp"], statistics=True)
    return report(folder, run=done)


def colours(path: Path) -> set[tuple[int, ...]]:
    """Those that fill some area."""
    image = Image.open(path).convert("RGB")
    return {colour for count, colour in image.getcolors(image.width * image.height) or [] if count > 200}  # type: ignore[misc]


def test_pictures(found: LayerReport, tmp_path: Path) -> None:
    paths = list(write_pictures(found, tmp_path / "a"))
    assert [path.name for path in paths] == ["sqnr.png", "worst-layers.png", "size-error.png"]
    again = write_pictures(found, tmp_path / "b")
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    best, kept = (0xFD, 0xE7, 0xA9), (0xDE, 0xDB, 0xD4)
    assert {best, kept} <= colours(paths[0])
    for path in paths:
        assert 500 < Image.open(path).width < 2000 and path.stat().st_size < 200_000


def test_what_has_nothing_to_show_is_left_out(tmp_path: Path) -> None:
    source = write_weights(tmp_path / "model.safetensors", {"a.weight": to_bits(np.zeros((64, 64)))})
    done = omni_convert.convert(source, tmp_path / "out", method="int8")
    assert not list(write_pictures(report(done.out), tmp_path / "pictures"))


def test_matplotlib_is_asked_for(found: LayerReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OmniConvertError, match=r"pip install 'omni-convert\[report\]'"):
        next(write_pictures(found, tmp_path / "pictures"))
    assert not (tmp_path / "pictures").exists()
