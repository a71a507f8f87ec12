"""The autoregressive stages of vLLM-Omni's models, which vLLM's loader starts; see ``vllm_omni_engine``.

Stubbed besides: attention backends (none runs), the speech tokenizer of Qwen3-TTS, and vLLM's look at model classes in
a process of their own, which would lack the other stubs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import torch
import vllm.distributed as groups
import vllm_omni_engine as engine
from safetensors.torch import load_file, save_file
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.quantization import modelopt
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.model_executor.models import registry
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm_omni.diffusion.distributed import parallel_state
from vllm_omni.engine.arg_utils import OmniEngineArgs

registry._run_in_subprocess = lambda look: look()
modelopt.select_fp8_moe_backend = engine.fp8.select_fp8_moe_backend
for _name in ("torchaudio", "torchaudio.functional", "torchaudio.transforms"):
    sys.modules.setdefault(_name, MagicMock())


class Stage(NamedTuple):
    """As the engine's own pipeline description has it."""

    stage: str
    architecture: str
    config: str | None
    model: str
    """``architectures`` of the model's config.json."""


_QWEN3_OMNI = "Qwen3OmniMoeForConditionalGeneration"
STAGES: Mapping[str, Stage] = {
    "Qwen3-Omni": Stage("thinker", _QWEN3_OMNI, "thinker_config", _QWEN3_OMNI),
    "Qwen2.5-Omni": Stage("thinker", "Qwen2_5OmniForConditionalGeneration", "thinker_config", "Qwen2_5OmniModel"),
    "Qwen3-TTS": Stage("qwen3_tts", "Qwen3TTSTalkerForConditionalGeneration", None, "Qwen3TTSForConditionalGeneration"),
}
_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 32}
_SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}
_TALKER = {
    **_SIZES, "text_vocab_size": 64, "text_hidden_size": 64, "num_code_groups": 4, "codec_eos_token_id": 3,
    "rope_scaling": {"rope_type": "default", "mrope_section": [4, 6, 6], "interleaved": True},
    "code_predictor_config": {**_SIZES, "num_code_groups": 4},
}  # fmt: skip
_TTS_NAMES = {
    "model.embed_tokens": "talker.model.codec_embedding",
    "model.": "talker.model.",
    "lm_head": "talker.codec_head",
    "text_embedding": "talker.model.text_embedding",
    "text_projection": "talker.text_projection",
    "code_predictor": "talker.code_predictor",
}


def name_of(folder: Path) -> str | None:
    """The model's name, if it has such a stage."""
    path = folder / "config.json"
    classes = json.loads(path.read_text()).get("architectures") if path.is_file() else None
    return next((name for name, stage in STAGES.items() if classes == [stage.model]), None)


def complete(folder: Path, name: str) -> None:
    """What the engine needs besides the matrices of ``tests/families.py``, in small."""
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [STAGES[name].model]
    if name == "Qwen3-TTS":
        config |= {"tokenizer_type": "qwen3_tts_tokenizer_12hz", "talker_config": _TALKER}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "speech_tokenizer").mkdir()
        save_file({"decoder.x": torch.ones(4)}, folder / "speech_tokenizer" / "model.safetensors")
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        with _model(folder, name) as (model, _):
            save_file(dict(_tts_weights(model)), folder / "model.safetensors", {"format": "pt"})
        return
    del config["talker_config"]
    if name == "Qwen3-Omni":
        config["thinker_config"]["vision_config"] |= {"image_size": 64, "apply_vit_abs_pos_embed": True}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    thinker = {key: value for key, value in weights.items() if key.startswith("thinker.")}
    save_file(thinker, folder / "model.safetensors", {"format": "pt"})


def _tts_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        start = next((start for start in _TTS_NAMES if name.startswith(start)), "")
        stored, rows = _TTS_NAMES.get(start, "") + name[len(start) :], parameter.shape[0]
        parts = {stored: rows}
        if "qkv_proj" in stored:
            shares = {"q": 2, "k": 4, "v": 4}
            parts = {stored.replace("qkv", part): rows // share for part, share in shares.items()}
        elif "gate_up_proj" in stored:
            parts = {stored.replace("gate_up", part): rows // 2 for part in ("gate", "up")}
        for part, count in parts.items():
            yield part, (0.1 * torch.randn(count, *parameter.shape[1:], generator=generator)).to(torch.bfloat16)


def start(folder: Path, name: str) -> engine.Started:
    """The stage, ready for requests."""
    with _model(folder, name) as (model, config):
        reads = engine.Reads()
        loader = DefaultModelLoader(config.load_config)
        get = loader.get_all_weights
        loader.get_all_weights = lambda *args: reads.hand_out(get(*args))
        with reads:
            loader.load_weights(model, config.model_config)
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
    return engine.Started(model, config, unread=sorted(set(reads.name_of.values()) - reads.read))


@contextmanager
def _model(folder: Path, name: str) -> Iterator[tuple[torch.nn.Module, Any]]:
    engine.pretend("cuda")
    stage = STAGES[name]
    arguments = OmniEngineArgs(
        model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=64, enforce_eager=True,
        model_stage=stage.stage, model_arch=stage.architecture, hf_config_name=stage.config,
    )  # fmt: skip
    config = VllmConfig(
        model_config=arguments.create_model_config(),
        device_config=DeviceConfig(device="cpu"),
        load_config=LoadConfig(use_tqdm_on_load=False),
    )
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        _initialize_groups(name)
        if name == "Qwen3-TTS":
            from vllm_omni.model_executor.models.qwen3_tts import qwen3_tts_talker

            qwen3_tts_talker.AutoFeatureExtractor = MagicMock()
            qwen3_tts_talker.Qwen3TTSTokenizerV2Encoder = MagicMock(_from_config=engine.Absent)
            qwen3_tts_talker.Qwen3TTSTalkerForConditionalGeneration._init_runtime_buffers = lambda _: None
        yield initialize_model(vllm_config=config), config


def _initialize_groups(name: str) -> None:
    """vLLM's, instead of those of the diffusion stages; only a model with experts has one for them."""
    if _grouped[-1:] == [name]:
        return
    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        groups.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
        groups.destroy_distributed_environment()
    groups.init_distributed_environment(world_size=1, rank=0, local_rank=0, backend="gloo")
    groups.initialize_model_parallel()
    _grouped.append(name)


_grouped: list[str] = []
