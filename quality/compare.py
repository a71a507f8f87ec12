"""Compare what a reference and a candidate generate from the same prompts, seed, sizes and steps.

The reference answers, is let go of, then the candidate is loaded: they are never in memory together, except the
candidate's quantized layers where layers are traced. There is no score that consolidates the metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omni_convert.formats.errors import UsageError, printable
from omni_convert.formats.layout import CONFIG_NAME, PIPELINE_INDEX, read_json
from omni_convert.quality.fused import engine_units
from omni_convert.quality.gate import Checked, Condition
from omni_convert.quality.generation import Generation, ask_of, generate
from omni_convert.quality.language import answers_with_hidden_states
from omni_convert.quality.pair import Pair, make_pair, overall
from omni_convert.quality.perceptual import missing, too_small
from omni_convert.quality.request import HIDDEN, LOGITS, Answer, Request
from omni_convert.quality.similarity import GENERATION, LANGUAGE, PERCEPTUAL, PIXELS
from omni_convert.quality.trace import LayerTrace, quantized_layers, trace


@dataclass(frozen=True, kw_only=True)
class Model:
    """``name``: as the user gave it, of what lies in ``folder``. ``quantization``: how it is quantized while it loads,
    in words; None: as it is on disk. ``target``: the engine that decides what is quantized as a whole."""

    name: str
    folder: Path
    quantization: str | None
    target: str
    load: Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """``metrics``: over all prompts. ``notes``: what is absent, and why. ``trace``: worst layer first; None: not asked
    for, or nothing is quantized."""

    request: Request
    reference: Model
    candidate: Model
    reference_generation: Generation
    candidate_generation: Generation
    pairs: Sequence[Pair]
    gate: Sequence[Checked]
    notes: Sequence[str]
    trace: Sequence[LayerTrace] | None

    @property
    def metrics(self) -> dict[str, float]:
        return overall(self.pairs)

    @property
    def ok(self) -> bool:
        """Every prompt meets every condition of the gate."""
        return all(checked.ok for checked in self.gate)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: None stands for it."""
        from omni_convert.quality.compare_show import comparison_dict

        return comparison_dict(self)

    def to_text(self) -> str:
        from omni_convert.quality.compare_show import comparison_text

        return comparison_text(self)

    def to_html(self) -> str:
        """A page of its own, with the pictures in it."""
        from omni_convert.quality.compare_page import comparison_page

        return comparison_page(self)

    def save_outputs(self, folder: str | Path) -> list[Path]:
        """Write ``reference/`` and ``candidate/`` there: a PNG of every image or frame, or ``.npy`` of logits."""
        from omni_convert.quality.compare_files import save_outputs

        return save_outputs(self.pairs, Path(folder))


def compare_models(
    reference: Model, candidate: Model, request: Request, *, gate: Sequence[Condition], trace_layers: bool,
    device: torch.device, progress: bool = False,
) -> Comparison:  # fmt: skip
    """See ``omni_convert.compare``."""
    _check_computable(gate, request)
    ask = ask_of(request, reference.folder)
    _check_alike(reference.folder, candidate.folder)
    if request.task == "text" and answers_with_hidden_states(reference.folder):
        _check_logits(gate, HIDDEN)
    layers: dict[str, Any] = {}

    def load_candidate() -> Any:
        model = candidate.load()
        if trace_layers:
            layers.update(quantized_layers(model))
        return model

    first = generate("reference", _named("reference", reference.load, progress), ask, request, device)
    check_computed(gate, first.answers[0])
    second = generate("candidate", _named("candidate", load_candidate, progress), ask, request, device)
    answers = zip(request.prompts, first.answers, second.answers, strict=True)
    pairs = [make_pair(*answer) for answer in answers]
    notes = list(dict.fromkeys(note for pair in pairs for note in pair.notes))
    traced = None
    if layers:
        units = engine_units(candidate.folder, candidate.target, layers)
        traced = trace(_named("layers", reference.load, progress), layers, units, ask, request, device)
    elif trace_layers:
        notes.append("no layer is traced: the candidate has no quantized layer")
    return Comparison(
        request=request, reference=reference, candidate=candidate, reference_generation=first,
        candidate_generation=second, pairs=pairs, gate=_check(gate, pairs, second), trace=traced, notes=notes,
    )  # fmt: skip


def _check_computable(gate: Sequence[Condition], request: Request) -> None:
    """Raises:
    UsageError: a metric of the gate does not exist for this task or in this installation.
    """
    for condition in gate:
        metric = condition.metric
        if request.task == "text" and metric in {PIXELS, *PERCEPTUAL}:
            raise UsageError(f"the gate has {condition}, expected no metric of pixels, such as relative_l2<=0.05.")
        if request.task != "text" and metric in LANGUAGE:
            raise UsageError(f"the gate has {condition}, expected no metric of logits with --task {request.task}.")
        if metric in PERCEPTUAL and (why := missing(metric)):
            raise UsageError(f"the gate has {condition}, but {why}.")


def check_computed(gate: Sequence[Condition], answer: Answer) -> None:
    """Before the candidate runs too.

    Raises:
        UsageError: an answer like this has no metric of the gate.
    """
    if not answer.is_pixels:
        _check_logits(gate, answer.kind)
        return
    for condition in gate:
        if condition.metric in PERCEPTUAL and (why := too_small(condition.metric, answer.output.shape)):
            raise UsageError(f"the gate has {condition}, but {why}.")


def _check_logits(gate: Sequence[Condition], kind: str) -> None:
    """Raises:
    UsageError: the gate has a metric of logits, and answers are something else.
    """
    for condition in gate:
        if condition.metric in LANGUAGE and kind != LOGITS:
            raise UsageError(
                f"the gate has {condition}, but the reference answers with {kind}, which have no such metric, expected "
                "one of relative_l2, cosine_similarity and the like."
            )


def _check_alike(reference: Path, candidate: Path) -> None:
    """Raises:
    UsageError: their configs name different classes.
    """
    first, second = _class_name(reference), _class_name(candidate)
    if first != second:
        raise UsageError(
            f"the reference {reference} is a {first}, the candidate {candidate} a {second}, expected two forms of one "
            "model. Pass a model and its conversion."
        )


def _class_name(folder: Path) -> str:
    """Of a pipeline, or of a model of Diffusers or Transformers."""
    if (folder / PIPELINE_INDEX).is_file():
        return printable(read_json(folder / PIPELINE_INDEX).get("_class_name"))
    config = read_json(folder / CONFIG_NAME)
    architectures = config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else config.get("model_type")
    return printable(config.get("_class_name", named))


def _named(name: str, load: Callable[[], Any], progress: bool) -> Callable[[], Any]:
    """What it loads shows its progress under that name, or not at all."""

    def load_named() -> Any:
        model = load()
        if hasattr(model, "set_progress_bar_config"):
            model.set_progress_bar_config(desc=name, disable=not progress)
        return model

    return load_named


def _check(gate: Sequence[Condition], pairs: Sequence[Pair], candidate: Generation) -> list[Checked]:
    measured: Mapping[str, Any] = candidate.to_dict()
    checked = []
    for condition in gate:
        if condition.metric in GENERATION:
            value = measured[condition.metric]
            checked.append(condition.check(math.nan if value is None else value, "candidate"))
        else:
            values = [pair.metrics.get(condition.metric, math.nan) for pair in pairs]
            checked += [condition.check(value, f"prompt {n}") for n, value in enumerate(values, 1)]
    return checked
