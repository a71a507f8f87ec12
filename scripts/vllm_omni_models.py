"""Whole small checkpoints for ``check_vllm_omni``, where ``tests/families.py`` writes a few matrices only.

Names and shapes are those of the parameters that the engine builds, taken apart again as the hub's checkpoints are;
the engine's own loader then says whether they are right: it loads every one of them, or stops.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 32}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}
HUNYUAN: dict[str, Any] = {
    **SIZES, "model_type": "hunyuan_image_3_moe", "architectures": ["HunyuanImage3ForCausalMM"],
    "attention_head_dim": 32, "num_experts": 2, "moe_topk": 1, "num_shared_expert": 1, "moe_intermediate_size": 64,
    "use_mixed_mlp_moe": True, "use_qk_norm": True, "vae": {"latent_channels": 4}, "vit": {}, "vit_aligner": {},
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
BAGEL: Mapping[str, dict[str, Any]] = {
    "config.json": {
        "model_type": "bagel", "architectures": ["BagelForConditionalGeneration"], "max_latent_size": 4,
        "vit_max_num_patch_per_side": 4, "connector_act": "gelu_pytorch_tanh",
    },
    "llm_config.json": SIZES,
    "vit_config.json": {**VISION, "image_size": 28, "patch_size": 14},
}  # fmt: skip
FILES: Mapping[str, Mapping[str, dict[str, Any]]] = {"HunyuanImage-3.0": {"config.json": HUNYUAN}, "BAGEL": BAGEL}


def write_configs(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in FILES[name].items():
        (folder / file).write_text(json.dumps(content))


def write_weights(folder: Path, name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """``shapes``: of the engine's parameters."""
    generator = torch.Generator().manual_seed(0)
    take_apart = {"HunyuanImage-3.0": _hunyuan, "BAGEL": _bagel}[name]
    tensors: dict[str, torch.Tensor] = {}
    for parameter, shape in shapes.items():
        for stored, part in take_apart(parameter, shape):
            tensors[stored] = (0.1 * torch.randn(part, generator=generator)).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _hunyuan(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    name = (
        name.replace("embed_tokens", "wte").replace("model.norm.", "model.ln_f.").replace("mlp.gate.", "mlp.gate.wg.")
    )
    name = name.replace("gate_up_proj", "gate_and_up_proj")
    experts = re.fullmatch(r"(.*\.experts)\.(?:routed_experts\.)?(w13|w2)_weight", name)
    if experts:
        layer = {"w13": "gate_and_up_proj", "w2": "down_proj"}[experts[2]]
        yield from ((f"{experts[1]}.{number}.{layer}.weight", shape[1:]) for number in range(shape[0]))
    else:
        yield name, shape


def _bagel(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    name = re.sub(r"norm\.gen_weight$", "norm_moe_gen.weight", name).replace("o_proj.gen_exp", "o_proj_moe_gen")
    name = name if "bagel.language_model" not in name else name.removeprefix("bagel.")
    if ".qkv_proj" in name:
        tail = "_moe_gen" if ".gen_exp" in name else ""
        name = name.replace(".gen_exp", "")
        rows = {"q": shape[0] // 2, "k": shape[0] // 4, "v": shape[0] // 4}
        for part, count in rows.items():
            yield name.replace("qkv_proj", f"{part}_proj{tail}"), (count, *shape[1:])
    elif ".gate_up_proj" in name:
        for part in ("gate_proj", "up_proj"):
            yield name.replace("gate_up_proj", part), (shape[0] // 2, *shape[1:])
    else:
        yield name.removeprefix("bagel."), shape
