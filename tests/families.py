"""Small checkpoints of every model class that vLLM-Omni can load quantized, and what its contract says of their layers.

The contract is written down a second time here, as its tables have it: names in the checkpoint, then the name that
``ignored_layers`` needs. Models are the libraries' own classes where these exist.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hostile.small import Tensor, random, write_json, write_sharded

WIDTH = 64  # of every layer: a multiple of all block sizes
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 32}
QKV = "attn.to_q attn.to_k attn.to_v"
ADDED = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"


@dataclass(frozen=True, kw_only=True)
class Family:
    """``contract``: prefix -> (names in the checkpoint -> name to ignore; "" for the same name). ``N`` is a number."""

    name: str
    write: Callable[[Path], Path]
    contract: Mapping[str, Mapping[str, str]]
    components: Sequence[str] = ("transformer",)
    encoder: Sequence[str] = ()
    fp8_only: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    runtime: Callable[[str], str] = str
    """What the engine calls any other layer."""

    def ignored_name(self, layer: str, method: str) -> str | None:
        """The name to ignore instead of a quantizable layer; None if the layer is not quantizable."""
        for table in (self.contract, self.fp8_only if method == "fp8" else {}):
            for prefix, names in table.items():
                for members, ignored in names.items():
                    for member in members.split():
                        pattern = re.escape(f"{prefix}.{member}").replace(r"\.N", r"\.(\d+)")
                        if match := re.fullmatch(pattern, layer):
                            return _numbered(f"{prefix}.{ignored}", match.groups()) if ignored else layer
        return None

    def expected_ignored(self, kept: Sequence[str]) -> set[str]:
        """``ignored_layers`` when these matrices are kept."""
        names = {self.runtime(self.ignored_name(layer, "fp8") or layer) for layer in kept}
        return names | set(kept) | set(self.encoder)


def _numbered(name: str, numbers: Sequence[str]) -> str:
    for number in numbers:
        name = re.sub(r"\bN\b", number, name, count=1)
    return name


def _fill(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    return model.to(torch.bfloat16)


def _pipeline(pipeline: str, class_name: str, parts: Sequence[str] = ("transformer",), **config: Any) -> Any:
    def write(folder: Path) -> Path:
        import diffusers

        for part in parts:
            model = _fill(getattr(diffusers, class_name)(**config))
            size = sum(weight.nbytes for weight in model.parameters())
            model.save_pretrained(folder / part, max_shard_size=size // 2 + 1)
        index: dict[str, Any] = {part: ["diffusers", class_name] for part in parts}
        write_json(folder / "model_index.json", {"_class_name": pipeline, **index})
        return folder

    return write


def _with_encoder(write: Callable[[Path], Path], config: Any) -> Callable[[Path], Path]:
    def write_both(folder: Path) -> Path:
        write(folder)
        write_sharded(folder / "text_encoder", [{"model.norm.weight": random(4)}], config, stem="model")
        index = json.loads((folder / "model_index.json").read_text())
        write_json(folder / "model_index.json", index | {"text_encoder": ["transformers", "X"]})
        return folder

    return write_both


def _synthetic(config: Any, names: str) -> Callable[[Path], Path]:
    """A root folder with matrices of these names, ``{a,b}`` for each of several, and one vector."""

    def write(folder: Path) -> Path:
        tensors: dict[str, Tensor] = {"model.norm.weight": random(WIDTH)}
        for seed, name in enumerate(_expand(names.split())):
            tensors[f"{name}.weight"] = random(WIDTH, WIDTH, seed=seed)
        return write_sharded(folder, [tensors], config, stem="model")

    return write


def _expand(names: Sequence[str]) -> list[str]:
    expanded = []
    for name in names:
        match = re.search(r"\{([^{}]*)\}", name)
        if match:
            expanded += _expand([name[: match.start()] + part + name[match.end() :] for part in match[1].split(",")])
        else:
            expanded.append(name)
    return expanded


def _omni(model_type: str) -> Callable[[Path], Path]:
    """The thinker of a real class, in the layout of the whole model, and one layer of another stage."""

    def write(folder: Path) -> Path:
        import transformers
        from safetensors.torch import load_file, save_file

        attention = {"num_attention_heads": 2, "num_key_value_heads": 2}
        text: dict[str, Any] = {
            **attention, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "vocab_size": 64,
            "rope_scaling": {"rope_type": "default", "mrope_section": [4, 6, 6]},
        }  # fmt: skip
        audio = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 16}
        audio |= {"d_model": 32, "output_dim": WIDTH}
        vision: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "out_hidden_size": WIDTH}
        vision |= {"depth": 1, "num_heads": 2}
        if model_type == "qwen3_omni_moe":
            text |= {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": WIDTH, "head_dim": 32}
            audio |= {"downsample_hidden_size": 16}
            vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
            kind = "Qwen3OmniMoeThinker"
        else:
            vision |= {"fullatt_block_indexes": [0]}
            kind = "Qwen2_5OmniThinker"
        config = getattr(transformers, f"{kind}Config")(text_config=text, audio_config=audio, vision_config=vision)
        model = _fill(getattr(transformers, f"{kind}ForConditionalGeneration")(config))
        model.save_pretrained(folder / "thinker")  # splits experts as the hub has them
        tensors = {
            f"thinker.{name}": item for name, item in load_file(folder / "thinker" / "model.safetensors").items()
        }
        tensors["talker.model.layers.0.self_attn.q_proj.weight"] = torch.ones(WIDTH, WIDTH, dtype=torch.bfloat16)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        thinker = json.loads((folder / "thinker" / "config.json").read_text())
        shutil.rmtree(folder / "thinker")
        write_json(folder / "config.json", {"model_type": model_type, "thinker_config": thinker, "talker_config": {}})
        return folder

    return write


_WAN = {
    "attn1.to_q attn1.to_k attn1.to_v": "attn1.to_qkv",
    "attn1.to_out.0": "attn1.to_out",
    "attn2.to_q attn2.to_k attn2.to_v attn2.add_k_proj attn2.add_v_proj": "",
    "attn2.to_out.0": "attn2.to_out",
    "ffn.net.0.proj": "ffn.net_0.proj",
    "ffn.net.2": "ffn.net_2",
}
_WAN_SIZES = {**HEADS, "text_dim": 64, "freq_dim": 32, "ffn_dim": 128, "num_layers": 6, "rope_max_seq_len": 32}
_FLUX2 = {
    "transformer_blocks.N": {
        QKV: "attn.to_qkv",
        ADDED: "attn.add_kv_proj",
        "attn.to_out.0 attn.to_add_out ff.linear_in ff.linear_out ff_context.linear_in ff_context.linear_out": "",
    },
    "single_transformer_blocks.N": {"attn.to_qkv_mlp_proj attn.to_out": ""},
}
_FLUX2_SIZES = {
    **HEADS, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 32,
    "timestep_guidance_channels": 32, "axes_dims_rope": (8, 8, 8, 8),
}  # fmt: skip
_Z_IMAGE = {
    "attention.to_q attention.to_k attention.to_v": "attention.to_qkv",
    "feed_forward.w1 feed_forward.w3": "feed_forward.w13",
    "attention.to_out.0 feed_forward.w2": "",
}
_LANGUAGE_MODEL = {
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj": "self_attn.qkv_proj",
    "mlp.gate_proj mlp.up_proj": "mlp.gate_up_proj",
    "self_attn.o_proj mlp.down_proj": "",
}
_LTX2_CROSS = ("attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="Qwen-Image",
            write=_pipeline(
                "QwenImageEditPlusPipeline", "QwenImageTransformer2DModel",
                **HEADS, num_layers=2, axes_dims_rope=(8, 12, 12), joint_attention_dim=32,
            ),
            contract={
                "transformer_blocks.N": {
                    QKV: "attn.to_qkv",
                    ADDED: "attn.add_kv_proj",
                    "attn.to_out.0 attn.to_add_out": "",
                    "img_mlp.net.0.proj img_mlp.net.2 txt_mlp.net.0.proj txt_mlp.net.2": "",
                },
            },
        ),
        Family(
            name="Z-Image",
            write=_with_encoder(
                _pipeline(
                    "ZImagePipeline", "ZImageTransformer2DModel",
                    dim=192, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=64,
                    axes_dims=[32, 32, 32], axes_lens=[64, 64, 64],
                ),
                {"model_type": "qwen3", "num_hidden_layers": 2},
            ),
            contract={"layers.N": _Z_IMAGE, "noise_refiner.N": _Z_IMAGE, "context_refiner.N": _Z_IMAGE},
            encoder=[
                "lm_head",
                *_expand(["model.layers.{0,1}.self_attn.{q,k,v,o}_proj", "model.layers.{0,1}.mlp.{gate,up,down}_proj"]),
            ],
        ),
        Family(
            name="Wan",
            write=_pipeline(
                "WanImageToVideoPipeline", "WanTransformer3DModel", ("transformer", "transformer_2"),
                **_WAN_SIZES, in_channels=36, out_channels=16, image_dim=32, added_kv_proj_dim=64,
            ),
            contract={"blocks.N": _WAN},
            components=("transformer", "transformer_2"),
        ),
        Family(
            name="Wan TI2V-5B",
            write=_pipeline("WanPipeline", "WanTransformer3DModel", **_WAN_SIZES, in_channels=48, out_channels=48),
            contract={"blocks.N": _WAN},
        ),
        Family(
            name="Wan VACE",
            write=_pipeline(
                "WanVACEPipeline", "WanVACETransformer3DModel", **_WAN_SIZES, vace_layers=[0, 2], vace_in_channels=8,
            ),
            contract={"blocks.N": _WAN, "vace_blocks.N": _WAN},
        ),
        Family(
            name="FLUX.1",
            write=_pipeline(
                "FluxKontextPipeline", "FluxTransformer2DModel",
                **HEADS, in_channels=16, num_layers=1, num_single_layers=2, joint_attention_dim=32,
                pooled_projection_dim=32, axes_dims_rope=(8, 12, 12),
            ),
            contract={"single_transformer_blocks.N": {QKV: "attn.to_qkv", "proj_mlp proj_out": ""}},
        ),
        Family(
            name="FLUX.2-klein",
            write=_with_encoder(
                _pipeline("Flux2KleinPipeline", "Flux2Transformer2DModel", **_FLUX2_SIZES), {"num_hidden_layers": 2},
            ),
            contract=_FLUX2,
        ),
        Family(
            name="FLUX.2-dev",
            write=_with_encoder(
                _pipeline("Flux2Pipeline", "Flux2Transformer2DModel", **_FLUX2_SIZES),
                {"model_type": "mistral3", "text_config": {"num_hidden_layers": 2}},
            ),
            contract=_FLUX2,
            encoder=_expand(
                [
                    "text_encoder.language_model.model.layers.{0,1}.self_attn.{qkv_proj,o_proj}",
                    "text_encoder.language_model.model.layers.{0,1}.mlp.{gate_up_proj,down_proj}",
                ]
            ),
        ),
        Family(
            name="HunyuanVideo-1.5",
            write=_pipeline(
                "HunyuanVideo15Pipeline", "HunyuanVideo15Transformer3DModel",
                **HEADS, in_channels=9, out_channels=4, num_layers=2, num_refiner_layers=1, text_embed_dim=32,
                text_embed_2_dim=32, image_embed_dim=32, rope_axes_dim=(8, 12, 12),
            ),
            contract={
                "transformer_blocks.N": {
                    QKV: "attn.to_qkv",
                    ADDED: "attn.add_kv_proj",
                    "attn.to_out.0 attn.to_add_out": "",
                    "ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2": "",
                },
            },
        ),
        Family(
            name="LTX-2",
            write=_pipeline(
                "LTX2Pipeline", "LTX2VideoTransformer3DModel",
                **HEADS, in_channels=16, out_channels=16, cross_attention_dim=64, audio_in_channels=16, gated_attn=True,
                audio_gated_attn=True, audio_out_channels=16, audio_num_attention_heads=2, audio_attention_head_dim=32,
                audio_cross_attention_dim=64, num_layers=2, caption_channels=32,
            ),
            contract={
                "transformer_blocks.N": {
                    "attn1.to_q attn1.to_k attn1.to_v": "attn1.to_qkv",
                    "attn1.to_out.0 ff.net.0.proj ff.net.2 audio_ff.net.0.proj audio_ff.net.2": "",
                    " ".join(_expand([f"{{{','.join(_LTX2_CROSS)}}}.to_{{q,k,v,out.0}}"])): "",
                },
            },
        ),
        Family(
            name="GLM-Image",
            write=_pipeline(
                "GlmImagePipeline", "GlmImageTransformer2DModel",
                **HEADS, in_channels=4, out_channels=4, num_layers=2, text_embed_dim=64, time_embed_dim=64,
                condition_dim=16, prior_vq_quantizer_codebook_size=32,
            ),
            contract={
                "transformer_blocks.N": {
                    "attn1.to_q attn1.to_k attn1.to_v": "attn1.to_qkv",
                    "attn1.to_out.0 ff.net.0.proj ff.net.2 norm1.linear": "",
                },
                "glyph_projector": {"net.0.proj net.2": ""},
                "prior_projector": {"net.0.proj net.2": ""},
            },
        ),
        Family(
            name="HunyuanImage-3.0",
            write=_synthetic(
                {"model_type": "hunyuan_image_3_moe", "architectures": ["HunyuanImage3ForCausalMM"]},
                "model.layers.{0,1}.self_attn.{qkv_proj,o_proj} model.layers.{0,1}.mlp.gate.wg "
                "model.layers.{0,1}.mlp.shared_mlp.{gate_and_up_proj,down_proj} "
                "model.layers.{0,1}.mlp.experts.{0,1}.{gate_and_up_proj,down_proj} "
                "model.wte lm_head vae.decoder.conv vision_model.layers.0.self_attn.q_proj final_layer.model.0",
            ),
            contract={
                "model.layers.N": {
                    "self_attn.qkv_proj self_attn.o_proj mlp.shared_mlp.down_proj": "",
                    "mlp.shared_mlp.gate_and_up_proj": "mlp.shared_mlp.gate_up_proj",
                },
            },
            fp8_only={
                "model.layers.N": {
                    "mlp.experts.N.gate_and_up_proj mlp.experts.N.down_proj": "mlp.experts.routed_experts",
                },
            },
            components=("",),
            runtime=lambda name: name.removeprefix("model.").replace("mlp.gate.wg", "mlp.gate"),
        ),
        Family(
            name="BAGEL",
            write=_synthetic(
                {"model_type": "bagel", "architectures": ["BagelForConditionalGeneration"]},
                "language_model.model.layers.{0,1}.self_attn.{q,k,v,o}_proj{,_moe_gen} "
                "language_model.model.layers.{0,1}.mlp{,_moe_gen}.{gate,up,down}_proj connector.{fc1,fc2} "
                "language_model.model.embed_tokens language_model.lm_head vit_model.encoder.layers.0.fc1 vae2llm "
                "time_embedder.mlp.0",
            ),
            contract={
                "language_model.model.layers.N": {
                    **_LANGUAGE_MODEL,
                    "self_attn.q_proj_moe_gen self_attn.k_proj_moe_gen self_attn.v_proj_moe_gen": "self_attn.qkv_proj",
                    "self_attn.o_proj_moe_gen": "self_attn.o_proj",
                    "mlp_moe_gen.gate_proj mlp_moe_gen.up_proj": "mlp_moe_gen.gate_up_proj",
                    "mlp_moe_gen.down_proj": "",
                },
                "connector": {"fc1 fc2": ""},
            },
            components=("",),
            runtime=lambda name: f"bagel.{name}",
        ),
        Family(
            name="Qwen3-Omni",
            write=_omni("qwen3_omni_moe"),
            contract={
                "thinker.model.layers.N": {
                    "self_attn.q_proj self_attn.k_proj self_attn.v_proj": "self_attn.qkv_proj",
                    "self_attn.o_proj": "",
                    "mlp.experts.N.gate_proj mlp.experts.N.up_proj mlp.experts.N.down_proj": "mlp.experts",
                },
            },
            components=("",),
        ),
        Family(
            name="Qwen2.5-Omni",
            write=_omni("qwen2_5_omni"),
            contract={"thinker.model.layers.N": _LANGUAGE_MODEL},
            components=("",),
        ),
        Family(
            name="Qwen3-TTS",
            write=_synthetic(
                {"model_type": "qwen3_tts", "architectures": ["Qwen3TTSForConditionalGeneration"]},
                "talker.model.layers.{0,1}.self_attn.{q,k,v,o}_proj talker.model.layers.{0,1}.mlp.{gate,up,down}_proj "
                "talker.codec_head talker.model.codec_embedding talker.text_projection.linear_fc1 "
                "talker.code_predictor.model.layers.0.self_attn.q_proj",
            ),
            contract={"talker.model.layers.N": _LANGUAGE_MODEL},
            components=("",),
            runtime=lambda name: name.removeprefix("talker.").replace("codec_head", "lm_head"),
        ),
    )
}  # fmt: skip
