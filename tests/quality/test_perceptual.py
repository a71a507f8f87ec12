"""SSIM and LPIPS: computed where their packages are, else a note that says what to install."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from omni_convert.quality.perceptual import missing, perceptual

NOISE = np.random.default_rng(0)
PICTURES = NOISE.integers(0, 256, (2, 48, 40, 3), dtype=np.uint8)


def test_ssim_falls_with_noise() -> None:
    pytest.importorskip("skimage")
    values = []
    for level in (0, 5, 40):
        noisy = np.clip(PICTURES + NOISE.normal(0, level, PICTURES.shape), 0, 255).astype(np.uint8)
        values.append(perceptual(PICTURES, noisy)[0]["ssim"])
    assert values[0] == 1 > values[1] > values[2]


def test_small_pictures_have_none() -> None:
    pytest.importorskip("skimage")
    found, notes = perceptual(PICTURES[:, :6], PICTURES[:, :6])
    assert "ssim" not in found
    assert "ssim is not computed: it needs 7 pixels a side" in notes


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "lpips").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if not (Path(p) / "lpips").exists())])
    assert "the package lpips is not installed (pip install 'omni-convert[compare]')" in str(missing("lpips"))
