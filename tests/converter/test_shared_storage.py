"""Another machine must see the same files: what it says of those that it does not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hostile.small import write_weights

from omni_convert.converter.shared_storage import View
from omni_convert.converter.source import SourceFile
from omni_convert.formats.errors import OmniConvertError, SourceError

MARKER = ".omni_convert.partial"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_weights(tmp_path / "model.safetensors", {})


@pytest.fixture
def view(source: Path, tmp_path: Path) -> View:
    (tmp_path / MARKER).write_text('{"run": 1}\n')
    return View.of(tmp_path, [SourceFile.now(source)])


def refused(view: View, path: Path, found: str) -> None:
    with pytest.raises(OmniConvertError) as caught:
        view.check("n7 (10.0.0.7)")
    message = str(caught.value)
    assert message.startswith(f"{path}: node n7 (10.0.0.7) {found}, expected the one that {os.uname().nodename} sees.")
    assert not isinstance(caught.value, SourceError)  # what is finished is of use


def test_same_view(view: View, tmp_path: Path) -> None:
    view.check("n7")
    with (tmp_path / MARKER).open("a") as file:
        file.write('{"file": "a"}\n')
    view.check("n7")


def test_source_that_is_not_there(view: View, source: Path) -> None:
    source.unlink()
    refused(view, source, "does not have this file")


def test_source_of_another_time(view: View, source: Path) -> None:
    os.utime(source, (1, 1))
    refused(view, source, "has another file there")
    with pytest.raises(SourceError, match="changed during the run"):
        view.check_source()


def test_source_of_another_size(view: View, source: Path) -> None:
    os.truncate(source, 3)
    refused(view, source, "has another file there")


@pytest.mark.parametrize("content", ["", '{"run": 2}\n'])
def test_output_that_is_another(view: View, tmp_path: Path, content: str) -> None:
    (tmp_path / MARKER).write_text(content)
    refused(view, tmp_path / MARKER, "has another file there")


def test_output_that_is_not_there(view: View, tmp_path: Path) -> None:
    (tmp_path / MARKER).unlink()
    refused(view, tmp_path / MARKER, "does not have this file")


def test_another_version(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni_convert.__version__", "9.9")
    with pytest.raises(OmniConvertError, match=r"node n7: found omni-convert 9\.9, expected .* as on "):
        view.check("n7")
