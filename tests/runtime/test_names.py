"""A checkpoint has exactly the tensors that its config and its model ask for, or an error names one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import KINDS
from loaded import LAYERS, layers_of, loaders, refused, stored
from safetensors.torch import save_file

import omni_convert
from omni_convert import OmniConvertError
from omni_convert.formats.base import Facts

Tensors = dict[str, torch.Tensor]
KEPT = {"qwen": "img_in.weight", "bert": "embeddings.word_embeddings.weight"}
library = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture
def change(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    def change(name: str, edit: Callable[[Tensors], object], source: Path | None = None) -> Path:
        source = source or request.getfixturevalue(name)
        tensors, folder = stored(source), tmp_path / "changed"
        edit(tensors)
        folder.mkdir()
        shutil.copy(source / "config.json", folder)
        stem = "diffusion_pytorch_model" if name == "qwen" else "model"
        save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})
        return folder

    return change


@library
@pytest.mark.parametrize(
    ("suffix", "edit", "message"),
    [
        ("weight_scale", None, "weight is I8 without .*weight_scale, expected both"),
        ("weight", None, "has a scale but no .*weight, expected both"),
        ("weight", lambda value: value[:-1].contiguous(), r"weight_scale is F32 \(64, 1\), expected F32 \(63, 1\)"),
        ("weight_scale", torch.flatten, r"weight_scale is F32 \(64,\), expected F32 \(64, 1\)"),
        ("weight", torch.Tensor.bfloat16, r"weight is BF16 \(64, .*\), expected I8"),
        ("weight_scale", torch.Tensor.half, r"weight_scale is F16 \(64, 1\), expected F32"),
    ],
)
def test_what_a_quantized_layer_has(
    name: str, suffix: str, edit: Callable[..., torch.Tensor] | None, message: str, change: Callable[..., Path]
) -> None:
    key = f"{LAYERS[name]}.{suffix}"
    folder = change(name, lambda tensors: tensors.update({key: edit(tensors[key])}) if edit else tensors.pop(key))
    refused(name, folder, f"{LAYERS[name]}.*{message}")


@library
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_weights_are_no_integers(name: str, dtype: torch.dtype, change: Callable[..., Path]) -> None:
    """The libraries would cast them to floating point."""
    key = KEPT[name]
    folder = change(name, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    refused(name, folder, f"tensor {key} is [IU][0-9]+ without")


@library
@pytest.mark.parametrize("suffix", ["zero_point", "weight_zero_point", "input_scale", "lora_A.weight", "g_idx"])
def test_what_a_format_does_not_know(name: str, suffix: str, change: Callable[..., Path]) -> None:
    key = f"{LAYERS[name]}.{suffix}"
    refused(name, change(name, lambda tensors: tensors.update({key: torch.ones(1)})), key)


@library
@pytest.mark.parametrize("key", ["foo.bar.weight", "norm.weight_scale_inv"])
def test_what_the_model_does_not_know(name: str, key: str, change: Callable[..., Path]) -> None:
    refused(name, change(name, lambda tensors: tensors.update({key: torch.ones(1)})), f"tensor {key}")


@library
def test_what_the_model_is_known_to_ignore(
    name: str, change: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from_pretrained: Any = loaders(name)[1]
    monkeypatch.setattr(from_pretrained.__self__, "_keys_to_ignore_on_load_unexpected", [r"^foo\."])
    folder = change(name, lambda tensors: tensors.update({"foo.bar.weight": torch.ones(1)}))
    for load in loaders(name):
        assert layers_of(load(folder))


@library
def test_what_the_model_needs(name: str, change: Callable[..., Path]) -> None:
    """Also where plain weights are quantized while they are loaded."""
    folder = change(name, lambda tensors: tensors.pop(KEPT[name]))
    refused(name, folder, rf"tensor {KEPT[name]} is not in the checkpoint")


@library
def test_what_the_model_needs_of_plain_weights(
    name: str, change: Callable[..., Path], request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(f"{name}_plain")
    folder = change(name, lambda tensors: tensors.pop(KEPT[name]), source)
    with pytest.raises(OmniConvertError, match=rf"tensor {KEPT[name]} is not in the checkpoint"):
        omni_convert.load(folder, quantization="int8", target="omni-convert")


@library
def test_more_than_the_model_needs_of_plain_weights(
    name: str, change: Callable[..., Path], request: pytest.FixtureRequest
) -> None:
    """Left to the library, which ignores it."""
    source = request.getfixturevalue(f"{name}_plain")
    folder = change(name, lambda tensors: tensors.update({"foo.bar.weight": torch.ones(1)}), source)
    assert layers_of(omni_convert.load(folder, quantization="int8", target="omni-convert"))


@library
def test_shapes_of_what_is_not_quantized(name: str, change: Callable[..., Path]) -> None:
    key = KEPT[name]
    folder = change(name, lambda tensors: tensors.update({key: tensors[key][:-1].contiguous()}))
    refused(name, folder, rf"tensor {key} has shape")


@library
@pytest.mark.parametrize("announced", ["mxfp8", "mxfp4"])
def test_a_format_announced_as_another(
    name: str, announced: str, request: pytest.FixtureRequest, quantize: Callable[..., Path], tmp_path: Path
) -> None:
    """Its other tensors would be dropped, and the numbers wrong."""
    source = request.getfixturevalue(f"{name}_plain")
    skip = "embed|norm|proj_out|img_in|txt_in|attention|pooler|intermediate" if name == "bert" else "embed|norm|_in|mod"
    dual = quantize(source, tmp_path / "dual", keep=skip, fmt=KINDS["mxfp4_dualscale"])
    other = quantize(source, tmp_path / "other", keep=skip, fmt=KINDS[announced])
    shutil.copy(other / "config.json", dual)
    refused(name, dual, rf"announced as {announced} but has .*(weight_dual_scale|mul_scale)")


def test_what_is_tied_or_ignored_is_fine(tmp_path: Path) -> None:
    """A head tied to the embedding is not in the file; buffers that are made anew may be."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, intermediate_size=128, tie_word_embeddings=True)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "plain")
    path = tmp_path / "plain" / "model.safetensors"
    tensors = stored(tmp_path / "plain")
    assert "lm_head.weight" not in tensors
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}, path, {"format": "pt"})
    omni_convert.convert(tmp_path / "plain", tmp_path / "out", method="int8", target="omni-convert")
    model = omni_convert.load(tmp_path / "out")
    assert layers_of(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_of_a_module_in_two_places_one_name_is_enough(tmp_path: Path) -> None:
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config

    class Twice(ModelMixin, ConfigMixin):  # type: ignore[misc]
        @register_to_config  # type: ignore[untyped-decorator]
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = torch.nn.Linear(64, 64)
            self.third = self.fourth = torch.nn.Linear(64, 64)

    Twice().bfloat16().save_config(tmp_path)
    path, fmt = tmp_path / "config.json", KINDS["int8"]
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": fmt.config(["third"])}))
    tensors = {f"first.{suffix}": value for suffix, value in fmt.quantize(torch.ones(64, 64), Facts()).items()}
    kept = {"third.weight": torch.eye(64), "first.bias": torch.ones(64), "third.bias": torch.ones(64)}
    save_file(tensors | kept, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    model = Twice.from_pretrained(tmp_path)
    assert model.first is model.second
    assert torch.equal(model.second(torch.ones(1, 64)), torch.full((1, 64), 65.0))
    assert torch.equal(model.fourth(torch.ones(1, 64)), torch.full((1, 64), 2.0))
