"""Real pipelines, compared: metrics of what they generate, memory, gates, drift, files."""

from __future__ import annotations

import gc
import json
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import load_bf16
from PIL import Image

import omni_convert
from omni_convert import OmniConvertError, UsageError
from omni_convert.quality.compare import Comparison
from omni_convert.quality.similarity import METRICS

SIZE: dict[str, Any] = {"height": 32, "width": 48, "num_inference_steps": 3}
"""Small, and not square: who mixes up height and width is seen."""


def compare_images(reference: Path, candidate: Path | None = None, **options: Any) -> Comparison:
    prompt = options.pop("prompt", "a cup of coffee")
    return omni_convert.compare(reference, candidate, task="t2i", prompt=prompt, **SIZE, **options)


@pytest.fixture(scope="module")
def converted(qwen_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "int8"
    omni_convert.convert(qwen_image, out, method="int8")
    return out


@pytest.fixture(scope="module")
def comparison(qwen_image: Path, converted: Path) -> Comparison:
    prompts = ["a cup of coffee", "a red bicycle"]
    return compare_images(qwen_image, converted, prompt=prompts, measure_runs=2, gate="psnr_db>=20,mae<=0.01")


def picture(folder: Path, prompt: str) -> Any:
    """What the library itself makes of it."""
    noise = torch.Generator().manual_seed(42)
    return np.asarray(load_bf16(folder)(prompt, generator=noise, **SIZE).images[0])


def test_pictures_are_those_of_the_library(comparison: Comparison, qwen_image: Path, converted: Path) -> None:
    for pair in comparison.pairs:
        assert pair.reference.output.shape == (1, 32, 48, 3)
        assert np.array_equal(pair.reference.output[0], picture(qwen_image, pair.prompt))
        assert np.array_equal(pair.candidate.output[0], picture(converted, pair.prompt))


def test_metrics_are_of_these_pictures(comparison: Comparison) -> None:
    reference, candidate = (
        np.stack([getattr(pair, side).output for pair in comparison.pairs]).astype(np.float64)
        for side in ("reference", "candidate")
    )
    mse = ((reference - candidate) ** 2).mean()
    assert mse > 0
    assert comparison.metrics["psnr_db"] == pytest.approx(10 * math.log10(255**2 / mse))
    assert comparison.pairs[1].metrics["mae"] == pytest.approx(np.abs(reference[1] - candidate[1]).mean())


def test_json_has_what_the_guide_names(comparison: Comparison) -> None:
    found = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert found["output_metrics"].keys() >= METRICS.keys()
    assert found["output_metrics"]["identical"] is False
    for side in ("reference_generation", "candidate_generation"):
        times, peaks = found[side]["per_run_generation_time_s"], found[side]["per_run_peak_memory_mb"]
        assert len(times) == len(peaks) == 2 * 2
        assert found[side]["avg_generation_time_s"] == pytest.approx(sum(times) / 4)
        assert found[side]["max_peak_memory_mb"] == max(peaks) > 100
        assert found[side]["memory"] == "resident memory of the process"


def test_gate_is_checked_for_every_prompt(comparison: Comparison) -> None:
    assert not comparison.ok
    assert [checked.ok for checked in comparison.gate] == [True, True, False, False]
    assert [checked.where for checked in comparison.gate] == ["prompt 1", "prompt 2"] * 2
    assert "gate: 2 of 4 missed" in comparison.to_text()


def test_drift_ends_where_the_pictures_begin(comparison: Comparison, qwen_image: Path, converted: Path) -> None:
    """Latents after the last step, as the libraries return them, are as far apart as the drift says."""
    ends = []
    for folder in (qwen_image, converted):
        noise = torch.Generator().manual_seed(42)
        result = load_bf16(folder)("a red bicycle", generator=noise, output_type="latent", **SIZE)
        ends.append(result.images.double())
    steps = comparison.pairs[1].drift
    assert [step.number for step in steps] == [1, 2, 3]
    distance = torch.linalg.vector_norm(ends[1] - ends[0]) / torch.linalg.vector_norm(ends[0])
    assert steps[0].relative_l2 > 0
    assert steps[-1].relative_l2 == pytest.approx(float(distance))
    cosine = torch.cosine_similarity(ends[0].flatten(), ends[1].flatten(), dim=0)
    assert steps[-1].cosine_similarity == pytest.approx(float(cosine))


def test_reference_beside_itself_is_identical(qwen_image: Path) -> None:
    result = compare_images(qwen_image, qwen_image, gate="strict,psnr_db>=1000")
    assert result.metrics["psnr_db"] == math.inf
    assert result.ok
    assert {result.metrics[name] for name in ("mae", "mse", "rmse", "max_abs", "l2", "relative_l2")} == {0}
    assert [(step.relative_l2, step.cosine_similarity) for step in result.pairs[0].drift] == [(0, 1)] * 3
    found = result.to_dict()["output_metrics"]
    assert (found["psnr_db"], found["identical"]) == (None, True)


def test_online_is_what_the_conversion_is(qwen_image: Path, comparison: Comparison) -> None:
    online = compare_images(qwen_image, quantization="int8", prompt="a red bicycle")
    assert np.array_equal(online.pairs[0].candidate.output, comparison.pairs[1].candidate.output)
    assert online.to_dict()["candidate"]["quantization"] == "int8"


def test_models_are_never_in_memory_together(
    qwen_image: Path, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the candidate is loaded, nothing of the reference is left, nor anything of either afterwards."""
    import omni_convert.runtime.load as loading

    load, seen, alive = loading.load, [], []

    def watch(*args: Any, **options: Any) -> Any:
        alive.append([ref for ref in seen if ref() is not None])
        pipeline = load(*args, **options)
        modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        seen.extend(weakref.ref(tensor) for part in modules for tensor in part.parameters())
        return pipeline

    monkeypatch.setattr(loading, "load", watch)
    result = compare_images(qwen_image, converted)
    assert len(alive) == 2 and len(seen) > 200
    assert alive == [[], []]
    gc.collect()
    assert [ref for ref in seen if ref() is not None] == []
    assert result.metrics["mae"] > 0


def test_outputs_are_saved(comparison: Comparison, tmp_path: Path) -> None:
    paths = comparison.save_outputs(tmp_path / "made" / "images")
    names = [path.relative_to(tmp_path / "made" / "images").as_posix() for path in paths]
    assert names == [f"{side}/prompt_{n}.png" for side in ("reference", "candidate") for n in (1, 2)]
    assert np.array_equal(np.asarray(Image.open(paths[3])), comparison.pairs[1].candidate.output[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither a candidate nor a quantization"),
        ({"quantization": "int8", "candidate": "out"}, "both a candidate and a quantization"),
        ({"quantization": "int8", "ignore": ["no_such_layer"]}, "no_such_layer"),
        ({"quantization": "int8", "prompt": []}, "found no prompt"),
        ({"quantization": "int8", "prompt": " "}, "found no prompt"),
        ({"quantization": "int8", "num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"quantization": "int8", "num_frames": 5}, "--num-frames was given, but QwenImagePipeline has no such"),
        ({"quantization": "int8", "task": "t2v"}, "--task is t2v, but QwenImagePipeline is for t2i"),
        ({"quantization": "int8", "task": "text"}, "is not the folder of one Transformers model"),
        ({"quantization": "int8", "task": "t2a"}, "task is 't2a', expected one of t2i, t2v, text"),
        ({"quantization": "int8", "gate": "top1_agreement>=1"}, "expected no metric of logits"),
        ({"quantization": "int8", "gate": ""}, "--gate has '', expected smoke or strict"),
        ({"quantization": "int8", "cfg_scale": math.nan}, "cfg_scale is nan, expected a finite number"),
        ({"quantization": "int8", "guidance_scale": math.inf}, "guidance_scale is inf, expected a finite number"),
        ({"quantization": "int8", "prompt": ["a", "b\udcff"]}, r"the prompt 'b\\udcff' is no text, expected UTF-8"),
        ({"quantization": "int8", "negative_prompt": "\udcff"}, r"the prompt '\\udcff' is no text"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    options: dict[str, Any], message: str, qwen_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded."""
    monkeypatch.setattr("omni_convert.runtime.load.load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UsageError, match=message):
        omni_convert.compare(qwen_image, **{"task": "t2i", "prompt": "a", **options})


def test_folders_that_are_no_models(tmp_path: Path, qwen_image: Path) -> None:
    with pytest.raises(OmniConvertError, match=r"nowhere: does not exist"):
        compare_images(qwen_image, tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"has no model_index.json, expected a Diffusers pipeline .* --task t2i"):
        compare_images(qwen_image / "transformer", quantization="int8")


def test_nan_is_named(qwen_image: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(qwen_image, tmp_path / "broken"))
    path = broken / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_out.bias"].fill_(float("nan"))
    save_file(tensors, path)
    with pytest.raises(
        OmniConvertError, match=r"candidate answered the prompt 'a cup of coffee' with images that hold NaN"
    ):
        compare_images(qwen_image, broken)


def test_a_step_too_few_for_the_scheduler_is_named(qwen_image: Path) -> None:
    """Qwen-Image's divides by zero with one step."""
    with pytest.raises(OmniConvertError, match=r"the reference answered .* NaN .* or take more --num-inference-steps"):
        omni_convert.compare(
            qwen_image, quantization="int8", task="t2i", prompt="a", height=32, width=32, num_inference_steps=1
        )
