"""Plain checkpoints whose config asks to quantize them while they are loaded: ``load`` does what it says."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from loaded import assert_holds, layers_of
from quantized import as_bytes

import omni_convert
from omni_convert import OmniConvertError, UsageError
from omni_convert.runtime.linear import QuantizedLinear

ENTRIES: dict[str, dict[str, Any]] = {
    "int8": {"quant_method": "int8", "is_checkpoint_int8_serialized": False, "ignored_layers": ["attn", "attention"]},
    "fp8": {"quant_method": "fp8", "is_checkpoint_fp8_serialized": False, "activation_scheme": "dynamic"},
    "fp8 without flag": {"quant_method": "fp8"},
    "mxfp8": {"quant_method": "mxfp8"},
    "mxfp4": {"quant_method": "mxfp4", "ignored_layers": None},
}


def ask(folder: Path, entry: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": entry}))


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_is_quantized_as_it_asks(name: str, library: str, qwen_plain: Path, bert_plain: Path, tmp_path: Path) -> None:
    source = qwen_plain if library == "diffusers" else bert_plain
    folder = Path(shutil.copytree(source, tmp_path / "asking"))
    entry = dict(ENTRIES[name])
    if entry.get("ignored_layers"):
        entry["ignored_layers"] = ["attn" if library == "diffusers" else "attention"]
    ask(folder, entry)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = omni_convert.load(folder)
    expected = omni_convert.load(source, quantization=entry)
    assert layers_of(found).keys() == layers_of(expected).keys()
    assert layers_of(found)
    for key, value in expected.state_dict().items():
        assert torch.equal(as_bytes(found.state_dict()[key]), as_bytes(value)), key
    found.save_pretrained(tmp_path / "saved")
    assert_holds(omni_convert.load(tmp_path / "saved"), tmp_path / "saved")
    with pytest.raises(OmniConvertError, match="already quantized"):
        omni_convert.load(tmp_path / "saved", quantization="int8")


def test_what_the_caller_asks_for_goes_first(qwen_plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen_plain, tmp_path / "asking"))
    ask(folder, {"quant_method": "int8"})
    formats = {layer.format.name for layer in layers_of(omni_convert.load(folder, quantization="mxfp8")).values()}
    assert formats == {"mxfp8"}
    kept = omni_convert.load(folder, ignore=["attn"])
    assert {layer.format.name for layer in layers_of(kept).values()} == {"int8"}
    assert not any("attn" in name for name in layers_of(kept))


def test_components_of_a_pipeline(qwen_image: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen_image, tmp_path / "model"))
    ask(folder / "transformer", {"quant_method": "int8"})
    pipe = omni_convert.load(folder)
    assert layers_of(pipe.transformer)
    assert not layers_of(pipe.text_encoder)
    ask(folder / "text_encoder", {"quant_method": "fp8"})
    with pytest.raises(UsageError, match=r"asks for .* quantized weights of text_encoder for others"):
        omni_convert.load(folder)
    pipe = omni_convert.load(folder, target="omni-convert")
    formats = [
        {layer.format.name for layer in layers_of(part).values()} for part in (pipe.transformer, pipe.text_encoder)
    ]
    assert formats == [{"int8"}, {"fp8"}]
    with pytest.raises(OmniConvertError, match=r"text_encoder.*: quantization_config asks .* names transformer"):
        omni_convert.load(folder, quantization="int8")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"quant_method": "int8", "is_checkpoint_int8_serialized": "no"}, "is_checkpoint_int8_serialized is 'no'"),
        ({"quant_method": "int8", "num_bf16_fallback_layers": 2}, "only mxfp4_dualscale"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "input_scale for every layer"),
        ({"quant_method": "int8", "ignored_layers": ["nothing"]}, "no layer of the model matches"),
        ({"method": "int8"}, "found the key method, expected quant_method"),
    ],
)
def test_what_cannot_be_done_is_said(entry: dict[str, Any], message: str, qwen_plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen_plain, tmp_path / "asking"))
    ask(folder, entry)
    with pytest.raises(OmniConvertError, match=rf"^{folder}.*quantization_config.*{message}"):
        omni_convert.load(folder)


def test_from_pretrained_says_who_can(qwen_plain: Path, bert_plain: Path, tmp_path: Path) -> None:
    from diffusers import QwenImageTransformer2DModel
    from transformers import BertModel

    for source, model_class in ((qwen_plain, QwenImageTransformer2DModel), (bert_plain, BertModel)):
        folder = Path(shutil.copytree(source, tmp_path / model_class.__name__))
        ask(folder, {"quant_method": "int8", "is_checkpoint_int8_serialized": False})
        with pytest.raises(OmniConvertError, match=r"omni_convert.load\(FOLDER\) quantizes them"):
            model_class.from_pretrained(folder)


@pytest.fixture
def wan(sources: dict[str, Path], qwen_image: Path, tmp_path: Path) -> Path:
    """A whole WanPipeline of two transformers, each with six blocks."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import Qwen2Tokenizer, UMT5Config, UMT5EncoderModel

    parts = [WanTransformer3DModel.from_pretrained(sources["Wan"] / part) for part in ("transformer", "transformer_2")]
    pipe = WanPipeline(
        tokenizer=Qwen2Tokenizer.from_pretrained(qwen_image / "tokenizer"),
        text_encoder=UMT5EncoderModel(UMT5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=8)),
        vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=parts[0], transformer_2=parts[1],
    )  # fmt: skip
    pipe.save_pretrained(tmp_path / "wan")
    return tmp_path / "wan"


def test_every_transformer_has_leading_blocks_of_its_own(wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import WanTransformer3DModel

    ask(wan / "transformer", {"quant_method": "mxfp4_dualscale", "num_bf16_fallback_layers": 1})
    ask(wan / "transformer_2", {"quant_method": "mxfp4_dualscale", "num_bf16_fallback_layers": 0})
    loaded = []
    original = WanTransformer3DModel.from_pretrained
    monkeypatch.setattr(
        WanTransformer3DModel,
        "from_pretrained",
        lambda path, **options: loaded.append(path) or original(path, **options),
    )
    pipe = omni_convert.load(wan)
    blocks = [
        {
            number
            for number, block in enumerate(part.blocks)
            if any(isinstance(m, QuantizedLinear) for m in block.modules())
        }
        for part in (pipe.transformer, pipe.transformer_2)
    ]
    assert blocks == [{1, 2, 3, 4, 5}, {0, 1, 2, 3, 4, 5}]
    assert len(loaded) == 2, "a component was loaded twice"
