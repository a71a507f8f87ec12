"""What is put in the place of a linear carries on what was there; what cannot be replaced says why."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from loaded import layers_of
from torch import nn

import omni_convert
from omni_convert import OmniConvertError
from omni_convert.runtime.linear import QuantizedLinear


def test_hooks_and_notes_are_carried_over() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    seen: list[str] = []
    handles = [
        model[0].register_forward_pre_hook(lambda module, args: seen.append("before")),
        model[0].register_forward_hook(lambda module, args, output: seen.append("after")),
        model[0].register_full_backward_hook(lambda module, given, gone: seen.append("backward")),
        model[0].register_forward_hook(lambda module, args, kwargs, out: seen.append("kwargs"), with_kwargs=True),
    ]
    model[0].note = "kept"
    omni_convert.quantize_(model.eval(), "int8")
    assert (type(model[0]), model[0].note, model[0].training) == (QuantizedLinear, "kept", False)
    x = torch.randn(2, 64, requires_grad=True)
    model(x).sum().backward()
    assert seen == ["before", "after", "kwargs", "backward"]
    for handle in handles:
        handle.remove()
    copy.deepcopy(model)(x).sum().backward()
    assert len(seen) == 4


def test_a_module_in_two_places_stays_one() -> None:
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(64, 64))})
    omni_convert.quantize_(model, "int8")
    assert isinstance(model["a"], QuantizedLinear)
    assert model["b"][0] is model["a"]
    assert [layer.name for layer in omni_convert.describe(model).layers] == ["a", "b.1"]


@pytest.mark.parametrize("train", [False, True])
def test_an_encoder_layer_that_reads_its_weights_keeps_them(train: bool, caplog: pytest.LogCaptureFixture) -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 64, dropout=0.0, batch_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2), "last": nn.Linear(64, 64)}).train(train)
    x = torch.randn(1, 3, 64)
    with torch.no_grad():
        before = model["encoder"](x)
        omni_convert.quantize_(model, "int8")
        assert torch.equal(model["encoder"](x), before)
    assert layers_of(model).keys() == {"last"}
    assert "linear1 (like 3 others) stays unquantized: it is in an nn.TransformerEncoderLayer" in caplog.text
    with pytest.raises(OmniConvertError, match=r"holds no nn\.Linear"):
        omni_convert.quantize_(nn.TransformerEncoder(layer, 2), "int8")


def test_layers_with_a_forward_or_parameters_of_their_own_are_left(caplog: pytest.LogCaptureFixture) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    add_hook_to_module(model[0], ModelHook())
    nn.utils.weight_norm(model[1])  # type: ignore[no-untyped-call]
    omni_convert.quantize_(model, "int8")
    assert layers_of(model).keys() == {"2"}
    assert "0 stays unquantized: it has a forward of its own" in caplog.text
    assert "1 stays unquantized: it holds bias, weight_g, weight_v" in caplog.text


def test_a_compiled_model_compiles_again() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    compiled: Any = torch.compile(model, backend="aot_eager")
    x = torch.randn(2, 64)
    before = compiled(x)
    assert omni_convert.quantize_(compiled, "int8") is compiled
    assert layers_of(model).keys() == {"0", "2"}
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
        assert not torch.equal(compiled(x), before)


def test_a_model_of_which_a_part_is_quantized_is_not_saved(qwen_plain: Path, bert_plain: Path, tmp_path: Path) -> None:
    """Its config would not say so, or say it of the wrong names."""
    from diffusers import QwenImageTransformer2DModel
    from transformers import BertConfig, BertForMaskedLM

    qwen = QwenImageTransformer2DModel.from_pretrained(qwen_plain, torch_dtype=torch.bfloat16)
    masked = BertForMaskedLM(BertConfig.from_pretrained(bert_plain))
    for model, part in ((qwen, qwen.transformer_blocks), (masked, masked.bert)):
        model.save_pretrained(tmp_path / "plain")
        omni_convert.quantize_(part, "int8", target="omni-convert")
        with pytest.raises(OmniConvertError, match="which the model's config does not announce"):
            model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    whole = QwenImageTransformer2DModel.from_pretrained(qwen_plain, torch_dtype=torch.bfloat16)
    omni_convert.quantize_(whole, "int8").save_pretrained(tmp_path / "saved")
    assert layers_of(omni_convert.load(tmp_path / "saved")).keys() == layers_of(whole).keys()


def test_what_holds_no_layers_says_so() -> None:
    with pytest.raises(OmniConvertError, match=r"found the layer itself .Linear.*nn\.Sequential"):
        omni_convert.quantize_(nn.Linear(64, 64), "int8")

    class Pipe:
        transformer = nn.Sequential(nn.Linear(64, 64))

    with pytest.raises(OmniConvertError, match=r"found a Pipe, expected a model .*pipe\.transformer"):
        omni_convert.quantize_(Pipe(), "int8")  # type: ignore[arg-type]
