"""Outputs as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from omni_convert.quality.pair import Pair
from omni_convert.quality.request import FRAMES, Answer


def save_outputs(pairs: Sequence[Pair], folder: Path) -> list[Path]:
    """Write ``reference/`` and ``candidate/`` into ``folder``, which is made; returns the files."""
    answers = [(side, n, getattr(pair, side)) for side in ("reference", "candidate") for n, pair in enumerate(pairs, 1)]
    return [path for side, number, answer in answers for path in _save(answer, folder / side, f"prompt_{number}")]


def _save(answer: Answer, folder: Path, stem: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    if not answer.is_pixels:
        path = folder / f"{stem}_{answer.kind.replace(' ', '_')}.npy"
        np.save(path, answer.output)
        return [path]
    from PIL import Image

    paths = []
    for number, pixels in enumerate(answer.output):
        path = folder / (f"{stem}_frame_{number:04}.png" if answer.kind == FRAMES else f"{stem}.png")
        Image.fromarray(pixels).save(path)
        paths.append(path)
    return paths
