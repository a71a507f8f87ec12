"""Model families without a table: what is converted by name must also load and run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import omni_convert
from omni_convert.formats.errors import OmniConvertError

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **HEADS))


def qwen3_tied() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, **HEADS, tie_word_embeddings=True))


def qwen3_moe() -> Any:
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SMALL, **HEADS, **EXPERTS))


def mamba() -> Any:
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config)


def t5() -> Any:
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    return transformers.T5EncoderModel(config)


@pytest.mark.parametrize("build", [llama, qwen3_tied, qwen3_moe, mamba, t5])
def test_family_converts_loads_and_runs(build: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build().eval().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    report = omni_convert.convert(tmp_path / "model", tmp_path / "out", method="int8")
    assert report.layers
    loaded = omni_convert.load(tmp_path / "out")
    tokens = torch.arange(12).view(1, -1)
    with torch.inference_mode():
        before, after = (m(tokens)[0].float() for m in (model, loaded))
    assert torch.cosine_similarity(before.flatten(), after.flatten(), dim=0) > 0.98


def test_conv1d_models_are_refused(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    with pytest.raises(OmniConvertError, match="not a quantizable linear of GPT-2"):
        omni_convert.convert(tmp_path / "model", tmp_path / "out", method="int8")
