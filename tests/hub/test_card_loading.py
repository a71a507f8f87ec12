"""How a card says that a model is loaded: whatever it promises must work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hostile.small import QWEN_CONFIG, qwen_shards, random, write_json, write_pipeline, write_sharded, write_weights

import omni_convert
from omni_convert.formats.layout import read_json
from omni_convert.hub.card import base_of, make_card

_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class MyOwnConfig(PretrainedConfig):
    model_type = "myown"

class MyOwnForCausalLM(PreTrainedModel):
    config_class = MyOwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.up_proj = torch.nn.Linear(64, 64, bias=False)
        self.post_init()

    def forward(self, x):
        return self.up_proj(x)
"""


def card(source: Path, repo_id: str = "me/x", **choices: Any) -> str:
    """Of a conversion that is made beside the source."""
    out = source.with_name(f"{source.name}-out")
    omni_convert.convert(source, out, **choices)
    return make_card(out, repo_id, base=base_of(read_json(out / "omni_convert.json"), None))


def how(text: str) -> str:
    """The section on loading."""
    return text.partition("## How to load it")[2].partition("## How it was made")[0]


def test_what_the_plan_warned_of_is_said(tmp_path: Path) -> None:
    tensors = {"model.layers.0.self_attn.q_proj.weight": random(64, 64)}
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    source = write_sharded(tmp_path / "model", [tensors], config, stem="model")
    (warning,) = omni_convert.plan(source, method="int8").warnings
    text = how(card(source, method="int8"))
    assert "It is not known which layers vLLM-Omni can run quantized (class: Qwen3ForCausalLM), so it may not" in text
    assert text.partition("It is ")[2][:100] == warning.partition("it is ")[2][:100]
    assert "wrong on CUDA" in text
    assert "vllm serve" not in text
    assert "without more" not in text
    assert 'Qwen3ForCausalLM.from_pretrained("me/x"' in text


def test_a_condition_is_said(tmp_path: Path) -> None:
    tensors = {"model.layers.0.self_attn.o_proj.weight": random(64, 64)}
    source = write_sharded(tmp_path / "model", [tensors], {"model_type": "hunyuan_image_3_moe"}, stem="model")
    text = how(card(source, method="int8"))
    assert "diffusion stage alone can read this method" in text
    assert "without more" not in text


def test_scales_of_every_row_are_for_npus(tmp_path: Path) -> None:
    source = write_pipeline(tmp_path / "model")
    text = how(card(source, method="int8", fused_scale="per-channel"))
    assert "vLLM-Omni, which loads it on Ascend NPU without more" in text
    assert "CUDA" not in text
    text = how(card(write_pipeline(tmp_path / "other"), method="int8"))
    assert "vLLM-Omni, which loads it on CUDA and Ascend NPU without more" in text
    assert "vllm serve me/x --omni" in text


def test_a_component_is_not_served_alone(tmp_path: Path) -> None:
    text = how(card(write_sharded(tmp_path / "model", qwen_shards(), QWEN_CONFIG), method="int8"))
    assert "It is one component of a pipeline" in text
    assert "vllm serve" not in text
    assert 'QwenImageTransformer2DModel.from_pretrained("me/x", torch_dtype=torch.bfloat16)' in text
    assert 'omni_convert.load("me/x")' in text


@pytest.mark.parametrize("target", ["vllm-omni", "omni-convert"])
def test_weights_alone_are_loaded_by_nothing(tmp_path: Path, target: str) -> None:
    source = write_weights(tmp_path / "alice" / "mine.safetensors", {"blocks.0.up.weight": random(32, 32)})
    text = card(source, method="int8", target=target)
    assert "This is `mine.safetensors` with its weights in **int8" in text
    assert "alice" not in text
    assert "These are weights alone" in text
    assert "```" not in how(text)
    assert "without more" not in text


def test_a_class_that_the_library_lacks_is_not_named(tmp_path: Path) -> None:
    tensors = {"model.layers.0.mlp.up_proj.weight": random(64, 64)}
    config = {"architectures": ["MyOwnForCausalLM"], "model_type": "myown"}
    text = how(card(write_sharded(tmp_path / "model", [tensors], config, stem="model"), method="int8"))
    assert "Transformers has no class `MyOwnForCausalLM`" in text
    assert "```" not in text
    source = write_pipeline(tmp_path / "pipeline")
    write_json(source / "model_index.json", read_json(source / "model_index.json") | {"_class_name": "MyPipeline"})
    text = how(card(source, method="int8"))
    assert "Diffusers has no class `MyPipeline`" in text
    assert "from_pretrained" not in text
    assert "omni_convert.load" not in text


def test_a_model_with_code_of_its_own_is_loaded_as_the_card_says(tmp_path: Path) -> None:
    config = {"architectures": ["MyOwnForCausalLM"], "model_type": "myown", "dtype": "bfloat16"}
    config |= {"auto_map": {"AutoConfig": "mine.MyOwnConfig", "AutoModelForCausalLM": "mine.MyOwnForCausalLM"}}
    source = write_sharded(tmp_path / "model", [{"up_proj.weight": random(64, 64)}], config, stem="model")
    (source / "mine.py").write_text(_CODE)
    text = how(card(source, repo_id=str(tmp_path / "model-out"), method="int8"))
    assert "MyOwnForCausalLM" not in text.partition("```python")[2]
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    check = (
        "print(type(model).__name__, type(model.up_proj).__name__, model.up_proj(torch.ones(1, 64).bfloat16()).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", snippet + check],
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["MyOwnForCausalLM QuantizedLinear torch.Size([1, 64])"], done.stderr
