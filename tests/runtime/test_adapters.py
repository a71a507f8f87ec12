"""LoRA through PEFT on quantized models of both libraries, in every format; what would change the weight is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loaded import assert_holds, dequantized, layers_of, run
from torch import nn

import omni_convert
from omni_convert import OmniConvertError

pytest.importorskip("peft")
Inputs = dict[str, Any]


def lora(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "net.2", "query", "value"], **options)


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, value) for name, value in model.named_parameters() if value.requires_grad)


def train_a_step(model: Any, inputs: Inputs) -> None:
    optimizer = torch.optim.SGD([value for _, value in trainable(model)], lr=0.1)
    output = model.train()(**inputs)[0].float()
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    optimizer.step()
    model.eval()


def check_training(model: Any, inputs: Inputs, before: torch.Tensor, folder: Path) -> None:
    """Adapters are attached: in float32, without effect until they are trained, and nothing else is trained."""
    parameters = dict(trainable(model))
    assert parameters
    assert all("lora_" in name and value.dtype == torch.float32 for name, value in parameters.items())
    assert torch.equal(run(model, inputs), before)
    codes = {name: layer.weight.clone() for name, layer in layers_of(model).items()}
    train_a_step(model, inputs)
    assert not torch.equal(run(model, inputs), before)
    assert all(torch.equal(layer.weight, codes[name]) for name, layer in layers_of(model).items())


def test_diffusers_adapter(model: Any, qwen_kind: Path, qwen_inputs: Inputs) -> None:
    """(``save_lora_adapter`` of Diffusers casts the model, and therefore refuses every quantized one.)"""
    from peft import get_peft_model_state_dict

    before = run(model, qwen_inputs)
    model.add_adapter(lora())
    check_training(model, qwen_inputs, before, qwen_kind)
    trained = run(model, qwen_inputs)
    model.disable_adapters()
    assert torch.equal(run(model, qwen_inputs), before)
    model.enable_adapters()
    assert torch.equal(run(model, qwen_inputs), trained)
    weights = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    config = model.peft_config["default"].to_dict()
    model.unload_lora()
    assert_holds(model, qwen_kind)
    assert torch.equal(run(model, qwen_inputs), before)
    model.load_lora_adapter(weights, prefix=None, metadata=config)
    assert torch.equal(run(model, qwen_inputs), trained)


def test_peft_model(bert_model: Any, bert_kind: Path, bert_inputs: Inputs) -> None:
    from peft import get_peft_model

    before = run(bert_model, bert_inputs)
    adapted = get_peft_model(bert_model, lora())
    check_training(adapted, bert_inputs, before, bert_kind)
    with adapted.disable_adapter():
        assert torch.equal(run(adapted, bert_inputs), before)
    unloaded = adapted.unload()
    assert_holds(unloaded, bert_kind)
    assert torch.equal(run(unloaded, bert_inputs), before)


def test_transformers_adapter(bert_model: Any, bert_kind: Path, bert_inputs: Inputs, tmp_path: Path) -> None:
    before = run(bert_model, bert_inputs)
    bert_model.add_adapter(lora())
    check_training(bert_model, bert_inputs, before, bert_kind)
    trained = run(bert_model, bert_inputs)
    bert_model.save_pretrained(tmp_path)
    other = omni_convert.load(bert_kind)
    other.load_adapter(str(tmp_path))
    assert torch.equal(run(other, bert_inputs), trained)
    bert_model.delete_adapter("default")
    assert torch.equal(run(bert_model, bert_inputs), before)


@pytest.mark.parametrize("kind", ["int8", "fp8 block", "mxfp4_dualscale"], indirect=True)
def test_an_adapter_compiles_and_offloads(model: Any, qwen_inputs: Inputs) -> None:
    from diffusers.hooks import apply_group_offloading

    model.add_adapter(lora(init_lora_weights=False))
    expected = run(model, qwen_inputs)
    cpu = torch.device("cpu")
    for offload in (False, True):
        torch._dynamo.reset()
        if offload:
            apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
        for block in model.transformer_blocks:
            block.compile(fullgraph=not offload, backend="aot_eager")
        assert torch.allclose(run(model, qwen_inputs), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_refused(model: Any, bert_model: Any, qwen_kind: Path, qwen_inputs: Inputs, safe: bool) -> None:
    """PEFT would add to the codes as if they were weights; ``safe``, rounded to whole codes and without an error."""
    from peft import get_peft_model

    message = "merged into an? .* layer, whose weight is held as codes"
    model.add_adapter(lora(init_lora_weights=False))
    before = run(model, qwen_inputs)
    with pytest.raises(OmniConvertError, match=message):
        model.fuse_lora(safe_fusing=safe)
    assert torch.equal(run(model, qwen_inputs), before)
    model.unload_lora()
    assert_holds(model, qwen_kind)
    with pytest.raises(OmniConvertError, match=message):
        get_peft_model(bert_model, lora()).merge_and_unload(safe_merge=safe)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_adapters_do_what_they_do_to_the_dequantized_model(
    bert_kind: Path, kind: str, bert_inputs: Inputs, options: dict[str, Any]
) -> None:
    """DoRA compares the norm of the weight with what it was at first, so it shows what it takes for the weight."""
    from peft import get_peft_model

    model = omni_convert.load(bert_kind, dtype=torch.float32)
    outputs = []
    for each in (model, dequantized(model)):
        torch.manual_seed(0)
        adapted = get_peft_model(each, lora(init_lora_weights=False, **options))
        with torch.no_grad():
            for value in (value for name, value in adapted.named_parameters() if "lora_B" in name):
                value.mul_(2)
        outputs.append(run(adapted, bert_inputs))
    assert (outputs[0] - outputs[1]).norm() / outputs[1].norm() < (0.05 if kind == "int8" else 1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_initializations_that_change_the_weight_fail(bert_model: Any, init: str) -> None:
    """PEFT's own errors, for weights that are not floating-point numbers."""
    from peft import get_peft_model

    with pytest.raises((TypeError, RuntimeError), match=r"Unsupported data type|Please initialize|floating point"):
        get_peft_model(bert_model, lora(init_lora_weights=init))


