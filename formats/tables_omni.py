"""Models of several stages as vLLM-Omni 0.30 builds them, and models that only our own runtime knows.

Source: small checkpoints loaded by its own classes and loaders (on CPU, without the kernels).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from omni_convert.formats.architectures import Architecture, Block

_QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

_LANGUAGE_MODEL: Mapping[str, Sequence[str]] = {"self_attn.qkv_proj": _QKV, "mlp.gate_up_proj": _GATE_UP}

# Where the engine looks for the config of this stage alone. Its loader asks vLLM, which knows only the top.
_THINKER = ("thinker_config", "text_config")

OMNI_TABLES: Sequence[Architecture] = (
    Architecture(
        name="HunyuanImage-3.0",
        classes=("hunyuan_image_3_moe",),
        blocks=(
            Block(
                prefixes=("model.layers.N",),
                linears=(
                    "self_attn.qkv_proj", "self_attn.o_proj",
                    "mlp.shared_mlp.gate_and_up_proj", "mlp.shared_mlp.down_proj",
                ),
                merged={"self_attn.qkv_proj": 0, "mlp.shared_mlp.gate_and_up_proj": 2},
                # The router takes the config too; it stays, so its engine name must be among the ignored ones.
                renamed={
                    "mlp.shared_mlp.gate_and_up_proj": "mlp.shared_mlp.gate_up_proj", "mlp.gate.wg": "mlp.gate",
                },
            ),
            Block(
                prefixes=("model.layers.N",),
                linears=("mlp.experts.N.gate_and_up_proj", "mlp.experts.N.down_proj"),
                renamed={
                    "mlp.experts.N.gate_and_up_proj": "mlp.experts.routed_experts",
                    "mlp.experts.N.down_proj": "mlp.experts.routed_experts",
                },
                methods=("fp8",),  # routed experts stay BF16 with every other method
            ),
        ),
        runtime_prefix=("model.", ""),
    ),
    Architecture(
        name="BAGEL",
        classes=("bagel",),
        blocks=(
            Block(
                prefixes=("language_model.model.layers.N",),
                linears=(
                    "self_attn.o_proj", "self_attn.o_proj_moe_gen", "mlp.down_proj", "mlp_moe_gen.down_proj",
                ),
                fused={
                    **_LANGUAGE_MODEL,
                    "self_attn.qkv_proj.gen_exp": tuple(f"{name}_moe_gen" for name in _QKV),
                    "mlp_moe_gen.gate_up_proj": ("mlp_moe_gen.gate_proj", "mlp_moe_gen.up_proj"),
                },
                # Both experts of an attention are built under one name, and so with one precision.
                renamed={
                    "self_attn.qkv_proj.gen_exp": "self_attn.qkv_proj",
                    "self_attn.o_proj_moe_gen": "self_attn.o_proj",
                },
            ),
            Block(prefixes=("connector",), linears=("fc1", "fc2")),
        ),
        runtime_prefix=("", "bagel."),
    ),
    Architecture(
        name="Qwen3-Omni",
        classes=("qwen3_omni_moe",),
        blocks=(
            Block(
                prefixes=("thinker.model.layers.N",),
                linears=("self_attn.o_proj", "mlp.experts.N.down_proj"),
                fused={
                    "self_attn.qkv_proj": _QKV,
                    "mlp.experts.N.w13": ("mlp.experts.N.gate_proj", "mlp.experts.N.up_proj"),
                },
                renamed={"mlp.experts.N.w13": "mlp.experts", "mlp.experts.N.down_proj": "mlp.experts"},
            ),
        ),
        config_at=_THINKER,
    ),
    Architecture(
        name="Qwen2.5-Omni",
        classes=("qwen2_5_omni",),
        blocks=(
            Block(
                prefixes=("thinker.model.layers.N",),
                linears=("self_attn.o_proj", "mlp.down_proj"),
                fused=_LANGUAGE_MODEL,
            ),
        ),
        config_at=_THINKER,
        other_stages=("talker*",),
    ),
    Architecture(
        name="Qwen3-TTS",
        classes=("qwen3_tts",),
        blocks=(
            Block(
                prefixes=("talker.model.layers.N",),
                linears=("self_attn.o_proj", "mlp.down_proj"),
                fused=_LANGUAGE_MODEL,
            ),
            # The head takes the config too, under this name, and stays.
            Block(prefixes=("talker",), renamed={"codec_head": "lm_head"}),
        ),
        runtime_prefix=("talker.", ""),
    ),
)  # fmt: skip

OWN_TABLES: Sequence[Architecture] = (
    Architecture(
        name="BERT",
        classes=("bert",),
        blocks=(
            Block(
                prefixes=("encoder.layer.N", "bert.encoder.layer.N"),
                linears=(
                    "attention.self.query", "attention.self.key", "attention.self.value",
                    "attention.output.dense", "intermediate.dense", "output.dense",
                ),
            ),
        ),
        unique=True,
    ),
    # Its linears are Conv1D modules, which store (in, out): scales would run along the wrong axis.
    Architecture(name="GPT-2", classes=("gpt2", "openai-gpt")),
)  # fmt: skip
"""Classes that no engine table has, converted for ``omni_convert.load``."""
