"""SSIM and LPIPS of pictures, where their packages are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any
from urllib.error import URLError

import numpy as np
from numpy.typing import NDArray

Pictures = NDArray[np.uint8]
"""(count, height, width, 3)"""
_SMALLEST: Mapping[str, int] = {"ssim": 7, "lpips": 32}
"""Pixels of a side: of the window of one, and of what AlexNet leaves something of."""
_PACKAGES: Mapping[str, tuple[str, str]] = {"ssim": ("skimage", "scikit-image"), "lpips": ("lpips", "lpips")}


def missing(metric: str) -> str | None:
    """Why ``ssim`` or ``lpips`` cannot be computed, and what to do; None if it can."""
    module, package = _PACKAGES[metric]
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.origin is not None:  # a folder of that name has no origin
        return None
    return f"{metric} is not computed: the package {package} is not installed (pip install 'omni-convert[compare]')"


def too_small(metric: str, shape: tuple[int, ...]) -> str | None:
    """Why ``ssim`` or ``lpips`` of pictures (count, height, width, 3) cannot be computed; None if it can."""
    smallest = _SMALLEST[metric]
    return f"{metric} is not computed: it needs {smallest} pixels a side" if min(shape[1:3]) < smallest else None


def perceptual(reference: Pictures, candidate: Pictures) -> tuple[dict[str, float], list[str]]:
    """Metrics by name, each the mean over all pictures, and notes on those that are absent."""
    found, notes = {}, []
    measures: Mapping[str, Callable[[Pictures, Pictures], float | str]] = {"ssim": _ssim, "lpips": _lpips}
    for name, measure in measures.items():
        value = missing(name) or too_small(name, reference.shape) or measure(reference, candidate)
        if isinstance(value, str):
            notes.append(value)
        else:
            found[name] = value
    return found, notes


def _ssim(reference: Pictures, candidate: Pictures) -> float:
    from skimage.metrics import structural_similarity

    pairs = zip(reference, candidate, strict=True)
    return float(np.mean([structural_similarity(*pair, channel_axis=2, data_range=255) for pair in pairs]))


def _lpips(reference: Pictures, candidate: Pictures) -> float | str:
    import torch

    try:
        from lpips import LPIPS

        model: Any = LPIPS(net="alex", verbose=False)
    except (ImportError, RuntimeError) as error:  # as of a torchvision that does not fit PyTorch
        return f"lpips is not computed: it cannot be loaded ({error})"
    except (URLError, OSError) as error:  # it fetches AlexNet when it is first used
        return f"lpips is not computed: the weights of AlexNet could not be fetched ({error})"
    with torch.inference_mode():
        return float(np.mean([float(model(_tensor(a), _tensor(b))) for a, b in zip(reference, candidate, strict=True)]))


def _tensor(picture: NDArray[np.uint8]) -> Any:
    """(1, 3, height, width) in [-1, 1]."""
    import torch

    return torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
