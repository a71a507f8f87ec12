"""``compare``: the command line's and the API's way into the comparison of outputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni_convert.converter.hub_source import local_folder
from omni_convert.converter.manifest import read_manifest
from omni_convert.converter.recipe import Choices
from omni_convert.formats.errors import UsageError
from omni_convert.formats.quant_config import Spec
from omni_convert.formats.target import DEFAULT_TARGET
from omni_convert.quality.gate import parse_gate
from omni_convert.quality.request import DEFAULT_SEED, Request, Task

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

    from omni_convert.quality.compare import Comparison, Model


def compare(
    reference: str | os.PathLike[str],
    candidate: str | os.PathLike[str] | None = None,
    *,
    quantization: Spec = None,
    task: Task,
    prompt: str | Sequence[str],
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    cfg_scale: float | None = None,
    seed: int = DEFAULT_SEED,
    warmup_runs: int = 1,
    measure_runs: int = 1,
    gate: str | None = None,
    trace_layers: bool = False,
    device: str = "cpu",
    progress: bool = False,
    **choices: Unpack[Choices],
) -> Comparison:
    """Generate with a reference and with a quantized candidate, one after the other, and compare what comes out.

    Args:
        reference: folder of a Diffusers pipeline, or for ``text`` of one Transformers model; plain or converted. Or a
            repository on the Hub, ``org/name[@revision]``, of which what the model needs is downloaded.
        candidate: likewise; None: the reference, quantized while it loads.
        quantization, choices: as ``load`` takes them, in place of a candidate.
        task: ``t2i``, ``t2v``, or ``text``, which compares logits (of an encoder, hidden states) over the prompt.
        prompt: one or several.
        height, width: of images and frames, in pixels; None: the pipeline's default, as of all that follow.
        cfg_scale: the ``true_cfg_scale`` of Qwen-Image and FLUX, whose ``guidance_scale`` is another thing.
        warmup_runs: of at most two steps, before time and memory are measured in ``measure_runs``.
        gate: ``smoke``, ``strict``, or conditions such as ``psnr_db>=25,mae<=6``; ``ok`` tells whether all are met.
        trace_layers: run the reference once more and measure what each quantized layer does to its activations; the
            candidate's quantized layers are in memory beside it.
        device: where both run, such as ``cpu``, ``cuda:0`` or ``npu:0``. The noise is the same on all of them.

    Raises:
        UsageError: what cannot be asked of this model, or of any; found before it is loaded.
        OmniConvertError: a checkpoint that cannot be loaded, NaN or Inf in an output, or outputs of different shapes.
    """
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    request = Request(
        task=task, prompts=prompts, negative_prompt=negative_prompt, height=height, width=width, num_frames=num_frames,
        num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, cfg_scale=cfg_scale, seed=seed,
        warmup_runs=warmup_runs, measure_runs=measure_runs,
    )  # fmt: skip
    conditions = () if gate is None else parse_gate(gate)
    from omni_convert.quality.compare import compare_models
    from omni_convert.runtime.load import parse_device

    target = parse_device(device)
    quantized = quantization is not None or bool(choices)
    if (candidate is not None) == quantized:
        found = "both a candidate and a quantization" if quantized else "neither a candidate nor a quantization"
        raise UsageError(f"found {found}, expected one of them: --candidate OUT, or --quantization METHOD.")
    folder = local_folder(reference)
    first = _stored(os.fspath(reference), folder, target)
    if candidate is not None:
        second = _stored(os.fspath(candidate), local_folder(candidate), target)
    else:
        second = _online(os.fspath(reference), folder, quantization, target, choices)
    return compare_models(
        first, second, request, gate=conditions, trace_layers=trace_layers, device=target, progress=progress
    )


def _stored(name: str, folder: Path, device: torch.device) -> Model:
    """As it is, or quantized while it loads, if its config asks for that."""
    from omni_convert.quality.compare import Model
    from omni_convert.runtime.load import asked_online, prepare

    if (asked := asked_online(folder)) is not None:
        return _online(name, folder, asked, device, {})
    load, manifest = prepare(folder, device=device), read_manifest(folder)
    target = str(manifest["recipe"].get("target", DEFAULT_TARGET)) if manifest else DEFAULT_TARGET
    return Model(name=name, folder=folder, quantization=None, target=target, load=load)


def _online(name: str, folder: Path, quantization: Spec, device: torch.device, choices: Choices) -> Model:
    from omni_convert.online import prepare_online
    from omni_convert.quality.compare import Model

    load = prepare_online(folder, quantization, device=device, dtype=None, **choices)
    given: dict[str, Any] = {"": quantization, **choices}
    words = [_in_words(key, value) for key, value in given.items() if value not in (None, (), [])]
    target = choices.get("target") or (choices.get("recipe") or {}).get("target", DEFAULT_TARGET)
    return Model(name=name, folder=folder, quantization=", ".join(words), target=target, load=load)


def _in_words(name: str, value: Any) -> str:
    if name == "recipe":
        return "a recipe"
    text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return f"{name.replace('_', ' ')} {text}" if name not in ("", "method") else text
