"""Diffusion transformers as vLLM-Omni 0.30 builds them: which of their linears it can run quantized, and their names.

Source: every class instantiated, and every tensor of a small Diffusers checkpoint traced through its own loader (on
CPU, without the kernels). Layers that are not listed are built without a quantization config and stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from omni_convert.formats.architectures import Architecture, Block, TextEncoder


def _qkv(attention: str) -> Mapping[str, Sequence[str]]:
    """Queries, keys and values of one attention, fused."""
    return {f"{attention}.to_qkv": tuple(f"{attention}.to_{name}" for name in "qkv")}


def _joint_qkv(attention: str) -> Mapping[str, Sequence[str]]:
    """Those of the image stream, and those of the text stream."""
    added = {f"{attention}.add_kv_proj": tuple(f"{attention}.add_{name}_proj" for name in "qkv")}
    return {**_qkv(attention), **added}


def _feed_forward(name: str) -> Sequence[str]:
    return (f"{name}.net.0.proj", f"{name}.net.2")


_WAN_BLOCK = Block(
    prefixes=("blocks.N", "vace_blocks.N"),
    linears=(
        "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
        "attn2.add_k_proj", "attn2.add_v_proj",  # Wan2.1 image-to-video only
        "attn1.to_gate_compress",  # sparse-attention checkpoints only
        *_feed_forward("ffn"),
    ),
    fused=_qkv("attn1"),
    renamed={
        "attn1.to_out.0": "attn1.to_out", "attn2.to_out.0": "attn2.to_out",
        "ffn.net.0.proj": "ffn.net_0.proj", "ffn.net.2": "ffn.net_2",
    },
)  # fmt: skip

_FLUX2_BLOCKS = (
    Block(
        prefixes=("transformer_blocks.N",),
        linears=(
            "attn.to_out.0", "attn.to_add_out",
            "ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out",
        ),
        fused=_joint_qkv("attn"),
        merged={"ff.linear_in": 2, "ff_context.linear_in": 2},  # gate and up
    ),
    Block(prefixes=("single_transformer_blocks.N",), linears=("attn.to_qkv_mlp_proj", "attn.to_out")),
)  # fmt: skip

_LTX2_CROSS = ("attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")

DIFFUSION_TABLES: Sequence[Architecture] = (
    Architecture(
        name="Qwen-Image",  # and -Edit, -Edit-Plus, -Layered: the same class in all four pipelines
        classes=("QwenImageTransformer2DModel",),
        blocks=(
            Block(
                prefixes=("transformer_blocks.N",),
                linears=(
                    "attn.to_out.0", "attn.to_add_out", *_feed_forward("img_mlp"), *_feed_forward("txt_mlp"),
                ),
                fused=_joint_qkv("attn"),
            ),
        ),
        unique=True,
    ),
    Architecture(
        name="Z-Image",
        classes=("ZImageTransformer2DModel",),
        blocks=(
            Block(
                prefixes=("layers.N", "noise_refiner.N", "context_refiner.N"),
                linears=("attention.to_out.0", "feed_forward.w2"),
                fused={**_qkv("attention"), "feed_forward.w13": ("feed_forward.w1", "feed_forward.w3")},
            ),
        ),
        unique=True,
        text_encoder=TextEncoder(
            component="text_encoder",
            layers=(
                *(f"model.layers.N.self_attn.{name}_proj" for name in "qkvo"),
                *(f"model.layers.N.mlp.{name}_proj" for name in ("gate", "up", "down")),
                "lm_head",
            ),
            count=("num_hidden_layers",),
            may_be_quantized=True,
        ),
    ),
    Architecture(
        name="Wan TI2V-5B",
        classes=("WanTransformer3DModel",),
        config={"out_channels": 48},  # of its own, larger VAE; every other Wan has 16
        blocks=(_WAN_BLOCK,),
    ),
    Architecture(name="Wan", classes=("WanTransformer3DModel",), blocks=(_WAN_BLOCK,)),
    Architecture(name="Wan VACE", classes=("WanVACETransformer3DModel",), blocks=(_WAN_BLOCK,)),
    Architecture(
        name="FLUX.1",
        classes=("FluxTransformer2DModel",),
        # The double blocks (transformer_blocks) are built without the config.
        blocks=(
            Block(
                prefixes=("single_transformer_blocks.N",), linears=("proj_mlp", "proj_out"), fused=_qkv("attn"),
            ),
        ),
    ),
    Architecture(
        name="FLUX.2-klein",
        classes=("Flux2Transformer2DModel",),
        pipelines=("Flux2KleinPipeline", "Flux2KleinKVPipeline", "Flux2KleinInpaintPipeline"),
        blocks=_FLUX2_BLOCKS,
    ),
    Architecture(
        name="FLUX.2-dev",
        classes=("Flux2Transformer2DModel",),
        blocks=_FLUX2_BLOCKS,
        text_encoder=TextEncoder(
            component="text_encoder",
            layers=tuple(
                f"text_encoder.language_model.model.layers.N.{name}"
                for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
            ),
            count=("text_config", "num_hidden_layers"),
        ),
    ),
    Architecture(
        name="HunyuanVideo-1.5",
        classes=("HunyuanVideo15Transformer3DModel",),
        blocks=(
            Block(
                prefixes=("transformer_blocks.N",),
                linears=(
                    "attn.to_out.0", "attn.to_add_out", *_feed_forward("ff"), *_feed_forward("ff_context"),
                ),
                fused=_joint_qkv("attn"),
            ),
        ),
    ),
    Architecture(
        name="LTX-2",
        classes=("LTX2VideoTransformer3DModel",),
        blocks=(
            Block(
                prefixes=("transformer_blocks.N",),
                linears=(
                    "attn1.to_out.0",
                    *(f"{attention}.to_{name}" for attention in _LTX2_CROSS for name in ("q", "k", "v", "out.0")),
                    *_feed_forward("ff"), *_feed_forward("audio_ff"),
                ),
                fused=_qkv("attn1"),
            ),
        ),
        unique=True,
    ),
    Architecture(
        name="GLM-Image",
        classes=("GlmImageTransformer2DModel",),
        blocks=(
            Block(
                prefixes=("transformer_blocks.N",),
                # norm1.linear makes the modulation of both streams, and takes the config like any other linear.
                linears=("attn1.to_out.0", *_feed_forward("ff"), "norm1.linear"),
                fused=_qkv("attn1"),
            ),
            Block(prefixes=("glyph_projector.net", "prior_projector.net"), linears=("0.proj", "2")),
        ),
        unique=True,
    ),
    # No linear takes a config.
    Architecture(name="SD3.5", classes=("SD3Transformer2DModel",)),
)  # fmt: skip
