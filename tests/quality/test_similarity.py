"""Metrics against formulas written another way, and the packages that have them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from omni_convert.quality import similarity
from omni_convert.quality.similarity import METRICS, sums, total

NOISE = np.random.default_rng(0)
PICTURE = NOISE.integers(0, 256, (2, 24, 40, 3), dtype=np.uint8)
OTHER = np.clip(PICTURE + NOISE.normal(0, 9, PICTURE.shape), 0, 255).astype(np.uint8)


def expected(reference: NDArray[Any], candidate: NDArray[Any]) -> dict[str, float]:
    """In the words of the definitions, by NumPy's own functions."""
    r, c = reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()
    mse = np.mean((r - c) ** 2)
    return {
        "psnr_db": 10 * math.log10(255**2 / mse),
        "mae": np.mean(np.abs(r - c)),
        "cosine_similarity": np.dot(r / np.linalg.norm(r), c / np.linalg.norm(c)),
        "relative_l2": np.linalg.norm(r - c) / np.linalg.norm(r),
        "mse": mse,
        "rmse": np.sqrt(mse),
        "max_abs": np.max(np.abs(r - c)),
        "l2": np.linalg.norm(r - c),
    }


def test_pixels() -> None:
    found = sums(PICTURE, OTHER).metrics(pixels=True)
    assert found.keys() == METRICS.keys()
    assert found == pytest.approx(expected(PICTURE, OTHER), rel=1e-12)


def test_psnr_is_that_of_scikit_image() -> None:
    library = pytest.importorskip("skimage.metrics")
    assert sums(PICTURE, OTHER).metrics(pixels=True)["psnr_db"] == pytest.approx(
        library.peak_signal_noise_ratio(PICTURE, OTHER, data_range=255)
    )


def test_floating_point_has_no_psnr() -> None:
    reference, candidate = NOISE.normal(0, 5, (2, 7, 11)).astype(np.float32)
    found = sums(reference, candidate).metrics(pixels=False)
    want = expected(reference, candidate)
    del want["psnr_db"]
    assert found == pytest.approx(want, rel=1e-12)


def test_identical() -> None:
    found = sums(PICTURE, PICTURE).metrics(pixels=True)
    assert found.pop("psnr_db") == math.inf
    assert found.pop("cosine_similarity") == 1
    assert set(found.values()) == {0}


@pytest.mark.parametrize(
    ("reference", "candidate", "cosine", "relative"),
    [([0, 0], [0, 0], 1, 0), ([0, 0], [0, 3], 0, math.inf), ([4, 3], [0, 0], 0, 1), ([1, 0], [-1, 0], -1, 2)],
)
def test_zeros_and_opposites(reference: list[int], candidate: list[int], cosine: float, relative: float) -> None:
    found = sums(np.array(reference, np.float32), np.array(candidate, np.float32)).metrics(pixels=False)
    assert (found["cosine_similarity"], found["relative_l2"]) == (cosine, relative)


def test_parts_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sums(PICTURE, OTHER)
    assert total(sums(*frames) for frames in zip(PICTURE, OTHER, strict=True)) == whole
    monkeypatch.setattr(similarity, "_ROWS", 100)
    assert sums(PICTURE, OTHER) == whole


@given(arrays(np.uint8, (2, 12)))
def test_metrics_stay_in_their_ranges(pair: NDArray[np.uint8]) -> None:
    found = sums(*pair).metrics(pixels=True)
    assert 0 <= found["cosine_similarity"] <= 1
    assert 0 <= found["mae"] <= found["rmse"] <= found["max_abs"] <= 255
    assert found["psnr_db"] >= 0


@given(st.floats(1e-3, 1e3), arrays(np.float32, 9, elements=st.floats(-9, 9, width=32)))
def test_scaling_keeps_the_direction(factor: float, values: NDArray[np.float32]) -> None:
    assert sums(values.astype(np.float64), values * factor).cosine_similarity == pytest.approx(1)
