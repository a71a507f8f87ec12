"""What else people do with a model of Diffusers or Transformers, in every format: copy, cast, move, compile, train."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import KINDS
from loaded import assert_holds, assert_saves_same, dequantized, layers_of, run
from torch import nn

import omni_convert

BF16 = torch.bfloat16
Duplicate = Callable[[nn.Module], nn.Module]


def float32(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.float() if isinstance(v, torch.Tensor) and v.dtype == BF16 else v for k, v in inputs.items()}


def test_output_is_that_of_the_dequantized_model(qwen_kind: Path, kind: str, qwen_inputs: dict[str, Any]) -> None:
    model = omni_convert.load(qwen_kind, dtype=torch.float32)
    found, expected = (run(m, float32(qwen_inputs)) for m in (model, dequantized(model)))
    assert (found - expected).norm() / expected.norm() < (0.02 if kind == "int8" else 1e-5)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(
    model: Any, bert_model: Any, qwen_kind: Path, bert_kind: Path, duplicate: Duplicate,
    qwen_inputs: dict[str, Any], bert_inputs: dict[str, Any], tmp_path: Path,
) -> None:  # fmt: skip
    for original, inputs, folder in ((model, qwen_inputs, qwen_kind), (bert_model, bert_inputs, bert_kind)):
        other = duplicate(original)
        assert torch.equal(run(other, inputs), run(original, inputs))
        assert_holds(other, folder)
        assert_saves_same(other, folder, tmp_path / folder.name)


def test_moving_changes_nothing(model: Any, bert_model: Any, qwen_kind: Path, bert_kind: Path) -> None:
    for loaded, folder in ((model, qwen_kind), (bert_model, bert_kind)):
        loaded.to("cpu").to(torch.device("cpu"))
        assert_holds(loaded, folder)
        dtypes = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
        moved = loaded.to("meta")
        assert {name: tensor.dtype for name, tensor in moved.state_dict().items()} == dtypes


def test_the_dtype_of_a_model_is_that_of_its_activations(model: Any, bert_model: Any) -> None:
    """Also of each part: libraries cast activations to it."""
    for loaded in (model, bert_model):
        assert loaded.dtype == BF16
        for layer in layers_of(loaded).values():
            assert not layer.weight.is_floating_point()
            assert layer.weight.dtype == torch.int8  # which T5 and Wan know as quantized


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_casting_parts_leaves_codes_and_scales_alone(model: Any, qwen_kind: Path, dtype: torch.dtype) -> None:
    """Diffusers refuses to cast the whole."""
    with pytest.raises(ValueError, match="dtype"):
        model.to(dtype)
    model.transformer_blocks.to(dtype)
    assert_holds(model, qwen_kind)
    assert model.transformer_blocks[0].attn.to_q.bias.dtype == dtype


def test_layerwise_casting_leaves_codes_and_scales_alone(
    model: Any, qwen_kind: Path, qwen_inputs: dict[str, Any]
) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=BF16)
    assert run(model, qwen_inputs).isfinite().all()
    for layer in layers_of(model).values():
        assert layer.weight.dtype == torch.int8
        for suffix, tensor in layer.tensors().items():
            assert tensor.dtype == layer.stored_tensors()[suffix][0]


def test_compiles_without_breaks(model: Any, qwen_inputs: dict[str, Any]) -> None:
    """Inductor compiles single layers of every format in ``test_linear``; a model takes it a minute."""
    torch._dynamo.reset()
    expected = run(model, qwen_inputs)
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = run(model, qwen_inputs)
    assert torch.allclose(found, expected, rtol=0.05, atol=0.05)


def test_compiles_for_transformers(bert_model: Any, bert_inputs: dict[str, torch.Tensor]) -> None:
    torch._dynamo.reset()
    expected = run(bert_model, bert_inputs)
    bert_model.compile(backend="aot_eager")
    assert torch.allclose(run(bert_model, bert_inputs), expected, rtol=0.05, atol=0.05)


def test_gradients_reach_the_activations(qwen_kind: Path, kind: str, qwen_inputs: dict[str, Any]) -> None:
    model = omni_convert.load(qwen_kind, dtype=torch.float32)
    model.requires_grad_(False)
    gradients = []
    for each in (model, dequantized(model)):
        inputs = float32(qwen_inputs)
        inputs["hidden_states"].requires_grad_()
        each(**inputs)[0].square().sum().backward()
        gradients.append(inputs["hidden_states"].grad)
    found, expected = gradients
    assert (found - expected).norm() / expected.norm() < (0.05 if kind == "int8" else 1e-4)


def test_gradient_checkpointing(model: Any, qwen_inputs: dict[str, Any]) -> None:
    gradients = []
    for _ in range(2):
        inputs = {**qwen_inputs, "hidden_states": qwen_inputs["hidden_states"].clone().requires_grad_()}
        model.train()(**inputs)[0].sum().backward()
        gradients.append(inputs["hidden_states"].grad)
        model.enable_gradient_checkpointing()
    assert torch.equal(*gradients)


def test_the_grad_flag_of_codes_stays_off(model: Any, bert_model: Any) -> None:
    """``requires_grad_`` of a model asks for gradients of all floating-point parameters."""
    for loaded in (model, bert_model):
        for layer in layers_of(loaded).values():
            assert not layer.weight.requires_grad
            with pytest.raises(RuntimeError, match="floating point"):
                layer.weight.requires_grad_()


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_t5_does_not_cast_activations_to_codes(
    kind: str, tmp_path: Path, quantize: Callable[..., Path], dtype: torch.dtype
) -> None:
    """It casts what enters ``wo`` to the dtype of its weight, unless that is int8, and keeps ``wo`` in float32."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        architectures=["T5EncoderModel"],
    )  # fmt: skip
    T5EncoderModel(config).to(BF16).save_pretrained(tmp_path / "plain")
    keep = "shared|embed|layer_norm|relative_attention_bias"
    folder = quantize(tmp_path / "plain", tmp_path / "t5", keep=keep, fmt=KINDS[kind])
    model = omni_convert.load(folder, dtype=dtype)
    assert_holds(model, folder)
    ids = torch.arange(8)[None]
    found, expected = (run(m, {"input_ids": ids}).float() for m in (model, dequantized(model)))
    assert (found - expected).norm() / expected.norm() < 0.03
