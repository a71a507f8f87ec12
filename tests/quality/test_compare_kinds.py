"""Videos and language models, compared."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import omni_convert
from omni_convert import OmniConvertError, UsageError
from omni_convert.quality.compare import Comparison, check_computed
from omni_convert.quality.gate import parse_gate
from omni_convert.quality.pair import make_pair
from omni_convert.quality.request import IMAGES, Answer, Task
from omni_convert.quality.similarity import METRICS

PROMPTS = ["a red bicycle", "a lighthouse in the storm"]


def compare_text(folder: Path, **options: Any) -> Comparison:
    choices: dict[str, Any] = {"prompt": PROMPTS, "quantization": "mxfp4", "target": "omni-convert", **options}
    return omni_convert.compare(folder, task="text", **choices)


def test_video(wan: Path, tmp_path: Path) -> None:
    size = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 3}
    result = omni_convert.compare(wan, quantization="int8", task="t2v", prompt="a red bicycle", **size)
    (pair,) = result.pairs
    assert pair.reference.output.shape == (5, 32, 48, 3)
    assert len(pair.frames) == 5 and len(pair.drift) == 3
    mse = [
        ((a - b.astype(float)) ** 2).mean() for a, b in zip(pair.reference.output, pair.candidate.output, strict=True)
    ]
    assert [frame["mse"] for frame in pair.frames] == pytest.approx(mse)
    assert result.metrics["psnr_db"] == pytest.approx(10 * math.log10(255**2 / np.mean(mse)))
    assert [frame["max_abs"] for frame in result.to_dict()["prompts"][0]["frames"]] == [
        f["max_abs"] for f in pair.frames
    ]
    names = [path.name for path in result.save_outputs(tmp_path)]
    assert names == [f"prompt_1_frame_{n:04}.png" for n in range(5)] * 2


def test_logits_are_those_of_the_library(language_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = compare_text(language_model)
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    model = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.bfloat16).eval()
    other = omni_convert.load(language_model, quantization="mxfp4", target="omni-convert")
    agreed, divergences = [], []
    for pair in result.pairs:
        batch = tokenizer(pair.prompt, return_tensors="pt")
        with torch.inference_mode():
            logits = [m(**batch).logits[0].float() for m in (model, other)]
        assert np.array_equal(pair.reference.output, logits[0].numpy())
        assert np.array_equal(pair.candidate.output, logits[1].numpy())
        agreed.append((logits[0].argmax(1) == logits[1].argmax(1)).double().mean())
        p, q = (torch.distributions.Categorical(logits=values.double()) for values in logits)
        divergences.append(torch.distributions.kl_divergence(p, q).mean())
    assert result.metrics["top1_agreement"] == pytest.approx(float(np.mean(agreed)))
    assert result.metrics["kl_divergence"] == pytest.approx(float(np.mean(divergences)))
    assert result.metrics["kl_divergence"] > 0
    assert result.metrics.keys() == METRICS.keys() - {"psnr_db"} | {"top1_agreement", "kl_divergence"}
    assert not result.pairs[0].drift
    assert np.array_equal(np.load(result.save_outputs(tmp_path)[0]), result.pairs[0].reference.output)


def test_hidden_states_of_an_encoder(minilm: Path) -> None:
    result = compare_text(minilm, quantization="int8", gate="cosine_similarity>=0.99,relative_l2<=0.1")
    assert result.pairs[0].reference.kind == "hidden states"
    assert result.pairs[0].reference.output.shape[1] == 384
    assert result.ok and result.metrics["mae"] > 0
    assert "top1_agreement" not in result.metrics


def test_an_encoder_has_no_metrics_of_logits(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known from its config before anything is loaded, or else from the reference's answer."""
    import omni_convert.runtime.load as loading

    load, loaded = loading.load, []

    def count(path: Path, **options: Any) -> Any:
        loaded.append(path)
        return load(path, **options)

    monkeypatch.setattr(loading, "load", count)
    for known in (True, False):
        if not known:  # as of T5EncoderModel, which Transformers does not list as a model without a head
            monkeypatch.setattr("omni_convert.quality.compare.answers_with_hidden_states", lambda folder: False)
        with pytest.raises(UsageError, match=r"has top1_agreement>=0.9, but the reference answers with hidden states"):
            compare_text(minilm, quantization="int8", gate="relative_l2<=1,top1_agreement>=0.9")
        assert loaded == ([] if known else [minilm])


