"""``omni_convert.json``: what was done to what, and what the files must be."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hostile.small import read_json, snapshot, write_pipeline

from omni_convert import __version__
from omni_convert.converter.convert import convert
from omni_convert.converter.hashes import file_sha256
from omni_convert.formats.header import read_header

SHARD = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"


@pytest.fixture(params=[False, True], ids=["by header", "by sha256"])
def conversion(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, bool]:
    source, out = write_pipeline(tmp_path / "model"), tmp_path / "out"
    (source / "transformer" / "diffusion_pytorch_model.fp16.safetensors").touch()
    convert(source, out, method="int8", ignore=["txt_mlp", "*.attn.to_out.0"], hash_source=request.param)
    return source, out, request.param


def test_manifest(conversion: tuple[Path, Path, bool]) -> None:
    source, out, hashed = conversion
    manifest = read_json(out / "omni_convert.json")
    assert manifest.keys() == {"omni_convert", "recipe", "files", "source", "components", "cautions"}
    assert manifest["omni_convert"] == __version__
    assert manifest["recipe"] == {
        "method": "int8",
        "quality": "fast",
        "fused_scale": "shared",
        "ignored_layers": ["txt_mlp", "*.attn.to_out.0"],
        "target": "vllm-omni",
        "default_ignore": True,
        "ignore_whole_group": False,
    }
    written = {name: digest for name, digest in snapshot(out).items() if digest and name != "omni_convert.json"}
    assert manifest["files"] == {
        name: {"size": (out / name).stat().st_size, "sha256": digest} for name, digest in written.items()
    }
    described = manifest["source"]
    assert (described["name"], described["kind"]) == ("model", "pipeline")
    assert described["left_out"].keys() == {"transformer/diffusion_pytorch_model.fp16.safetensors"}
    read = {name: digest for name, digest in snapshot(source).items() if digest}
    assert described["files"].keys() == read.keys() - described["left_out"].keys()
    for name, entry in described["files"].items():
        stat = (source / name).stat()
        assert (entry["size"], entry["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)
        assert entry.get("sha256") == (read[name] if hashed else None)
    assert described["files"][SHARD]["header_sha256"] == read_header(source / SHARD).sha256


def test_decision_for_every_tensor(conversion: tuple[Path, Path, bool]) -> None:
    source, out, _ = conversion
    (component,) = read_json(out / "omni_convert.json")["components"].values()
    assert (component["class"], component["architecture"]) == ("QwenImageTransformer2DModel", "Qwen-Image")
    names = {name for path in (source / "transformer").glob("*-of-*") for name in read_header(path).tensors}
    assert component["tensors"].keys() == names
    block = "transformer_blocks.0"
    entries = component["tensors"]
    assert entries[f"{block}.txt_mlp.net.2.weight"] == {"action": "keep", "why": "--ignore txt_mlp"}
    assert entries[f"{block}.attn.to_out.0.weight"] == {"action": "keep", "why": "--ignore *.attn.to_out.0"}
    quantized = entries[f"{block}.img_mlp.net.2.weight"]
    assert (quantized["action"], quantized["why"]) == ("int8", "linear of Qwen-Image")
    assert 30 < quantized["sqnr_db"] < 60


def test_every_weight_file_of_the_source_has_its_header_hashed(conversion: tuple[Path, Path, bool]) -> None:
    source, out, _ = conversion
    files = read_json(out / "omni_convert.json")["source"]["files"]
    weights = {name for name in files if name.endswith(".safetensors")}
    assert len(weights) == 4
    for name in weights:
        assert files[name]["header_sha256"] == read_header(source / name).sha256


def test_quantization_config_has_no_provenance(conversion: tuple[Path, Path, bool]) -> None:
    config = read_json(conversion[1] / "transformer" / "config.json")["quantization_config"]
    assert config.keys() == {
        "quant_method",
        "is_checkpoint_int8_serialized",
        "activation_scheme",
        "ignored_layers",
    }


def test_file_sha256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni_convert.converter.hashes.PIECE_BYTES", 7)
    (tmp_path / "x").write_bytes(bytes(range(100)))
    assert file_sha256(tmp_path / "x") == hashlib.sha256(bytes(range(100))).hexdigest()
