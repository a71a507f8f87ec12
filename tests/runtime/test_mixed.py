"""One model whose layers have several formats: each layer gets its own, and a wrong claim is found."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import KINDS
from loaded import assert_holds, assert_layers_run, layers_of, quantized_names, stored
from safetensors.torch import save_file

import omni_convert
from omni_convert import OmniConvertError
from omni_convert.formats.config import MIXED

INT8, CHANNEL, MXFP8 = KINDS["int8"], KINDS["fp8 channel"], KINDS["mxfp8"]
OWN = {r"attn\.to_k$|attention\.self\.key": CHANNEL, r"_mlp\.|intermediate": MXFP8}
TO_K, MLP = "transformer_blocks.0.attn.to_k", "transformer_blocks.1.img_mlp.net.2"
TO_Q = "transformer_blocks.0.attn.to_q"
Quantize = Callable[..., Path]


@pytest.fixture(scope="module")
def mixed_qwen(quantize: Quantize, qwen_plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(qwen_plain, tmp_path_factory.mktemp("mixed") / "transformer", layers=OWN)


@pytest.fixture(scope="module")
def mixed_bert(quantize: Quantize, bert_plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(bert_plain, tmp_path_factory.mktemp("mixed") / "bert", layers=OWN)


def test_diffusers_model(mixed_qwen: Path, qwen_inputs: dict[str, Any]) -> None:
    from diffusers import QwenImageTransformer2DModel

    config = json.loads((mixed_qwen / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], len(config["formats"])) == (MIXED, 3)
    models = [
        omni_convert.load(mixed_qwen),
        QwenImageTransformer2DModel.from_pretrained(mixed_qwen, torch_dtype=torch.bfloat16),
    ]
    with torch.inference_mode():
        outputs = [model(**qwen_inputs)[0] for model in models]
    for model, output in zip(models, outputs, strict=True):
        assert_holds(model, mixed_qwen)
        assert_layers_run(model, {INT8, CHANNEL, MXFP8})
        found = {name: layer.format for name, layer in layers_of(model).items()}
        assert found.keys() == quantized_names(mixed_qwen)
        assert found[TO_K] == CHANNEL
        assert found[MLP] == MXFP8
        assert found[TO_Q] == INT8
        assert torch.equal(output, outputs[0])
        assert output.isfinite().all()


def test_transformers_model(mixed_bert: Path, bert_inputs: dict[str, Any], bert_plain: Path) -> None:
    from transformers import AutoModel

    with torch.inference_mode():
        plain = AutoModel.from_pretrained(bert_plain)(**bert_inputs).last_hidden_state
        for model in (omni_convert.load(mixed_bert), AutoModel.from_pretrained(mixed_bert, dtype="auto")):
            assert_holds(model, mixed_bert)
            assert_layers_run(model, {INT8, CHANNEL, MXFP8})
            assert layers_of(model)["encoder.layer.1.attention.self.key"].format == CHANNEL
            output = model(**bert_inputs).last_hidden_state
            assert 0 < (output - plain).norm() / plain.norm() < 0.05


@pytest.mark.parametrize("name", ["mixed_qwen", "mixed_bert"])
def test_saving_gives_the_same_checkpoint(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source: Path = request.getfixturevalue(name)
    omni_convert.load(source).save_pretrained(tmp_path)
    configs = [json.loads((path / "config.json").read_text())["quantization_config"] for path in (source, tmp_path)]
    assert configs[0] == configs[1]
    assert stored(source).keys() == stored(tmp_path).keys()
    assert_holds(omni_convert.load(tmp_path), source)


def test_compiles(mixed_qwen: Path, qwen_inputs: dict[str, Any]) -> None:
    model = omni_convert.load(mixed_qwen)
    block = model.transformer_blocks[0].img_mlp
    torch._dynamo.reset()
    x = torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


def _relist(place: int, layer: str) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    """Claim that ``layer`` has the format at ``place``."""

    def damage(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for entry in config["formats"][1:]:
            entry["layers"] = [name for name in entry["layers"] if name != layer]
        if place:
            config["formats"][place]["layers"].append(layer)

    return damage


def _drop(name: str) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    return lambda config, tensors: tensors.__delitem__(name)


def _add(name: str, value: torch.Tensor) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    return lambda config, tensors: tensors.update({name: value})


DAMAGE = {
    "int8 listed as another": (_relist(1, TO_Q), f"{TO_Q}.weight is I8"),
    "another not listed": (_relist(0, TO_K), rf"{TO_K}.weight is F8_E4M3 \(64, 64\), expected I8 \(64, 64\) for int8"),
    "fp8 listed as mxfp8": (_relist(-1, TO_K), rf"{TO_K}.weight_scale is F32 \(64,\), expected U8"),
    "a layer that is not there": (_relist(1, "nonsense"), "names layer nonsense, but no quantized layer"),
    "no scale of fp8": (_drop(f"{TO_K}.weight_scale"), f"{TO_K}.weight is F8_E4M3 without {TO_K}.weight_scale"),
    "no scale of mxfp8": (_drop(f"{MLP}.weight_scale"), f"{MLP}.weight is F8_E4M3 without {MLP}.weight_scale"),
    "no weight": (_drop(f"{MLP}.weight"), f"layer {MLP} has a scale but no {MLP}.weight"),
    "ignored": (lambda config, _: config["ignored_layers"].append(TO_K), "names layer .*to_k twice"),
    "one format": (lambda config, _: config["formats"].pop(), "Convert the checkpoint again"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoints_are_refused(name: str, mixed_qwen: Path, tmp_path: Path) -> None:
    from diffusers import QwenImageTransformer2DModel

    damage, message = DAMAGE[name]
    folder, tensors = Path(shutil.copytree(mixed_qwen, tmp_path / "transformer")), stored(mixed_qwen)
    config = json.loads((folder / "config.json").read_text())
    entries = config["quantization_config"]["formats"]
    entries.sort(key=lambda entry: (entry["quant_method"] != "int8", entry["quant_method"] != "modelopt"))
    damage(config["quantization_config"], tensors)
    for path in folder.iterdir():
        path.unlink()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OmniConvertError) as caught:
        omni_convert.load(folder)
    assert re.search(message, str(caught.value))
    with pytest.raises(OmniConvertError):
        QwenImageTransformer2DModel.from_pretrained(folder)


def test_a_scale_of_another_format_is_refused(quantize: Quantize, qwen_plain: Path, tmp_path: Path) -> None:
    folder = quantize(qwen_plain, tmp_path / "out", layers={"_mlp": KINDS["fp8 static"]})
    tensors = stored(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors | {f"{TO_Q}.input_scale": torch.ones(1)}, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(OmniConvertError, match=f"layer {TO_Q} is announced as int8 but has {TO_Q}.input_scale"):
        omni_convert.load(folder)
