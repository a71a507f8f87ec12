"""Which weights are linears: the tables against the libraries' own models, and the heuristic for the rest."""

from __future__ import annotations

import pytest
from hostile.small import read_weights

from omni_convert.formats.architectures import ARCHITECTURES, Architecture, find_architecture, guess_role

QWEN, Z_IMAGE, BERT = (
    ARCHITECTURES[name] for name in ("QwenImageTransformer2DModel", "ZImageTransformer2DModel", "BERT")
)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"_class_name": "QwenImageTransformer2DModel"}, QWEN),
        ({"_class_name": "ZImageTransformer2DModel"}, Z_IMAGE),
        ({"model_type": "bert", "architectures": ["BertModel"]}, BERT),
        ({"_class_name": "BertModel"}, None),
        ({"model_type": "roberta"}, None),
        ({"_class_name": ["QwenImageTransformer2DModel"]}, None),
        ({}, None),
    ],
    ids=str,
)
def test_table_is_found_by_class(config: dict[str, object], expected: Architecture | None) -> None:
    assert find_architecture(config, ["transformer_blocks.0.attn.to_q"]) is expected


@pytest.mark.parametrize(
    ("table", "layer", "is_linear"),
    [
        (QWEN, "transformer_blocks.0.attn.to_q", True),
        (QWEN, "transformer_blocks.59.attn.add_v_proj", True),
        (QWEN, "transformer_blocks.7.attn.to_out.0", True),
        (QWEN, "transformer_blocks.7.img_mlp.net.0.proj", True),
        (QWEN, "transformer_blocks.7.txt_mlp.net.2", True),
        (QWEN, "transformer_blocks.7.img_mod.1", False),
        (QWEN, "transformer_blocks.7.attn.norm_q", False),
        (QWEN, "transformer_blocks.x.attn.to_q", False),
        (QWEN, "other.transformer_blocks.0.attn.to_q", False),
        (QWEN, "transformer_blocks.0.attn.to_q.lora", False),
        (QWEN, "img_in", False),
        (QWEN, "proj_out", False),
        (Z_IMAGE, "layers.3.attention.to_v", True),
        (Z_IMAGE, "noise_refiner.0.feed_forward.w2", True),
        (Z_IMAGE, "context_refiner.1.feed_forward.w1", True),
        (Z_IMAGE, "layers.3.adaLN_modulation.0", False),
        (Z_IMAGE, "cap_embedder.1", False),
        (BERT, "encoder.layer.11.attention.self.query", True),
        (BERT, "bert.encoder.layer.0.output.dense", True),
        (BERT, "embeddings.word_embeddings", False),
        (BERT, "pooler.dense", False),
    ],
)
def test_table(table: Architecture, layer: str, is_linear: bool) -> None:
    role = table.role(layer, "no method")
    assert role.is_linear == is_linear
    assert table.name in role.reason


@pytest.mark.parametrize("table", ARCHITECTURES.values(), ids=lambda table: table.name)
def test_sensitive_layers_are_linears_that_a_method_leaves_alone(table: Architecture) -> None:
    for method, layers in table.sensitive.items():
        for layer in layers:
            name = f"{table.blocks[0]}.{layer}".replace("N", "0")
            assert table.role(name, "no method").is_linear
            role = table.role(name, method)
            assert not role.is_linear
            assert method in role.reason


@pytest.mark.parametrize(
    ("table", "layer", "name", "members"),
    [
        (QWEN, "transformer_blocks.2.attn.to_k", "transformer_blocks.2.attn.to_qkv", ("to_q", "to_k", "to_v")),
        (
            QWEN,
            "transformer_blocks.2.attn.add_q_proj",
            "transformer_blocks.2.attn.add_kv_proj",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
        ),
        (Z_IMAGE, "layers.2.attention.to_q", "layers.2.attention.to_qkv", ("to_q", "to_k", "to_v")),
        (Z_IMAGE, "layers.2.feed_forward.w3", "layers.2.feed_forward.w13", ("w1", "w3")),
    ],
)
def test_fused_groups(table: Architecture, layer: str, name: str, members: tuple[str, ...]) -> None:
    parent = name.rpartition(".")[0]
    assert table.group(layer) == (name, tuple(f"{parent}.{member}" for member in members))


@pytest.mark.parametrize(
    ("table", "layer"),
    [
        (QWEN, "transformer_blocks.2.attn.to_out.0"),
        (QWEN, "transformer_blocks.2.attn.to_qkv"),
        (QWEN, "img_in"),
        (Z_IMAGE, "layers.2.feed_forward.w2"),
        (BERT, "encoder.layer.0.attention.self.query"),
    ],
)
def test_layers_that_no_engine_fuses(table: Architecture, layer: str) -> None:
    assert table.group(layer) is None


@pytest.mark.parametrize(("fixture", "table", "count"), [("qwen_image", QWEN, 12 * 3), ("z_image", Z_IMAGE, 7 * 4)])
def test_table_fits_the_real_model(
    request: pytest.FixtureRequest, fixture: str, table: Architecture, count: int
) -> None:
    folder = request.getfixturevalue(fixture) / "transformer"
    stored = {name: item for path in folder.glob("*.safetensors") for name, item in read_weights(path).items()}
    layers = {name.removesuffix(".weight") for name in stored if name.endswith(".weight")}
    linears = {layer for layer in layers if table.role(layer, "int8").is_linear}
    assert len(linears) == count
    assert all(len(stored[f"{layer}.weight"].shape) == 2 for layer in linears)
    for layer in linears:
        group = table.group(layer)
        assert group is None or linears.issuperset(group[1])


def test_table_fits_the_trained_bert(minilm: object) -> None:
    from safetensors import safe_open

    with safe_open(f"{minilm}/model.safetensors", "np") as file:
        layers = [name.removesuffix(".weight") for name in file.keys() if name.endswith(".weight")]  # noqa: SIM118
    assert sum(BERT.role(layer, "no method").is_linear for layer in layers) == 6 * 6


@pytest.mark.parametrize(
    ("layer", "role"),
    [
        ("blocks.0.ff.net.2", None),
        ("model.layers.3.self_attn.q_proj", None),
        ("model.layers.3.mlp.gate_proj", None),
        ("single_blocks.0.attn.out_proj", None),
        ("single_blocks.0.proj_out", None),
        ("model.embed_tokens", "embedding"),
        ("time_text_embed.timestep_embedder.linear_1", "embedding"),
        ("transformer.wte", "embedding"),
        ("blocks.0.norm1.linear", "norm"),
        ("blocks.0.adaLN_modulation.1", "norm"),
        ("h.0.ln_1", "norm"),
        ("blocks.0.modulation.lin", "norm"),
        ("model.layers.0.mlp.gate", "router"),
        ("model.layers.0.block_sparse_moe.router.layer", "router"),
        ("lm_head", "output-head"),
        ("bert.pooler.dense", "output-head"),
        ("cls.predictions.transform.dense", "output-head"),
        ("proj_out", "output-head"),
        ("final_layer.linear", "output-head"),
        ("img_in", "input-projection"),
        ("proj_in", "input-projection"),
    ],
)
def test_heuristic(layer: str, role: str | None) -> None:
    found = guess_role(layer)
    assert found.is_linear == (role is None)
    assert found.reason.startswith(role or "2-D weight")
