"""What vLLM-Omni 0.30 builds of every model class, as its loader sees it: data for the contract checks.

Written down from the engine's side, apart from the tables that the converter writes by: for every linear that takes a
quantization config, a regular expression over its names in the checkpoint, the name by which the engine decides
whether it is quantized, and the parameter that its rows end up in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Linears that take the quantization config.

    ``layers``: regular expression of whole layer names; with ``shards``, its last group is one of these, in the
    order in which the engine stacks them. ``name``: by which it decides. ``param``: where the rows go, if elsewhere.
    ``widths``: logical matrices in one tensor. ``methods``: with which kinds alone the config is taken; empty: all.
    ``optional``: not every model of the class, or not each of its blocks, has them.
    """

    layers: str
    name: str = r"\g<0>"
    param: str = ""
    shards: Sequence[str] = ()
    widths: int = 1
    methods: Sequence[str] = ()
    optional: bool = False

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(self.layers)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A text encoder that is built with the transformer's quantization config.

    ``pipelines``: whose. ``count``: where its config says how many layers there are. ``linears``: the engine's name,
    with ``{}`` for the number -> how the names of its parts in the checkpoint end.
    """

    pipelines: Sequence[str]
    count: Sequence[str]
    linears: Mapping[str, Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class EngineModel:
    """One class. ``classes``: ``_class_name`` or ``model_type``; ``config``: values in the config that go with it.

    ``stray``: what the loader does with a tensor that it does not know. ``plain``: where that stops it, regular
    expressions of all tensors beside those of ``linears``. ``refused``: kind of method -> what happens.
    ``never``: layers built without a config, and why that needs saying. ``config_at``: the object that may hold
    ``quantization_config`` too. ``vllm``: vLLM's language-model path reads the config, not the diffusion path. ``wan``:
    every transformer resolves its own config. ``renames``: what the engine does to the start of ignored names, and
    ``renames_within``, to parts of them. ``packed``: fused name -> the names of shards that may stand for it.
    """

    name: str
    classes: Sequence[str]
    config: Mapping[str, object] = field(default_factory=dict)
    linears: Sequence[Linear] = ()
    stray: str = "does not know it"
    plain: Sequence[str] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    never: tuple[str, str] | None = None
    encoder: Encoder | None = None
    config_at: Sequence[str] = ()
    vllm: bool = False
    wan: bool = False
    renames: Mapping[str, str] = field(default_factory=dict)
    renames_within: Mapping[str, str] = field(default_factory=dict)
    packed: Mapping[str, Sequence[str]] = field(default_factory=dict)


def find_model(config: Mapping[str, object]) -> EngineModel | None:
    """The class that a model's config announces; None if the engine's tables have none of that name."""
    names = {name for key in ("_class_name", "model_type") if isinstance(name := config.get(key), str)}
    return next(
        (model for model in MODELS if names & set(model.classes) and model.config.items() <= config.items()), None
    )


def _in(prefix: str, *names: str) -> tuple[Linear, ...]:
    """Linears that are decided by their own names; ``prefix`` and ``names`` are regular expressions."""
    return tuple(Linear(layers=rf"{prefix}\.{name}") for name in names)


def _qkv(attention: str) -> Linear:
    return Linear(layers=rf"({attention}\.)to_(q|k|v)", name=r"\1to_qkv", shards="qkv")


def _added_qkv(attention: str) -> Linear:
    return Linear(layers=rf"({attention}\.)add_(q|k|v)_proj", name=r"\1add_kv_proj", shards="qkv")


def _stack(layers: str, name: str, shards: Sequence[str], param: str = "", *, optional: bool = False) -> Linear:
    return Linear(layers=layers, name=name, shards=shards, param=param, optional=optional)


_BLOCKS = r"transformer_blocks\.\d+"
_SILENT, _LOGGED, _KEY_ERROR = "drops it silently", "drops it with a log line", "stops with a KeyError"
_QKV, _GATE_UP = ("q", "k", "v"), ("gate", "up")

_Z_BLOCKS = r"(?:layers|noise_refiner|context_refiner)\.\d+"
_Z_PLAIN = (
    rf"{_Z_BLOCKS}\.(?:attention\.norm_[qk]|attention_norm[12]|ffn_norm[12])\.weight",
    r"(?:layers|noise_refiner)\.\d+\.adaLN_modulation\.0\.(?:weight|bias)",
    r"all_x_embedder\.\d+-\d+\.(?:weight|bias)",
    r"all_final_layer\.\d+-\d+\.(?:linear|adaLN_modulation\.1)\.(?:weight|bias)",
    r"t_embedder\.mlp\.[02]\.(?:weight|bias)",
    r"cap_embedder\.(?:[01]\.weight|1\.bias)",
    r"(?:x|cap)_pad_token",
)
_FLUX_PLAIN = (
    r"(?:x_embedder|context_embedder|norm_out\.linear|proj_out)\.(?:weight|bias)",
    r"time_text_embed\.(?:timestep|guidance|text)_embedder\.linear_[12]\.(?:weight|bias)",
    rf"{_BLOCKS}\.attn\.norm_(?:added_)?[qk]\.weight",
    rf"{_BLOCKS}\.attn\.(?:to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)\.(?:weight|bias)",
    rf"{_BLOCKS}\.(?:norm1(?:_context)?\.linear|ff(?:_context)?\.net\.(?:0\.proj|2))\.(?:weight|bias)",
    r"single_transformer_blocks\.\d+\.attn\.norm_[qk]\.weight",
    r"single_transformer_blocks\.\d+\.norm\.linear\.(?:weight|bias)",
    r"single_transformer_blocks\.\d+\.(?:attn\.to_[qkv]|proj_mlp|proj_out)\.bias",
)
_WAN_BLOCKS = r"(?:vace_)?blocks\.\d+"
_WAN_LINEARS = (
    _qkv(rf"{_WAN_BLOCKS}\.attn1"),
    Linear(layers=rf"({_WAN_BLOCKS}\.attn[12]\.to_out)\.0", name=r"\1"),
    *_in(_WAN_BLOCKS, r"attn2\.to_[qkv]"),
    Linear(layers=rf"{_WAN_BLOCKS}\.attn2\.add_[kv]_proj", optional=True),
    Linear(layers=rf"{_WAN_BLOCKS}\.attn1\.to_gate_compress", optional=True),
    Linear(layers=rf"({_WAN_BLOCKS}\.ffn)\.net\.0\.proj", name=r"\1.net_0.proj"),
    Linear(layers=rf"({_WAN_BLOCKS}\.ffn)\.net\.2", name=r"\1.net_2"),
)
_MODELOPT = ("modelopt", "modelopt channel")
_WAN_REFUSED = dict.fromkeys(_MODELOPT, "its Wan pipelines build ModelOpt's config by keywords: a TypeError")
_SMALL_WAN = "its own tools refuse TI2V-5B with 4 bits for lack of accuracy"
_FLUX2_LINEARS = (
    _qkv(rf"{_BLOCKS}\.attn"),
    _added_qkv(rf"{_BLOCKS}\.attn"),
    *_in(_BLOCKS, r"attn\.to_out\.0", r"attn\.to_add_out", r"ff(?:_context)?\.linear_out"),
    Linear(layers=rf"{_BLOCKS}\.ff(?:_context)?\.linear_in", widths=2),  # gate and up, one below the other
    *_in(r"single_transformer_blocks\.\d+", r"attn\.to_qkv_mlp_proj", r"attn\.to_out"),
)
_LTX2_CROSS = r"(?:attn2|audio_attn1|audio_attn2|audio_to_video_attn|video_to_audio_attn)"

_HUNYUAN = r"model\.(layers\.\d+"
_HUNYUAN_FUSED = "its loader puts the rows of fused weights in another order, but not scales of this shape"
_BAGEL = r"language_model\.model\.layers\.\d+\."
_NOT_IN_VLLM = "vLLM runs the language model and has no such method for serialized checkpoints"
_VLLM_REFUSED = dict.fromkeys(("int8", "mxfp8", "mxfp4", "mxfp4_dualscale"), _NOT_IN_VLLM)
_VISION = "its vision tower is built quantized too, and no list of ignored layers matches there"
_PACKED = {
    "qkv_proj": tuple(f"{name}_proj" for name in _QKV),
    "gate_up_proj": tuple(f"{name}_proj" for name in _GATE_UP),
}


def _language_model(layers: str, put: str, *, experts: bool = False) -> tuple[Linear, ...]:
    """A decoder layer of vLLM's; ``layers`` has the group ``\\1`` ``put`` starts with. ``experts``: or has them."""
    return (
        _stack(rf"{layers}self_attn\.)(q|k|v)_proj", rf"{put}qkv_proj", _QKV),
        _stack(rf"{layers}mlp\.)(gate|up)_proj", rf"{put}gate_up_proj", _GATE_UP, optional=experts),
        Linear(layers=rf"{layers}self_attn\.o_proj)", name=put),
        Linear(layers=rf"{layers}mlp\.down_proj)", name=put, optional=experts),
    )


