"""Which weights are linears: the tables against the libraries' own models, and the heuristic for the rest."""

from __future__ import annotations

import pytest
from hostile.small import read_weights

from omni_convert.formats.architectures import Architecture, guess_role
from omni_convert.formats.tables_diffusion import DIFFUSION_TABLES
from omni_convert.formats.tables_omni import OMNI_TABLES, OWN_TABLES
from omni_convert.formats.target import TARGETS

TABLES = {table.name: table for table in (*DIFFUSION_TABLES, *OMNI_TABLES, *OWN_TABLES)}
QWEN, Z_IMAGE, BERT, FLUX2_DEV, FLUX2_KLEIN, WAN, WAN_5B, BAGEL, HUNYUAN, QWEN3_OMNI, QWEN3_TTS = (
    TABLES[name]
    for name in (
        "Qwen-Image", "Z-Image", "BERT", "FLUX.2-dev", "FLUX.2-klein", "Wan", "Wan TI2V-5B", "BAGEL",
        "HunyuanImage-3.0", "Qwen3-Omni", "Qwen3-TTS",
    )
)  # fmt: skip
VLLM_OMNI = TARGETS["vllm-omni"]


@pytest.mark.parametrize(
    ("config", "pipeline", "expected"),
    [
        ({"_class_name": "QwenImageTransformer2DModel"}, None, QWEN),
        ({"_class_name": "QwenImageTransformer2DModel"}, "QwenImageEditPlusPipeline", QWEN),
        ({"_class_name": "ZImageTransformer2DModel"}, "ZImagePipeline", Z_IMAGE),
        ({"_class_name": "Flux2Transformer2DModel"}, "Flux2Pipeline", FLUX2_DEV),
        ({"_class_name": "Flux2Transformer2DModel"}, "Flux2KleinPipeline", FLUX2_KLEIN),
        ({"_class_name": "Flux2Transformer2DModel"}, None, FLUX2_DEV),
        ({"_class_name": "WanTransformer3DModel", "in_channels": 48, "out_channels": 48}, "WanPipeline", WAN_5B),
        ({"_class_name": "WanTransformer3DModel", "in_channels": 16, "out_channels": 16}, "WanPipeline", WAN),
        ({"_class_name": "WanTransformer3DModel", "in_channels": 36, "out_channels": 16}, None, WAN),
        ({"_class_name": "WanTransformer3DModel"}, "WanPipeline", WAN),
        ({"model_type": "hunyuan_image_3_moe", "architectures": ["HunyuanImage3ForCausalMM"]}, None, HUNYUAN),
        ({"model_type": "bagel"}, None, BAGEL),
        ({"model_type": "bert", "architectures": ["BertModel"]}, None, BERT),
        ({"_class_name": "BertModel"}, None, None),
        ({"model_type": "roberta"}, None, None),
        ({"_class_name": ["QwenImageTransformer2DModel"]}, None, None),
        ({}, "QwenImagePipeline", None),
    ],
    ids=str,
)
def test_table_is_found_by_class_and_variant(
    config: dict[str, object], pipeline: str | None, expected: Architecture | None
) -> None:
    assert VLLM_OMNI.find(config, ["transformer_blocks.0.attn.to_q"], pipeline) is expected


def test_names_are_told_apart() -> None:
    assert len(TABLES) == len(DIFFUSION_TABLES) + len(OMNI_TABLES) + len(OWN_TABLES)


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.name)
def test_weights_without_config_are_known_only_by_unique_names(table: Architecture) -> None:
    layers = [
        f"{prefix}.{name}".replace("N", "0")
        for block in table.blocks for prefix in block.prefixes for name in sorted(block.members)
    ]  # fmt: skip
    assert VLLM_OMNI.find(None, layers) is (table if table.unique else None)
    first = min((name for block in table.blocks for name in block.members), default="")
    assert VLLM_OMNI.find(None, [layer for layer in layers if not layer.endswith(first)]) is None


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
    role = table.layer(layer).role("no method")
    assert role.is_linear == is_linear
    assert table.name in role.reason


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
    assert table.layer(layer).group() == (name, tuple(f"{parent}.{member}" for member in members))


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
    assert table.layer(layer).group() is None