def test_pictures_too_small_for_a_gate_are_refused_before_the_candidate_runs() -> None:
    answer = Answer(output=np.zeros((1, 16, 6, 3), np.uint8), kind=IMAGES)
    with pytest.raises(UsageError, match=r"has ssim>=0.9, but ssim is not computed: it needs 7 pixels a side"):
        check_computed(parse_gate("mae<=6,ssim>=0.9"), answer)
    check_computed(parse_gate("ssim>=0.9"), Answer(output=np.zeros((1, 7, 7, 3), np.uint8), kind=IMAGES))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "smoke"}, "the gate has psnr_db>=20, expected no metric of pixels"),
        ({"gate": "ssim>=0.9"}, "expected no metric of pixels"),
        ({"height": 64, "cfg_scale": 4.0}, "--height, --cfg-scale was given with --task text"),
    ],
)
def test_what_text_does_not_have(options: dict[str, Any], message: str, language_model: Path) -> None:
    with pytest.raises(UsageError, match=message):
        compare_text(language_model, **options)


def test_models_of_other_kinds_are_refused(language_model: Path, wan: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no model_index.json.*or --task text"):
        omni_convert.compare(language_model, quantization="int8", task="t2i", prompt="a")
    with pytest.raises(UsageError, match="is not the folder of one Transformers model"):
        omni_convert.compare(wan, quantization="int8", task="text", prompt="a")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((language_model / name).read_bytes())
    with pytest.raises(OmniConvertError, match="bare: its tokenizer makes no token of 'a red bicycle'"):
        compare_text(bare)


def test_different_models_are_named_before_any_is_loaded(
    language_model: Path, minilm: Path, qwen_image: Path, z_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omni_convert.runtime.load.load", lambda *_, **__: pytest.fail("loaded"))
    for reference, candidate, task, names in (
        (language_model, minilm, "text", r"Qwen3ForCausalLM, .* a BertModel"),
        (qwen_image, z_image, "t2i", r"QwenImagePipeline, .* a ZImagePipeline"),
        (qwen_image, language_model, "t2i", r"QwenImagePipeline, .* a Qwen3ForCausalLM"),
        (language_model, qwen_image, "text", r"Qwen3ForCausalLM, .* a QwenImagePipeline"),
    ):
        with pytest.raises(UsageError, match=f"is a {names}, expected two forms of one model"):
            omni_convert.compare(reference, candidate, task=cast(Task, task), prompt="a")


def test_answers_that_cannot_be_compared() -> None:
    def answer(size: int, steps: int, width: int) -> Answer:
        return Answer(output=np.zeros((1, size, 4, 3), np.uint8), kind=IMAGES, latents=[torch.zeros(1, width)] * steps)

    for other, message in (
        (answer(8, 2, 3), r"images of shape \(1, 4, 4, 3\), the candidate with images of shape \(1, 8, 4, 3\)"),
        (answer(4, 3, 3), r"took 2 steps, .* the candidate 3 steps, latents of shape \(1, 3\)"),
        (answer(4, 2, 5), r"latents of shape \(1, 3\), the candidate 2 steps, latents of shape \(1, 5\)"),
    ):
        with pytest.raises(OmniConvertError, match=message):
            make_pair("a", answer(4, 2, 3), other)


def test_nan_of_a_language_model_is_named(language_model: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(language_model, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(OmniConvertError, match="the candidate answered the prompt 'a' with logits that hold NaN"):
        omni_convert.compare(language_model, broken, task="text", prompt="a")
    with pytest.raises(OmniConvertError, match=r"the reference answered .* does not\)\.$"):
        omni_convert.compare(broken, language_model, task="text", prompt="a")
