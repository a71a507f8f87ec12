"""Small quantized checkpoints on disk, made with the reference quantizer and the libraries' own ``save_pretrained``."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kinds import KINDS
from safetensors.torch import load_file, save_file

import omni_convert
from omni_convert.formats.base import Facts, Format
from omni_convert.formats.config import LayerRule, QuantizationConfig
from omni_convert.formats.int8 import Int8
from omni_convert.runtime.parallel import Rank

Quantize = Callable[..., Path]
INT8 = Int8()


KEPT = "embed|norm|proj_out|img_in|txt_in"


def quantize_folder(
    source: Path, target: Path, keep: str = KEPT, fmt: Format = INT8, layers: Mapping[str, Format] | None = None
) -> Path:
    """Quantize every 2-D weight of a model folder whose name does not match ``keep``; shards keep their names.

    ``layers``: regular expression -> the format of layers that match it, instead of ``fmt``.
    """
    shutil.copytree(source, target)
    rules, ignored = [], []
    index_path = next(target.glob("*.index.json"), None)
    index = json.loads(index_path.read_text()) if index_path else {"weight_map": {}}
    for shard in sorted(target.glob("*.safetensors")):
        tensors: dict[str, torch.Tensor] = {}
        for name, value in load_file(shard).items():
            layer = name.removesuffix(".weight")
            if value.ndim != 2 or layer == name or re.search(keep, name):
                tensors[name] = value
                ignored += [layer] if value.ndim == 2 else []
                continue
            own = next((other for pattern, other in (layers or {}).items() if re.search(pattern, layer)), fmt)
            rules += [LayerRule(layer, own)] if own != fmt else []
            for suffix, part in own.quantize(value, Facts(input_scale=0.25)).items():
                tensors[f"{layer}.{suffix}"] = part.contiguous()
                index["weight_map"][f"{layer}.{suffix}"] = shard.name
        save_file(tensors, shard, metadata={"format": "pt"})
    if index_path:
        index_path.write_text(json.dumps(index))
    config = json.loads((target / "config.json").read_text())
    names = (*ignored, "transformer_blocks.0.attn.to_qkv")
    announced = QuantizationConfig(format=fmt, ignored_layers=names, layers=tuple(rules), is_serialized=True)
    config["quantization_config"] = announced.to_dict()
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="session")
def quantize() -> Quantize:
    return quantize_folder


@pytest.fixture(scope="session")
def qwen_plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=32, joint_attention_dim=48, axes_dims_rope=(8, 12, 12)
    )
    path = tmp_path_factory.mktemp("qwen")
    model.to(torch.bfloat16).save_pretrained(path, max_shard_size="400KB")
    return path


@pytest.fixture(scope="session")
def qwen(qwen_plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized QwenImageTransformer2DModel, sharded."""
    return quantize_folder(qwen_plain, tmp_path_factory.mktemp("qwen-int8") / "transformer")


@pytest.fixture(scope="session")
def zimage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized ZImageTransformer2DModel, sharded."""
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        dim=96, n_layers=2, n_refiner_layers=1, n_heads=3, n_kv_heads=3, cap_feat_dim=48,
        axes_dims=[8, 12, 12], axes_lens=[64, 64, 64],
    )  # fmt: skip
    path = tmp_path_factory.mktemp("zimage")
    model.to(torch.bfloat16).save_pretrained(path, max_shard_size="400KB")
    return quantize_folder(path, path.with_name("zimage-int8"), keep="embedder|norm|final_layer")


def _bert_config() -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=32, architectures=["BertModel"],
    )  # fmt: skip


@pytest.fixture(scope="session")
def bert_plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertModel

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("bert")
    BertModel(_bert_config()).to(torch.bfloat16).save_pretrained(path, max_shard_size="60KB")
    return path


@pytest.fixture(scope="session")
def bert(bert_plain: Path) -> Path:
    """A quantized BertModel, sharded."""
    return quantize_folder(bert_plain, bert_plain.with_name("bert-int8"))


@pytest.fixture(scope="session")
def masked_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized BertForMaskedLM: its names start with ``bert.``, its head is quantized too."""
    from transformers import BertForMaskedLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("masked-bert")
    BertForMaskedLM(_bert_config()).to(torch.bfloat16).save_pretrained(path)
    return quantize_folder(path, path.with_name("masked-bert-int8"))


@pytest.fixture(scope="session", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture(scope="session")
def qwen_kind(kind: str, qwen_plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A QwenImageTransformer2DModel in every kind of format."""
    return quantize_folder(qwen_plain, tmp_path_factory.mktemp("qwen") / "transformer", fmt=KINDS[kind])


@pytest.fixture(scope="session")
def bert_kind(kind: str, bert_plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BertModel in every kind of format."""
    return quantize_folder(bert_plain, tmp_path_factory.mktemp("bert") / "model", fmt=KINDS[kind])


@pytest.fixture
def model(qwen_kind: Path) -> Any:
    """``qwen_kind``, loaded."""
    return omni_convert.load(qwen_kind)


@pytest.fixture
def bert_model(bert_kind: Path) -> Any:
    """``bert_kind``, loaded."""
    return omni_convert.load(bert_kind)


@pytest.fixture
def qwen_inputs() -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 16, 64, dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(1, 5, 48, dtype=torch.bfloat16),
        "timestep": torch.tensor([0.5], dtype=torch.bfloat16),
        "img_shapes": [[(1, 4, 4)]],
        "return_dict": False,
    }


@pytest.fixture
def bert_inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(20).reshape(2, 10)}


@pytest.fixture
def group_of_one() -> Iterator[Rank]:
    """The only rank of a process group: it holds all parts, and exchanges them with itself."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Rank(0, 1)
    dist.destroy_process_group()