@pytest.mark.parametrize(
    ("table", "layer", "name"),
    [
        (QWEN, "transformer_blocks.2.attn.to_k", "transformer_blocks.2.attn.to_qkv"),
        (QWEN, "transformer_blocks.2.attn.to_out.0", "transformer_blocks.2.attn.to_out.0"),
        (QWEN, "img_in", "img_in"),
        (WAN, "blocks.3.attn1.to_v", "blocks.3.attn1.to_qkv"),
        (WAN, "blocks.3.attn2.to_v", "blocks.3.attn2.to_v"),
        (WAN, "blocks.3.attn1.to_out.0", "blocks.3.attn1.to_out"),
        (WAN, "vace_blocks.3.ffn.net.0.proj", "vace_blocks.3.ffn.net_0.proj"),
        (WAN, "blocks.3.ffn.net.2", "blocks.3.ffn.net_2"),
        (HUNYUAN, "model.layers.1.self_attn.qkv_proj", "layers.1.self_attn.qkv_proj"),
        (HUNYUAN, "model.layers.1.mlp.shared_mlp.gate_and_up_proj", "layers.1.mlp.shared_mlp.gate_up_proj"),
        (HUNYUAN, "model.layers.1.mlp.gate.wg", "layers.1.mlp.gate"),
        (HUNYUAN, "model.layers.1.mlp.experts.7.down_proj", "layers.1.mlp.experts.routed_experts"),
        (BAGEL, "connector.fc1", "bagel.connector.fc1"),
        (
            BAGEL,
            "language_model.model.layers.0.self_attn.k_proj_moe_gen",
            "bagel.language_model.model.layers.0.self_attn.qkv_proj",
        ),
        (
            BAGEL,
            "language_model.model.layers.0.mlp_moe_gen.up_proj",
            "bagel.language_model.model.layers.0.mlp_moe_gen.gate_up_proj",
        ),
        (QWEN3_OMNI, "thinker.model.layers.0.mlp.experts.3.up_proj", "thinker.model.layers.0.mlp.experts"),
        (QWEN3_OMNI, "thinker.model.layers.0.mlp.gate", "thinker.model.layers.0.mlp.gate"),
        (QWEN3_TTS, "talker.model.layers.5.self_attn.q_proj", "model.layers.5.self_attn.qkv_proj"),
        (QWEN3_TTS, "talker.codec_head", "lm_head"),
    ],
)
def test_runtime_names(table: Architecture, layer: str, name: str) -> None:
    assert table.layer(layer).runtime_name() == name


def test_numbers_of_a_fused_expert() -> None:
    layer = "thinker.model.layers.4.mlp.experts.3.up_proj"
    expert = "thinker.model.layers.4.mlp.experts.3"
    assert QWEN3_OMNI.layer(layer).group() == (f"{expert}.w13", (f"{expert}.gate_proj", f"{expert}.up_proj"))


@pytest.mark.parametrize(("fixture", "table", "count"), [("qwen_image", QWEN, 12 * 3), ("z_image", Z_IMAGE, 7 * 4)])
def test_table_fits_the_real_model(
    request: pytest.FixtureRequest, fixture: str, table: Architecture, count: int
) -> None:
    folder = request.getfixturevalue(fixture) / "transformer"
    stored = {name: item for path in folder.glob("*.safetensors") for name, item in read_weights(path).items()}
    layers = {name.removesuffix(".weight") for name in stored if name.endswith(".weight")}
    linears = {layer for layer in layers if table.layer(layer).role("int8").is_linear}
    assert len(linears) == count
    assert all(len(stored[f"{layer}.weight"].shape) == 2 for layer in linears)
    for layer in linears:
        group = table.layer(layer).group()
        assert group is None or linears.issuperset(group[1])


def test_table_fits_the_trained_bert(minilm: object) -> None:
    from safetensors import safe_open

    with safe_open(f"{minilm}/model.safetensors", "np") as file:
        layers = [name.removesuffix(".weight") for name in file.keys() if name.endswith(".weight")]  # noqa: SIM118
    assert sum(BERT.layer(layer).role("no method").is_linear for layer in layers) == 6 * 6


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
        ("model.layers.0.mlp.shared_expert_gate", "router"),
        ("model.layers.0.mlp.shared_expert.gate_proj", None),
        ("model.layers.61.eh_proj", "prediction-head"),
        ("model.layers.61.shared_head.head", "prediction-head"),
        ("mtp.fc", "prediction-head"),
        ("mtp.layers.0.mlp.fc", None),
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


def test_heuristic_quotes_numbers_as_they_are() -> None:
    assert guess_role("12.head.3").reason == "output-head role ('12.head' in its name)"
    assert guess_role("blocks.12.norm.3").reason == "norm role ('norm' in its name)"
