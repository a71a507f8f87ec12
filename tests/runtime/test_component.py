"""What can be wrong with a checkpoint is found from headers, and the message says where and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from omni_convert.formats.config import QuantizationConfig
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.header import TensorSpec
from omni_convert.formats.int8 import Int8
from omni_convert.runtime.component import quantized_layers, read_component
from omni_convert.runtime.linear import QuantizedLinear
from omni_convert.runtime.replace import replace_linears

GOOD = {
    "a.weight": TensorSpec("I8", (6, 4)),
    "a.weight_scale": TensorSpec("F32", (6, 1)),
    "a.bias": TensorSpec("BF16", (6,)),
    "b.weight": TensorSpec("BF16", (6, 4)),
}
CONFIG = QuantizationConfig(format=Int8(), ignored_layers=("b", "fused.nonsense"))


def test_the_tensors_decide() -> None:
    assert quantized_layers(GOOD, CONFIG, "here") == {"a": (6, 4)}
    assert quantized_layers(GOOD, QuantizationConfig(format=Int8()), "here") == {"a": (6, 4)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.weight_scale": None}, "tensor a.weight is I8 without a.weight_scale"),
        ({"a.weight": None}, "layer a has a scale but no a.weight"),
        ({"a.weight": TensorSpec("BF16", (6, 4))}, r"a.weight is BF16 \(6, 4\), expected I8 \(6, 4\)"),
        ({"a.weight": TensorSpec("I8", (6,))}, "int8 needs a 2-D weight"),
        ({"a.weight": TensorSpec("I8", (5, 4))}, r"a.weight_scale is F32 \(6, 1\), expected F32 \(5, 1\)"),
        ({"a.weight_scale": TensorSpec("F32", (6,))}, r"a.weight_scale is F32 \(6,\), expected F32 \(6, 1\)"),
        ({"a.weight_scale": TensorSpec("BF16", (6, 1))}, r"a.weight_scale is BF16 \(6, 1\), expected F32"),
        ({"a.bias": TensorSpec("I64", (6,))}, r"a.bias is I64 \(6,\), expected one of .*BF16.* and \(6,\)"),
        ({"a.bias": TensorSpec("BF16", (1,))}, r"a.bias is BF16 \(1,\), expected one of .* and \(6,\)"),
        ({"b.weight": TensorSpec("I8", (6, 4))}, "tensor b.weight is I8 without b.weight_scale"),
        ({"b.weight_scale": TensorSpec("F32", (6, 1))}, "layer b is in ignored_layers but has b.weight_scale"),
        ({"a.zero_point": TensorSpec("F32", (6,))}, "layer a is announced as int8 but has a.zero_point"),
        ({"b.input_scale": TensorSpec("F32", ())}, "found tensor b.input_scale, .* layer b is not quantized"),
        ({"b.weight_scale_inv": TensorSpec("F32", (1, 1))}, "found tensor b.weight_scale_inv, .* not quantized"),
        ({"a.lora_A.weight": TensorSpec("F32", (1, 4))}, "found tensor a.lora_A.weight within layer a, "),
        ({"b.weight": TensorSpec("U8", (6, 4))}, "tensor b.weight is U8 without b.weight_scale"),
        ({"a.weight": None, "a.weight_scale": None}, "announces int8, but no tensor ends with .weight_scale"),
    ],
)
def test_contradictions_are_named(change: dict[str, TensorSpec | None], message: str) -> None:
    tensors = {name: spec for name, spec in {**GOOD, **change}.items() if spec is not None}
    with pytest.raises(OmniConvertError, match=message) as caught:
        quantized_layers(tensors, CONFIG, "here")
    assert str(caught.value).startswith("here: ")


class Model(nn.Module):
    def __init__(self, a: nn.Module) -> None:
        super().__init__()
        self.a = a
        self.b = nn.Linear(4, 6)


def test_replaces_what_is_quantized_and_nothing_else() -> None:
    model = Model(nn.Linear(4, 6, dtype=torch.bfloat16, device="meta")).eval()
    assert replace_linears(model, GOOD, CONFIG) == {"a": "a"}
    assert isinstance(model.a, QuantizedLinear)
    assert (model.a.weight.device.type, model.a.bias.dtype, model.a.training) == ("meta", torch.bfloat16, False)
    assert type(model.b) is nn.Linear


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(5, 6), r"a.weight has shape \(6, 4\), but module a expects \(6, 5\)"),
        (nn.Embedding(6, 4), "module a is a Embedding, expected nn.Linear"),
        (nn.modules.linear.NonDynamicallyQuantizableLinear(4, 6), "NonDynamicallyQuantizableLinear, expected"),
    ],
)
def test_wrong_module_is_named(module: nn.Module, message: str) -> None:
    with pytest.raises(OmniConvertError, match=message):
        replace_linears(Model(module), GOOD, CONFIG)


def test_missing_module_and_bias_are_named() -> None:
    with pytest.raises(OmniConvertError, match="quantized layer a, but the model has no module x"):
        replace_linears(Model(nn.Linear(4, 6)), GOOD, CONFIG, {"a": "x"})
    tensors = {name: spec for name, spec in GOOD.items() if name != "a.bias"}
    with pytest.raises(OmniConvertError, match=r"tensor a\.bias is not in the checkpoint"):
        replace_linears(Model(nn.Linear(4, 6)), tensors, CONFIG)
    replace_linears(Model(nn.Linear(4, 6, bias=False)), tensors, CONFIG)


def test_reads_a_sharded_component(qwen: Path) -> None:
    component = read_component(qwen)
    assert component.quantization is not None
    assert component.kept_dtype == "BF16"
    assert len(list(qwen.glob("*.safetensors"))) > 1
    assert component.tensors["transformer_blocks.0.attn.to_q.weight_scale"] == TensorSpec("F32", (64, 1))


def _edit_json(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = next(folder.glob(name))
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return edit


def _set(*keys: str, value: object) -> Callable[[dict[str, Any]], object]:
    def change(data: dict[str, Any]) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


def _first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def _drop_scale(folder: Path) -> None:
    shard = _first_shard(folder)
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("_scale"))
    save_file({key: value for key, value in tensors.items() if key != name}, shard)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "found no config.json"),
    "config not json": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "found a JSON list"),
    "method": (_edit_json("config.json", _set("quantization_config", "quant_method", value="int9")), "'int9'"),
    "flag": (
        _edit_json("config.json", _set("quantization_config", "is_checkpoint_int8_serialized", value=False)),
        "is_checkpoint_int8_serialized is False, but the tensors are quantized .*, so the config is wrong",
    ),
    "extra key": (_edit_json("config.json", _set("quantization_config", "producer", value="x")), "producer='x'"),
    "entry a string": (_edit_json("config.json", _set("quantization_config", value="int8")), "expected an object"),
    "missing shard": (lambda f: _first_shard(f).unlink(), "is missing, expected a file because"),
    "truncated shard": (lambda f: _first_shard(f).write_bytes(_first_shard(f).read_bytes()[:-1]), "truncated"),
    "missing scale": (_drop_scale, "places tensor .*_scale in"),
    "stale single file": (
        lambda f: shutil.copy(_first_shard(f), f / "diffusion_pytorch_model.safetensors"), "Remove the stale one",
    ),
    "path in index": (_edit_json("*.index.json", _set("weight_map", "x", value="../x.safetensors")), "plain name"),
    "no weight map": (_edit_json("*.index.json", _set("weight_map", value={})), "found no weight_map"),
    "no weights": (lambda f: next(f.glob("*.index.json")).unlink(), "but no index"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folders_are_refused(name: str, qwen: Path, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    folder = Path(shutil.copytree(qwen, tmp_path / "transformer"))
    damage(folder)
    with pytest.raises(OmniConvertError, match=message):
        read_component(folder)


def test_plain_weights_with_a_config_of_online_quantization(qwen_plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen_plain, tmp_path / "transformer"))
    entry = {"quant_method": "int8", "is_checkpoint_int8_serialized": False}
    _edit_json("config.json", _set("quantization_config", value=entry))(folder)
    component = read_component(folder)
    assert (component.online, component.quantization, component.kept_dtype) == (entry, None, "BF16")
    _edit_json("config.json", _set("quantization_config", value={"method": "int8"}))(folder)
    with pytest.raises(OmniConvertError, match="found the key method, expected quant_method"):
        read_component(folder)


def test_a_tensor_in_two_shards_is_refused(qwen: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen, tmp_path / "transformer"))
    shards = sorted(folder.glob("*.safetensors"))
    save_file({**load_file(shards[0]), **load_file(shards[1])}, shards[0])
    with pytest.raises(OmniConvertError, match="expected it once"):
        read_component(folder)
