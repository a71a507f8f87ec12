"""One model's answer to a request: what it generated, its latents after each step, seconds and memory."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from omni_convert.formats.errors import OmniConvertError, UsageError, printable
from omni_convert.formats.layout import CONFIG_NAME, PIPELINE_INDEX, read_json
from omni_convert.quality.language import ask_language_model, read_tokenizer
from omni_convert.quality.meter import Meter, freed_after
from omni_convert.quality.request import FRAMES, IMAGES, Answer, Request
from omni_convert.runtime.load import import_library

_FEW_STEPS = 2
"""Of a warm-up: kernels are compiled and weights prepared in the first step; some schedulers need a second."""
_CALLBACK = "callback_on_step_end"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Answers in the order of the prompts; ``meter``: of all measured runs."""

    answers: tuple[Answer, ...]
    meter: Meter

    def to_dict(self) -> dict[str, Any]:
        seconds = self.meter.seconds
        peaks = [None if peak is None else peak / 1e6 for peak in self.meter.peaks]
        known = [peak for peak in peaks if peak is not None]
        return {
            "avg_generation_time_s": sum(seconds) / len(seconds),
            "per_run_generation_time_s": seconds,
            "max_peak_memory_mb": max(known, default=None),
            "per_run_peak_memory_mb": peaks,
            "memory": self.meter.memory,
        }


Side = Literal["reference", "candidate"]
Ask = Callable[[Any, str, bool], Answer]
"""Model, prompt, and whether the answer counts."""


def ask_of(request: Request, reference: Path) -> Ask:
    """How a model is asked, after a look at the reference's folder, without its weights.

    Raises:
        UsageError: the task, or an option, is not one for this model.
        OmniConvertError: a library or the tokenizer is missing.
    """
    if request.task == "text":
        return functools.partial(ask_language_model, read_tokenizer(reference, request.prompts))
    parameters = _call_parameters(request, reference)
    return functools.partial(_ask_pipeline, request, _CALLBACK in parameters)


def generate(side: Side, load: Callable[[], Any], ask: Ask, request: Request, device: torch.device) -> Generation:
    """Load a model, ask it, and let go of it: nothing refers to it afterwards, and its memory is free."""
    with freed_after(device):
        return _generate(side, load(), ask, request, Meter(device))


@torch.inference_mode()
def _generate(side: Side, model: Any, ask: Ask, request: Request, meter: Meter) -> Generation:
    for _ in range(request.warmup_runs):
        ask(model, request.prompts[0], False)
    answers: list[Answer] = []
    for _ in range(request.measure_runs):
        answers = []
        for prompt in request.prompts:
            with meter.run():
                answers.append(ask(model, prompt, True))
            _check_finite(answers[-1], side, prompt)
    return Generation(answers=tuple(answers), meter=meter)


def _check_finite(answer: Answer, side: Side, prompt: str) -> None:
    """Raises:
    OmniConvertError: NaN or Inf.
    """
    if answer.finite:
        return
    advice = "Check that the checkpoint fits its dtype (fp16 overflows where bf16 does not)"
    if side == "candidate":
        advice += ", or leave layers unquantized"
    elif answer.is_pixels:
        advice += ", or take more --num-inference-steps: some schedulers divide by zero with only one"
    raise OmniConvertError(
        f"the {side} answered the prompt {printable(prompt)!r} with {answer.kind} that hold NaN or Inf, expected "
        f"finite values. {advice}."
    )


def _call_parameters(request: Request, folder: Path) -> Mapping[str, Any]:
    """The parameters of the pipeline's call; it fits the task."""
    if not (folder / PIPELINE_INDEX).is_file():
        raise UsageError(
            f"{folder}: has no {PIPELINE_INDEX}, expected a Diffusers pipeline for --task {request.task}. "
            f"Pass the folder of the whole pipeline{' or --task text' if (folder / CONFIG_NAME).is_file() else ''}."
        )
    diffusers: ModuleType = import_library("diffusers")
    name = read_json(folder / PIPELINE_INDEX).get("_class_name")
    pipeline = getattr(diffusers, str(name), None)
    if pipeline is None:
        raise OmniConvertError(
            f"{folder / PIPELINE_INDEX}: _class_name is {printable(name)}, which Diffusers {diffusers.__version__} "
            "does not have. Install the version that the model needs: pip install -U diffusers"
        )
    parameters = inspect.signature(pipeline.__call__).parameters
    makes = "t2v" if "num_frames" in parameters else "t2i"
    if makes != request.task:
        raise UsageError(f"--task is {request.task}, but {name} is for {makes}. Pass --task {makes}.")
    required = [
        key
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty and key not in ("self", "prompt")
    ]
    if required or "prompt" not in parameters:
        needs = f"needs {', '.join(required)}" if required else "takes no prompt"
        raise UsageError(f"{name} {needs}, expected a pipeline that generates from a prompt alone.")
    request.check_arguments(parameters, str(name))
    return parameters


def _ask_pipeline(request: Request, tells_steps: bool, pipeline: Any, prompt: str, counts: bool) -> Answer:
    latents: list[torch.Tensor] = []

    def keep(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"].detach().to("cpu", copy=True))
        return tensors

    arguments = request.arguments()
    if not counts:
        arguments["num_inference_steps"] = min(_FEW_STEPS, arguments.get("num_inference_steps", _FEW_STEPS))
    elif tells_steps:
        arguments[_CALLBACK] = keep
    # Noise from the CPU's generator is the same on every device.
    generator = torch.Generator("cpu").manual_seed(request.seed)
    result = pipeline(prompt=prompt, generator=generator, output_type="np", **arguments)
    values, kind = (result.frames[0], FRAMES) if request.task == "t2v" else (result.images, IMAGES)
    return Answer(output=_pixels(values), kind=kind, latents=latents, finite=bool(np.isfinite(values).all()))


def _pixels(values: NDArray[Any]) -> NDArray[np.uint8]:
    """(frames, height, width, 3) of [0, 1] as uint8, as Diffusers itself rounds them; NaN as 0."""
    return np.asarray((np.clip(np.nan_to_num(values), 0, 1) * 255).round(), np.uint8)