def other_methods() -> dict[str, Any]:
    import peft

    targets = ["query", "value"]
    return {
        "ADALORA": peft.AdaLoraConfig(target_modules=targets, total_step=10, init_r=4, init_lora_weights=False),
        "IA3": peft.IA3Config(target_modules=targets, feedforward_modules=[], init_ia3_weights=False),
        "OFT": peft.OFTConfig(target_modules=targets, oft_block_size=32),
        "BOFT": peft.BOFTConfig(target_modules=targets, boft_block_size=4),
        "HRA": peft.HRAConfig(target_modules=targets),
        "LOHA": peft.LoHaConfig(target_modules=targets),
        "VERA": peft.VeraConfig(target_modules=targets),
    }


@pytest.mark.parametrize("method", ["ADALORA", "IA3", "OFT", "BOFT", "HRA", "LOHA", "VERA"])
def test_other_methods_are_right_or_refused(bert_kind: Path, kind: str, bert_inputs: Inputs, method: str) -> None:
    """Some read the weight, and would compute with codes."""
    from peft import get_peft_model

    model, config = omni_convert.load(bert_kind, dtype=torch.float32), other_methods()[method]
    plain = dequantized(model)
    if method not in ("ADALORA", "IA3"):
        with pytest.raises(OmniConvertError, match=f"a {method} adapter .* expected one of LORA"):
            get_peft_model(model, config)
        return
    outputs = []
    for each in (model, plain):
        torch.manual_seed(0)
        outputs.append(run(get_peft_model(each, config), bert_inputs))
    assert (outputs[0] - outputs[1]).norm() / outputs[1].norm() < (0.05 if kind == "int8" else 1e-5)


def test_parts_of_layers_take_no_adapters(qwen: Path) -> None:
    part = omni_convert.load(qwen, tp_rank=0, tp_size=2)
    with pytest.raises(OmniConvertError, match="of which this process holds a part"):
        part.add_adapter(lora())
