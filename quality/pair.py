"""The two answers to one prompt, and how far they are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from omni_convert.formats.errors import OmniConvertError
from omni_convert.quality.language import language_metrics
from omni_convert.quality.perceptual import perceptual
from omni_convert.quality.request import FRAMES, LOGITS, Answer
from omni_convert.quality.similarity import Sums, sums, total


@dataclass(frozen=True, kw_only=True)
class Step:
    """How far the candidate's latents are from the reference's after denoising step ``number``, from 1."""

    number: int
    cosine_similarity: float
    relative_l2: float


@dataclass(frozen=True, kw_only=True)
class Pair:
    """``sums``: of every image, frame or token. ``extra``: metrics that are not made of sums. ``notes``: what
    is absent, and why."""

    prompt: str
    reference: Answer
    candidate: Answer
    sums: Sequence[Sums]
    extra: Mapping[str, float]
    drift: Sequence[Step]
    notes: Sequence[str]

    @property
    def metrics(self) -> dict[str, float]:
        return overall([self])

    @property
    def frames(self) -> list[dict[str, float]]:
        """The metrics of every frame of a video."""
        return [part.metrics(pixels=True) for part in self.sums] if self.reference.kind == FRAMES else []


def overall(pairs: Sequence[Pair]) -> dict[str, float]:
    """Over all values of all answers; what is not made of sums is the mean over the prompts."""
    found = total(part for pair in pairs for part in pair.sums).metrics(pixels=pairs[0].reference.is_pixels)
    extra = {name: float(np.mean([pair.extra[name] for pair in pairs])) for name in pairs[0].extra}
    return found | extra


def make_pair(prompt: str, reference: Answer, candidate: Answer) -> Pair:
    """Raises:
    OmniConvertError: the answers, or the latents on the way there, have different shapes.
    """
    if reference.output.shape != candidate.output.shape:
        raise OmniConvertError(
            f"the reference answered with {reference.kind} of shape {reference.output.shape}, the candidate with "
            f"{candidate.kind} of shape {candidate.output.shape}, expected the same. Compare two forms of one model."
        )
    extra: dict[str, float] = {}
    notes: list[str] = []
    parts = [sums(*each) for each in zip(reference.output, candidate.output, strict=True)]
    if reference.is_pixels:
        extra, notes = perceptual(reference.output, candidate.output)
    elif reference.kind == LOGITS:
        extra = language_metrics(reference.output, candidate.output)
    return Pair(
        prompt=prompt, reference=reference, candidate=candidate, sums=parts, extra=extra, notes=notes,
        drift=_drift(reference.latents, candidate.latents),
    )  # fmt: skip


def _drift(reference: Sequence[torch.Tensor], candidate: Sequence[torch.Tensor]) -> list[Step]:
    shapes = [[tuple(latents.shape) for latents in side] for side in (reference, candidate)]
    if shapes[0] != shapes[1]:
        first, second = (f"{len(found)} steps, latents of shape {found[0] if found else None}" for found in shapes)
        raise OmniConvertError(
            f"the reference took {first}, the candidate {second}, expected the same. Compare two forms of one model, "
            "with one scheduler."
        )
    found = [sums(a.float().numpy(), b.float().numpy()) for a, b in zip(reference, candidate, strict=True)]
    return [
        Step(number=number, cosine_similarity=part.cosine_similarity, relative_l2=part.relative_l2)
        for number, part in enumerate(found, 1)
    ]