def _head(layers: str, name: str) -> Linear:
    """An output head: of vLLM's methods, ModelOpt's alone quantize it."""
    return Linear(layers=layers, name=name, methods=_MODELOPT, optional=True)


MODELS: Sequence[EngineModel] = (
    EngineModel(
        name="Z-Image",
        classes=("ZImageTransformer2DModel",),
        linears=(
            _qkv(rf"{_Z_BLOCKS}\.attention"),
            _stack(rf"({_Z_BLOCKS}\.feed_forward\.)w(1|3)", r"\1w13", ("1", "3")),
            *_in(_Z_BLOCKS, r"attention\.to_out\.0", r"feed_forward\.w2"),
        ),
        stray=_KEY_ERROR,
        plain=_Z_PLAIN,
        encoder=Encoder(
            pipelines=("ZImagePipeline",),
            count=("num_hidden_layers",),
            linears={
                name: (name.removeprefix("model."),)
                for name in (
                    *(f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkvo"),
                    *(f"model.layers.{{}}.mlp.{part}_proj" for part in ("gate", "up", "down")),
                    "lm_head",
                )
            },
        ),
    ),
    EngineModel(
        name="Qwen-Image",
        classes=("QwenImageTransformer2DModel",),
        linears=(
            _qkv(rf"{_BLOCKS}\.attn"),
            _added_qkv(rf"{_BLOCKS}\.attn"),
            *_in(_BLOCKS, r"attn\.to_out\.0", r"attn\.to_add_out", r"(?:img|txt)_mlp\.net\.(?:0\.proj|2)"),
        ),
        stray=_SILENT,
    ),
    EngineModel(
        name="Wan TI2V-5B",
        classes=("WanTransformer3DModel",),
        config={"out_channels": 48},  # every other Wan has 16
        linears=_WAN_LINEARS,
        stray=_LOGGED,
        refused=_WAN_REFUSED | dict.fromkeys(("mxfp4", "mxfp4_dualscale"), _SMALL_WAN),
        wan=True,
    ),
    EngineModel(
        name="Wan",
        classes=("WanTransformer3DModel", "WanVACETransformer3DModel"),
        linears=_WAN_LINEARS,
        stray=_LOGGED,
        refused=_WAN_REFUSED,
        wan=True,
    ),
    EngineModel(
        name="FLUX.1",
        classes=("FluxTransformer2DModel",),
        linears=(
            _qkv(r"single_transformer_blocks\.\d+\.attn"),
            *_in(r"single_transformer_blocks\.\d+", "proj_mlp", "proj_out"),
        ),
        stray=_KEY_ERROR,
        plain=_FLUX_PLAIN,
        never=(_BLOCKS + r"\..*", "double blocks get no quantization config"),
    ),
    EngineModel(
        name="FLUX.2",
        classes=("Flux2Transformer2DModel",),
        linears=_FLUX2_LINEARS,
        stray=_SILENT,
        encoder=Encoder(
            pipelines=("Flux2Pipeline",),  # klein loads its encoder with Transformers
            count=("text_config", "num_hidden_layers"),
            linears={
                f"text_encoder.language_model.model.layers.{{}}.{name}": tuple(f"layers.{{}}.{part}" for part in parts)
                for name, parts in {
                    "self_attn.qkv_proj": tuple(f"self_attn.{part}_proj" for part in _QKV),
                    "self_attn.o_proj": ("self_attn.o_proj",),
                    "mlp.gate_up_proj": tuple(f"mlp.{part}_proj" for part in _GATE_UP),
                    "mlp.down_proj": ("mlp.down_proj",),
                }.items()
            },
        ),
    ),
    EngineModel(
        name="HunyuanVideo-1.5",
        classes=("HunyuanVideo15Transformer3DModel",),
        linears=(
            _qkv(rf"{_BLOCKS}\.attn"),
            _added_qkv(rf"{_BLOCKS}\.attn"),
            *_in(_BLOCKS, r"attn\.to_out\.0", r"attn\.to_add_out", r"ff(?:_context)?\.net\.(?:0\.proj|2)"),
        ),
        stray=_SILENT,
    ),
    EngineModel(
        name="LTX-2",
        classes=("LTX2VideoTransformer3DModel",),
        linears=(
            _qkv(rf"{_BLOCKS}\.attn1"),
            *_in(_BLOCKS, r"attn1\.to_out\.0", rf"{_LTX2_CROSS}\.to_(?:q|k|v|out\.0)"),
            *_in(_BLOCKS, r"(?:audio_)?ff\.net\.(?:0\.proj|2)"),
        ),
        stray=_LOGGED,
    ),
    EngineModel(
        name="GLM-Image",
        classes=("GlmImageTransformer2DModel",),
        linears=(
            _qkv(rf"{_BLOCKS}\.attn1"),
            *_in(_BLOCKS, r"attn1\.to_out\.0", r"ff\.net\.(?:0\.proj|2)", r"norm1\.linear"),
            *_in(r"(?:glyph|prior)_projector", r"net\.(?:0\.proj|2)"),
        ),
        stray=_LOGGED,
    ),
    EngineModel(
        name="SD3.5",
        classes=("SD3Transformer2DModel",),
        never=(r".*", "it builds this class without a quantization config"),
    ),
    EngineModel(
        name="HunyuanImage-3.0",
        classes=("hunyuan_image_3_moe",),
        linears=(
            Linear(layers=rf"{_HUNYUAN}\.self_attn\.qkv_proj)", name=r"\1", widths=3),
            Linear(layers=rf"{_HUNYUAN}\.self_attn\.o_proj)", name=r"\1"),
            Linear(layers=rf"{_HUNYUAN}\.mlp\.shared_mlp)\.gate_and_up_proj", name=r"\1.gate_up_proj", widths=2),
            Linear(layers=rf"{_HUNYUAN}\.mlp\.shared_mlp\.down_proj)", name=r"\1"),
            Linear(layers=rf"{_HUNYUAN}\.mlp\.gate)\.wg", name=r"\1"),  # the router
            Linear(
                layers=rf"{_HUNYUAN}\.mlp\.experts)\.\d+\.(?:gate_and_up|down)_proj", name=r"\1", param=r"\g<0>",
                methods=("fp8", "fp8 static"),  # with any other method routed experts are built unquantized
            ),
        ),
        refused={
            "fp8 block": _HUNYUAN_FUSED, "modelopt channel": _HUNYUAN_FUSED,
            "mxfp4_dualscale": "an AssertionError: its loader halves mul_scale with the rows of gate and up",
        },
        renames={"model.": ""},
        renames_within={"mlp.gate.wg.": "mlp.gate.", "gate_and_up_proj.": "gate_up_proj."},
    ),
    EngineModel(
        name="BAGEL",
        classes=("bagel",),
        linears=(
            _stack(rf"({_BAGEL}self_attn\.)(q|k|v)_proj", r"bagel.\1qkv_proj", _QKV),
            _stack(
                rf"({_BAGEL}self_attn\.)(q|k|v)_proj_moe_gen", r"bagel.\1qkv_proj", _QKV, r"\1qkv_proj.gen_exp",
            ),
            Linear(layers=rf"({_BAGEL}self_attn\.o_proj)(?:_moe_gen)?", name=r"bagel.\1", param=r"\g<0>"),
            _stack(rf"({_BAGEL}mlp(?:_moe_gen)?\.)(gate|up)_proj", r"bagel.\1gate_up_proj", _GATE_UP),
            Linear(layers=rf"{_BAGEL}mlp(?:_moe_gen)?\.down_proj", name=r"bagel.\g<0>"),
            Linear(layers=r"connector\.fc[12]", name=r"bagel.\g<0>"),
        ),
    ),
    EngineModel(
        name="Qwen3-Omni",
        classes=("qwen3_omni_moe",),
        linears=(
            *_language_model(r"thinker\.(model\.layers\.\d+\.", r"thinker.language_model.\1", experts=True),
            Linear(  # the router
                layers=r"thinker\.(model\.layers\.\d+\.mlp\.gate)", name=r"thinker.language_model.\1", optional=True,
            ),
            _stack(
                r"thinker\.(model\.layers\.\d+\.mlp\.experts)(\.\d+)\.(gate|up)_proj",
                r"thinker.language_model.\1", _GATE_UP, r"\1\2.w13", optional=True,
            ),
            Linear(
                layers=r"thinker\.(model\.layers\.\d+\.mlp\.experts)\.\d+\.down_proj",
                name=r"thinker.language_model.\1", param=r"\g<0>", optional=True,
            ),
            _head(r"thinker\.lm_head", "thinker.language_model.lm_head"),
        ),
        refused=_VLLM_REFUSED | {"modelopt channel": "a RuntimeError: experts have one scale each there"},
        config_at=("thinker_config", "text_config"),
        vllm=True,
        renames={
            "thinker.lm_head": "thinker.language_model.lm_head", "thinker.model": "thinker.language_model.model",
        },
        packed=_PACKED,
    ),
    EngineModel(
        name="Qwen2.5-Omni",
        classes=("qwen2_5_omni",),
        linears=(
            *_language_model(r"thinker\.(model\.layers\.\d+\.", r"thinker.language_model.\1"),
            _head(r"thinker\.lm_head", "thinker.language_model.lm_head"),
        ),
        refused=_VLLM_REFUSED | dict.fromkeys(("fp8", "fp8 static", "fp8 block"), _VISION),
        config_at=("thinker_config", "text_config"),
        vllm=True,
        renames={
            "thinker.lm_head.": "language_model.lm_head.", "thinker.model.": "language_model.model.", "thinker.": "",
        },
        packed=_PACKED,
    ),
    EngineModel(
        name="Qwen3-TTS",
        classes=("qwen3_tts",),
        linears=(
            *_language_model(r"talker\.(model\.layers\.\d+\.", r"\1"),
            _head(r"talker\.codec_head", "lm_head"),
        ),
        refused=_VLLM_REFUSED,
        vllm=True,
        renames={"talker.model.layers.": "model.layers."},
    ),
)  # fmt: skip
