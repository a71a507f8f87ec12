"""What people run into with other converters, each as a test here: one heading per complaint, then what must hold.

Complaints that other files guard:

- Scales or config keys that no engine reads, a half-filled config: ``converter/test_formats.py``,
  ``formats/test_config.py`` (the exact tensors and config of every format).
- Ignored layers spelled unlike the engine spells them; models documented as unsupported; QKV merged on disk with scales
  of another shape than the engine wants: ``test_targets.py``, ``converter/test_decide.py``.
- Merged experts skipped without a word: ``converter/test_experts.py``.
- Tensors or files lost, doubled or renamed: ``test_nothing_lost.py``, ``converter/test_convert.py``.
- A run that succeeds and writes noise: ``converter/test_verify.py``, ``test_end_to_end.py``.
- A quantized source taken for a plain one; a class that is on no list: ``converter/test_plan.py``.
- torch, a GPU or the model's code needed to convert: ``converter/test_cli.py``.
- Memory as large as the model: ``converter/test_execute.py``.
- A folder that looks whole after a kill: ``converter/test_folder.py``.
- Files that only one library's tensor classes can read: ``converter/test_convert.py``, ``converter/test_formats.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hostile.small import (
    QWEN_CONFIG,
    Tensor,
    as_stored,
    as_tensor,
    entry,
    file_bytes,
    qwen_shards,
    random,
    read_folder,
    read_json,
    read_weights,
    to_bits,
    write_json,
    write_model,
    write_sharded,
    write_weights,
)

import omni_convert
from omni_convert.formats.errors import OmniConvertError

SUFFIXES = {
    "int8": {"weight", "weight_scale"},
    "fp8": {"weight", "weight_scale"},
    "mxfp8": {"weight", "weight_scale"},
    "mxfp4": {"weight", "weight_scale"},
    "mxfp4_dualscale": {"weight", "weight_scale", "weight_dual_scale", "mul_scale"},
}


# Errors come at the end of a long run.


class Mistake(NamedTuple):
    said: str
    choices: dict[str, Any]
    damage: Callable[[Path], object] = lambda folder: None


def last_shard(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"))


def put(folder: Path, name: str, tensor: Tensor) -> None:
    """A tensor into the last shard."""
    write_weights(last_shard(folder), {**broken_shards()[-1], name: tensor})


def broken_shards() -> list[dict[str, Tensor]]:
    """The first weight that is read is not finite, which only a run finds: it must not get that far."""
    shards = [dict(part) for part in qwen_shards()]
    first = next(name for name in shards[0] if name.endswith("to_q.weight"))
    shards[0][first] = to_bits(np.full((16, 16), np.nan))
    return shards


STATIC = {"method": "fp8", "activation_scheme": "static"}
F64, F8 = Tensor("F64", np.zeros((16, 16), "<u8")), Tensor("F8_E4M3", np.zeros((8, 8), "u1"))
MISTAKES = {
    "ignored name": Mistake("img_mpl: no layer of the model matches", {"ignore": ["img_mpl"]}),
    "split group": Mistake("fuse both into", {"ignore": ["to_q"]}),
    "nothing left": Mistake("Keep less", {"ignore": ["*"]}),
    "option of another format": Mistake("granularity", {"granularity": "block"}),
    "block size": Mistake("block", {"method": "fp8", "block_size": (128, 100)}),
    "no recorded scales": Mistake("input_scale for every layer", STATIC),
    "scale of no layer": Mistake("no layer is called", STATIC | {"input_scales": {"to_x": 1.0}}),
    "unsupported class": Mistake(
        "cannot load it", {},
        lambda folder: write_json(folder / "config.json", {"_class_name": "SD3Transformer2DModel"}),
    ),
    "odd member of a group": Mistake(
        "F64", {}, lambda folder: put(folder, "transformer_blocks.1.attn.to_k.weight", F64)
    ),
    "quantized already": Mistake("already quantized", {}, lambda folder: put(folder, "b.weight", F8)),
    "missing shard": Mistake("is missing", {}, lambda folder: last_shard(folder).unlink()),
    "short shard": Mistake("bytes", {}, lambda folder: os.truncate(last_shard(folder), 3000)),
    "odd shape": Mistake(
        "expected 6 bytes", {},
        lambda folder: last_shard(folder).write_bytes(file_bytes({"a": entry("BF16", [3], 0, 4)}, b"1234")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_is_found_in_the_plan(name: str, tmp_path: Path) -> None:
    mistake = MISTAKES[name]
    source = write_sharded(tmp_path / "model", list(broken_shards()), QWEN_CONFIG)
    mistake.damage(source)
    messages = []
    for act in (omni_convert.plan, lambda *args, **choices: omni_convert.convert(*args, tmp_path / "out", **choices)):
        with pytest.raises(OmniConvertError) as caught:
            act(source, **({"method": "int8"} | mistake.choices))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert mistake.said in messages[0]
    assert not (tmp_path / "out").exists()


# Members of a fused matrix in different shards: a crash, or scales of only one of them.


@pytest.mark.parametrize("method", SUFFIXES)
def test_bytes_do_not_depend_on_how_tensors_are_spread_over_shards(method: str, tmp_path: Path) -> None:
    names = [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "to_out.0")]
    names += ["transformer_blocks.0.attn.add_k_proj", "transformer_blocks.0.attn.add_v_proj"]
    tensors = {f"{name}.weight": random(48, 64, seed=seed) for seed, name in enumerate(names)}
    together = write_model(tmp_path / "together", QWEN_CONFIG, tensors)
    apart = write_sharded(tmp_path / "apart", [{name: tensor} for name, tensor in tensors.items()], QWEN_CONFIG)
    for source in (together, apart):
        omni_convert.convert(source, source.with_suffix(".out"), method=method)
    assert read_folder(together.with_suffix(".out")) == read_folder(apart.with_suffix(".out"))
    for path in apart.with_suffix(".out").glob("*.safetensors"):
        (name,) = {name.rpartition(".weight")[0] or name.rpartition(".")[0] for name in read_weights(path)}
        assert read_weights(path).keys() == {f"{name}.{suffix}" for suffix in SUFFIXES[method]}


# The converter keeps a layer that the runtime builds quantized, or the other way round.

KEPT_LINEARS = [
    *(f"model.layers.0.mlp.{name}" for name in ("gate", "router", "router.layer", "gate.wg", "gate_inp")),
    *(f"model.layers.0.{name}" for name in ("router.proj", "block_sparse_moe.gate", "mlp.shared_expert_gate")),
    *("model.layers.61.eh_proj", "model.layers.61.shared_head.head", "mtp.fc"),
    *("lm_head", "model.embed_tokens", "visual.patch_embed.proj"),
]


@pytest.mark.parametrize("layer", KEPT_LINEARS)
def test_what_engines_build_unquantized_stays_and_is_ignored(layer: str, tmp_path: Path) -> None:
    tensors = {"model.layers.0.mlp.gate_proj.weight": random(64, 64), f"{layer}.weight": random(64, 64, seed=1)}
    source = write_model(tmp_path / "model", {"model_type": "novel"}, tensors)
    omni_convert.convert(source, tmp_path / "out", method="fp8")
    stored = read_folder(tmp_path / "out")
    assert stored.keys() == tensors.keys() | {"model.layers.0.mlp.gate_proj.weight_scale"}
    assert stored[f"{layer}.weight"] == as_stored(tensors[f"{layer}.weight"])
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert config["ignored_layers"] == [layer]


def test_what_torchs_own_attention_reads_itself_stays(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_model

    model = torch.nn.Sequential(torch.nn.MultiheadAttention(32, 2), torch.nn.Linear(32, 32))
    save_model(model, str(tmp_path / "model.safetensors"))
    omni_convert.convert(tmp_path / "model.safetensors", tmp_path / "out", method="int8")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.int8} == {"1.weight"}
    model[0].load_state_dict({name[2:]: tensor for name, tensor in stored.items() if name.startswith("0.")})
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert config["ignored_layers"] == ["0.out_proj"]


def save(kind: str, folder: Path, **options: Any) -> Path:
    """A small model of Transformers in BF16."""
    import torch
    import transformers

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads, **options)
    getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


# Tied embeddings come out untied, or with a second copy.


@pytest.mark.parametrize("both", [False, True])
def test_tied_embeddings_stay_tied(both: bool, tmp_path: Path) -> None:
    import torch

    source, out = save("Qwen3", tmp_path / "model", tie_word_embeddings=True), tmp_path / "out"
    names = read_folder(source).keys()
    assert "lm_head.weight" not in names
    if both:
        tensors = {name: as_tensor(item) for name, item in read_folder(source).items()}
        write_weights(source / "model.safetensors", tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    omni_convert.convert(source, out, method="int8")
    stored = read_folder(out)
    assert ("lm_head.weight" in stored) == both
    heads = [stored[name] for name in ("model.embed_tokens.weight", "lm_head.weight") if name in stored]
    assert all(head == read_folder(source)["model.embed_tokens.weight"] for head in heads)
    assert read_json(out / "config.json")["tie_word_embeddings"] is True
    model = omni_convert.load(out)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.lm_head.weight.dtype == torch.bfloat16


# Layers that the model's class does not know, such as heads that predict further tokens, are lost.


def test_layers_beyond_the_models_class_are_carried_along(tmp_path: Path) -> None:
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
    source, out = save("Glm4Moe", tmp_path / "model", **experts, n_group=1, topk_group=1), tmp_path / "out"
    names = ["enorm", "eh_proj", "self_attn.q_proj", "mlp.experts.0.up_proj", "shared_head.head"]
    extra = {f"model.layers.92.{name}.weight": random(32, 64, seed=seed) for seed, name in enumerate(names)}
    tensors = {name: as_tensor(item) for name, item in read_folder(source).items()}
    write_weights(source / "model.safetensors", tensors | extra)
    omni_convert.convert(source, out, method="int8")
    stored = read_folder(out)
    assert stored.keys() >= tensors.keys() | extra.keys()
    for name, tensor in extra.items():
        quantized = name == "model.layers.92.self_attn.q_proj.weight"
        assert (stored[name] != as_stored(tensor)) == quantized == (f"{name}_scale" in stored)
    assert omni_convert.load(out).config.num_hidden_layers == 2


# A "quantized" checkpoint loads and runs at the size and speed of the original.


@pytest.mark.parametrize("kind", ["Qwen3", "GptOss"])
def test_quantization_is_really_applied(kind: str, tmp_path: Path) -> None:
    import torch
    import transformers

    experts = {"num_local_experts": 2, "num_experts_per_tok": 1} if kind == "GptOss" else {}
    source, out = save(kind, tmp_path / "model", **experts), tmp_path / "out"
    report = omni_convert.convert(source, out, method="int8")
    quantized = {name.removesuffix("_scale") for name in read_folder(out) if name.endswith("weight_scale")}
    assert len(quantized) == report.layers == 2 * (4 if kind == "GptOss" else 7)
    before, after = read_folder(source), read_folder(out)
    assert all(len(after[name].data) * 2 == len(before[name].data) for name in quantized)
    assert read_json(out / "config.json")["quantization_config"]["is_checkpoint_int8_serialized"] is True
    loaded = omni_convert.load(out)
    weights = {name for name, tensor in loaded.state_dict().items() if tensor.dtype == torch.int8}
    assert weights == quantized
    assert not any(type(loaded.get_submodule(name.removesuffix(".weight"))) is torch.nn.Linear for name in quantized)
    model = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(source, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected, found = (each(torch.arange(8).view(1, -1)).logits.float() for each in (model, loaded))
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()
