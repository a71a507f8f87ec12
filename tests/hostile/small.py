"""Small checkpoints written byte by byte, without the code under test: whole ones, and ones that are then damaged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import deserialize


class Tensor(NamedTuple):
    """A safetensors dtype and the stored bits, shaped as the tensor is."""

    dtype: str
    bits: NDArray[Any]


class Stored(NamedTuple):
    """A tensor as the safetensors library reads it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


_FLOATS = {"BF16": "<u2", "F16": "<u2", "F32": "<u4", "F64": "<u8"}


def to_bits(values: Any, dtype: str = "BF16") -> Tensor:
    """``values`` in ``dtype`` (BF16 by truncation)."""
    array = np.ascontiguousarray(values, np.float32)
    if dtype == "BF16":
        return Tensor(dtype, (array.view("<u4") >> 16).astype("<u2"))
    wide = {"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]
    return Tensor(dtype, array.astype(wide).view(_FLOATS[dtype]))


def to_values(tensor: Tensor) -> NDArray[np.float32]:
    """The float32 values of stored bits, by NumPy's own conversions."""
    if tensor.dtype == "BF16":
        halves = np.stack([np.zeros_like(tensor.bits), tensor.bits], axis=-1)  # little-endian: low half first
        return halves.view("<f4")[..., 0]
    return tensor.bits.view({"F16": "<f2", "F32": "<f4"}[tensor.dtype]).astype(np.float32)


def random(*shape: int, dtype: str = "BF16", seed: int = 0) -> Tensor:
    values = np.random.default_rng([seed, *shape]).standard_normal(shape)
    return to_bits(values, dtype)


def file_bytes(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file from whatever stands for its header: bytes, text or something to dump as JSON."""
    if not isinstance(header, (bytes, str)):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    data = b""
    for name, tensor in tensors.items():
        piece = tensor.bits.tobytes()
        header[name] = entry(tensor.dtype, list(tensor.bits.shape), len(data), len(data) + len(piece))
        data += piece
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file_bytes(header, data))
    return path


def read_weights(path: Path) -> dict[str, Stored]:
    """A file by the safetensors library."""
    found = deserialize(path.read_bytes())
    return {name: Stored(item["dtype"], tuple(item["shape"]), bytes(item["data"])) for name, item in found}


def read_folder(folder: Path) -> dict[str, Stored]:
    """All safetensors files of a folder."""
    return {name: item for path in folder.glob("*.safetensors") for name, item in read_weights(path).items()}


def as_stored(tensor: Tensor) -> Stored:
    return Stored(tensor.dtype, tensor.bits.shape, tensor.bits.tobytes())


def as_tensor(stored: Stored) -> Tensor:
    """A stored float tensor, to be written again."""
    return Tensor(stored.dtype, np.frombuffer(stored.data, _FLOATS[stored.dtype]).reshape(stored.shape))


def write_json(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def write_sharded(
    folder: Path, shards: list[Mapping[str, Tensor]], config: Any, stem: str = "diffusion_pytorch_model"
) -> Path:
    """A component folder: ``config.json``, an index, and one file per element of ``shards``."""
    names = [f"{stem}-{place:05}-of-{len(shards):05}.safetensors" for place in range(1, len(shards) + 1)]
    for file_name, tensors in zip(names, shards, strict=True):
        write_weights(folder / file_name, tensors)
    weight_map = {name: file for file, tensors in zip(names, shards, strict=True) for name in tensors}
    total = sum(tensor.bits.nbytes for tensors in shards for tensor in tensors.values())
    write_json(
        folder / f"{stem}.safetensors.index.json",
        {"metadata": {"total_size": total, "made_by": "hand"}, "weight_map": weight_map},
    )
    write_json(folder / "config.json", config)
    return folder


def write_model(folder: Path, config: Any = None, tensors: Mapping[str, Tensor] | None = None) -> Path:
    """A component folder with one weight file and no index: a linear layer of an unknown class."""
    tensors = tensors or {"blocks.0.ff.weight": random(16, 24), "blocks.0.ff.bias": random(16)}
    write_weights(folder / "diffusion_pytorch_model.safetensors", tensors)
    write_json(folder / "config.json", {"_class_name": "SomeTransformer2DModel"} if config is None else config)
    return folder


def qwen_shards(dtype: str = "BF16", width: int = 16, seed: int = 0) -> list[Mapping[str, Tensor]]:
    """Two blocks named as in QwenImageTransformer2DModel, in two shards."""
    linears = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]
    linears += ["attn.to_out.0", "attn.to_add_out", "img_mlp.net.2", "txt_mlp.net.2"]
    shards: list[Mapping[str, Tensor]] = []
    for block in range(2):
        tensors = {"img_in.weight": random(width, 8, dtype=dtype, seed=seed)} if block == 0 else {}
        for place, name in enumerate([*linears, "img_mlp.net.0.proj", "txt_mlp.net.0.proj", "img_mod.1"]):
            layer = f"transformer_blocks.{block}.{name}"
            tensors[f"{layer}.weight"] = random(width, width, dtype=dtype, seed=seed + 100 * block + place)
            tensors[f"{layer}.bias"] = random(width, dtype=dtype, seed=seed + place)
        tensors[f"transformer_blocks.{block}.attn.norm_q.weight"] = random(width + 1, dtype=dtype, seed=seed)
        shards.append(tensors)
    return shards


QWEN_CONFIG = {"_class_name": "QwenImageTransformer2DModel", "num_layers": 2, "guidance": None, "eps": 1e-06}


def write_pipeline(folder: Path, *, second: bool = False) -> Path:
    """A pipeline with a transformer (two, if ``second``), a text encoder, and files that are no weights."""
    names = ["transformer", "transformer_2"] if second else ["transformer"]
    for seed, name in enumerate(names):
        write_sharded(folder / name, qwen_shards(seed=seed), QWEN_CONFIG)
    encoder: list[Mapping[str, Tensor]] = [
        {"model.embed_tokens.weight": random(32, 16), "model.layers.0.mlp.up_proj.weight": random(24, 16)},
        {"model.layers.0.mlp.down_proj.weight": random(16, 24), "model.norm.weight": random(16)},
    ]
    write_sharded(folder / "text_encoder", encoder, {"architectures": ["SomeTextModel"]}, stem="model")
    write_json(folder / "scheduler" / "scheduler_config.json", {"shift": 3.0})
    (folder / "assets" / "deep").mkdir(parents=True)
    (folder / "assets" / "deep" / "empty").touch()
    (folder / "README.md").write_bytes(b"not\xfftext")
    index: dict[str, Any] = {"_class_name": "QwenImagePipeline", "scheduler": ["diffusers", "Scheduler"]}
    index |= {name: ["diffusers", "QwenImageTransformer2DModel"] for name in names}
    index |= {"text_encoder": ["transformers", "SomeTextModel"], "image_encoder": [None, None]}
    write_json(folder / "model_index.json", index)
    return folder


def snapshot(folder: Path) -> dict[str, str]:
    """sha256 of every file below ``folder``, by relative path; a folder counts as one with an empty digest."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }
