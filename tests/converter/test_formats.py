"""Every MX format from end to end: a real layout converted, read by the safetensors library, and verified."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile.small import Tensor, random, read_json, read_weights, snapshot, to_bits, write_json, write_model
from quantized import as_bytes
from safetensors import safe_open

from omni_convert.converter.convert import Report, convert, plan
from omni_convert.converter.manifest import file_sha256
from omni_convert.converter.verify import verify
from omni_convert.formats import FORMATS
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.header import read_header

LAYERS = 12 * 3 - 2 * 3  # of three blocks, without img_mlp
WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG: dict[str, dict[str, Any]] = {
    "mxfp8": {"is_checkpoint_mxfp8_serialized": True},
    "mxfp4": {"is_checkpoint_mxfp4_serialized": True, "mxfp4_scale_alg": 2},
    "mxfp4_dualscale": {"is_checkpoint_serialized": True},
}
SQNR = {"mxfp8": 31.5, "mxfp4": 18.9, "mxfp4_dualscale": 19.1}


@pytest.fixture(scope="module", params=CONFIG)
def made(request: pytest.FixtureRequest, qwen_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    out = tmp_path_factory.mktemp("formats") / "out"
    return convert(qwen_image, out, method=request.param, ignore=["img_mlp"], threads=1)


def layers_of(out: Path) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Every layer that has a scale, with its tensors by suffix."""
    tensors: dict[str, torch.Tensor] = {}
    for path in (out / "transformer").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in sorted(tensors):
        if name.endswith(".weight_scale"):
            layer = name.removesuffix(".weight_scale")
            suffixes = ("weight", "weight_scale", "weight_dual_scale", "mul_scale")
            yield layer, {key: tensors[f"{layer}.{key}"] for key in suffixes if f"{layer}.{key}" in tensors}


def test_tensors_are_those_of_the_contract(made: Report) -> None:
    layers = dict(layers_of(made.out))
    assert len(layers) == made.layers == LAYERS
    assert not any("img_mlp" in name for name in layers)
    for tensors in layers.values():
        rows, columns = tensors["weight"].shape
        expected = {
            "weight": (torch.float8_e4m3fn, (rows, columns)),
            "weight_scale": (torch.uint8, (rows, columns // 32)),
        }
        if made.method == "mxfp4_dualscale":
            expected["weight_dual_scale"] = (torch.float32, (rows, -(-columns // 512), 1))
            expected["mul_scale"] = (torch.float32, (columns,))
            assert torch.equal(tensors["mul_scale"], torch.ones(columns))
        assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == expected
        if made.method != "mxfp8":
            assert set(tensors["weight"].float().abs().unique().tolist()) <= {0, 0.5, 1, 1.5, 2, 3, 4, 6}


def test_tensors_are_those_of_the_reference(made: Report, qwen_image: Path) -> None:
    source: dict[str, torch.Tensor] = {}
    for path in (qwen_image / "transformer").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            source |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for layer, tensors in layers_of(made.out):
        expected = FORMATS[made.method].quantize(source[f"{layer}.weight"])
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(as_bytes(tensors[name]), as_bytes(expected[name])) for name in expected), layer


def test_verify_finds_nothing(made: Report, qwen_image: Path) -> None:
    result = verify(made.out, source=qwen_image)
    assert [check.problems for check in result.checks if not check.ok] == []
    assert len(result.layers) == LAYERS
    assert np.mean([item.sqnr_db for item in result.layers]) == pytest.approx(SQNR[made.method], abs=0.3)
    assert all(0.8 < item.max_error <= 1.0001 for item in result.layers)
    assert {item.layer.removeprefix("transformer."): item.sqnr_db for item in result.layers} == pytest.approx(
        {name.removeprefix("transformer."): value for name, value in made.sqnr_db.items()}, rel=1e-4
    )


def test_config(made: Report) -> None:
    config = read_json(made.out / "transformer" / "config.json")["quantization_config"]
    ignored = config.pop("ignored_layers")
    assert config == {"quant_method": made.method} | CONFIG[made.method]
    assert {"img_in", "transformer_blocks.0.img_mlp.net.2", "transformer_blocks.2.img_mod.1"} <= set(ignored)


def test_same_bytes_with_two_threads(
    made: Report, qwen_image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omni_convert.converter.execute.JOB_BYTES", 2048)  # many jobs even here
    convert(qwen_image, tmp_path / "out", method=made.method, ignore=["img_mlp"], threads=2)
    assert snapshot(tmp_path / "out") == snapshot(made.out)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("method", CONFIG)
def test_every_source_dtype(tmp_path: Path, method: str, dtype: str) -> None:
    source = write_model(tmp_path / "model", {}, {"a.weight": random(5, 576, dtype=dtype)})
    convert(source, tmp_path / "out", method=method)
    assert verify(tmp_path / "out", source=source).ok


@pytest.mark.parametrize(("method", "kept"), [("mxfp8", 48), ("mxfp4", 48), ("mxfp4_dualscale", 96)])
def test_layers_whose_columns_do_not_fit_stay_as_they_are(tmp_path: Path, method: str, kept: int) -> None:
    tensors = {"a.weight": random(3, kept), "b.weight": random(3, 128)}
    source = write_model(tmp_path / "model", {}, tensors)
    reasons = [tensor.decision.reason for tensor in plan(source, method=method).tensors() if tensor.name == "a.weight"]
    assert f"K is {kept}, {method} needs a multiple of" in reasons[0]
    assert convert(source, tmp_path / "out", method=method).layers == 1
    stored = read_weights(tmp_path / "out" / WEIGHTS)
    assert (stored["a.weight"].dtype, stored["a.weight"].data) == ("BF16", tensors["a.weight"].bits.tobytes())
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"]["ignored_layers"] == ["a"]
    assert verify(tmp_path / "out", source=source).ok


@pytest.mark.parametrize("suffix", ["weight", "weight_scale", "weight_dual_scale", "mul_scale"])
@pytest.mark.parametrize("method", CONFIG)
def test_verify_sees_a_changed_tensor(tmp_path: Path, method: str, suffix: str) -> None:
    if suffix not in FORMATS[method].suffixes:
        pytest.skip("this format has no such tensor")
    source = write_model(tmp_path / "model", {}, {"a.weight": random(4, 64)})
    convert(source, tmp_path / "out", method=method)
    path = tmp_path / "out" / WEIGHTS
    data = bytearray(path.read_bytes())
    tensor = read_header(path).tensors[f"a.{suffix}"]
    data[tensor.start + (2 if tensor.spec.dtype == "F32" else 0)] ^= 0x7E
    path.write_bytes(data)
    manifest = read_json(tmp_path / "out" / "omni_convert.json")
    manifest["files"][WEIGHTS]["sha256"] = file_sha256(path)
    write_json(tmp_path / "out" / "omni_convert.json", manifest)
    with np.errstate(all="ignore"):
        assert not verify(tmp_path / "out", source=source).ok


@pytest.mark.parametrize("method", CONFIG)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_weight_is_located(tmp_path: Path, method: str, value: float) -> None:
    values = np.ones((40, 96 + 32), np.float32)
    values[37, 101] = value
    source = write_model(tmp_path / "model", {}, {"a.weight": to_bits(values)})
    with pytest.raises(OmniConvertError, match=r"a\.weight.*row 37.*column 101"):
        convert(source, tmp_path / "out", method=method)


def verified(tmp_path: Path, weight: Tensor, method: str) -> bool:
    source = write_model(tmp_path / "model", {}, {"a.weight": weight})
    convert(source, tmp_path / "out", method=method)
    with np.errstate(all="ignore"):
        return verify(tmp_path / "out", source=source).ok


def test_a_block_of_zeros_beside_small_weights_is_verified(tmp_path: Path) -> None:
    assert verified(tmp_path, to_bits([[1e-7] * 32 + [0.0] * 32]), "mxfp4_dualscale")


def test_smallest_weights_are_verified_in_int8(tmp_path: Path) -> None:
    assert verified(tmp_path, Tensor("F32", np.array([[1, 2]], "<u4")), "int8")


@pytest.mark.parametrize("method", ["mxfp8", "mxfp4"])
def test_largest_weights_are_verified(tmp_path: Path, method: str) -> None:
    assert verified(tmp_path, Tensor("BF16", np.full((1, 64), 0x7F7F, "<u2")), method)


@pytest.mark.parametrize("method", CONFIG)
def test_zeros_are_verified(tmp_path: Path, method: str) -> None:
    assert verified(tmp_path, to_bits(np.zeros((2, 64))), method)
