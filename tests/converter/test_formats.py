"""Every FP8 and MX format from end to end: a real layout converted, read by the safetensors library, and verified."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hostile.small import (
    Tensor,
    random,
    read_json,
    read_weights,
    snapshot,
    to_bits,
    to_values,
    write_json,
    write_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import as_bytes, run_kernel, weights
from safetensors import safe_open

from omni_convert.converter.convert import Report, convert, plan
from omni_convert.converter.hashes import file_sha256
from omni_convert.converter.inspect import inspect
from omni_convert.converter.verify import verify
from omni_convert.formats import format_label, make_format
from omni_convert.formats.base import Facts, Format
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.header import read_header

LAYERS = 12 * 3 - 2 * 3  # of three blocks, without img_mlp
WEIGHTS = "diffusion_pytorch_model.safetensors"
FP8 = {"quant_method": "fp8", "is_checkpoint_fp8_serialized": True, "activation_scheme": "dynamic"}
CONFIG: dict[str, dict[str, Any]] = {
    "fp8": FP8,
    "fp8 block": FP8 | {"weight_block_size": [128, 128]},
    "fp8 4x48": FP8 | {"weight_block_size": [4, 48]},
    "fp8 channel": {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
    "mxfp8": {"quant_method": "mxfp8", "is_checkpoint_mxfp8_serialized": True},
    "mxfp4": {"quant_method": "mxfp4", "is_checkpoint_mxfp4_serialized": True, "mxfp4_scale_alg": 2},
    "mxfp4_dualscale": {"quant_method": "mxfp4_dualscale", "is_checkpoint_serialized": True},
}
BALANCED = [
    f"{kind} balanced" for kind in ("int8", "fp8", "fp8 channel", "fp8 4x48", "mxfp8", "mxfp4", "mxfp4_dualscale")
]
SQNR = {"int8": 41, "fp8": 31.6, "mxfp8": 31.5, "mxfp4": 18.9, "mxfp4_dualscale": 19.1}


def chosen(kind: str) -> dict[str, Any]:
    """``fp8 block balanced`` -> the choices of a recipe."""
    method, *options = kind.split()
    choices: dict[str, Any] = {"method": method}
    for option in options:
        if option == "balanced":
            choices["quality"] = option
        elif "x" in option:
            choices["block_size"] = tuple(map(int, option.split("x")))
        else:
            choices["granularity"] = option
    return choices


class Made(NamedTuple):
    kind: str
    report: Report

    @property
    def out(self) -> Path:
        return self.report.out

    @property
    def fmt(self) -> Format:
        return make_format(**chosen(self.kind))


@pytest.fixture(scope="module", params=CONFIG)
def made(request: pytest.FixtureRequest, qwen_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    out = tmp_path_factory.mktemp("formats") / "out"
    return Made(request.param, convert(qwen_image, out, **chosen(request.param), ignore=["img_mlp"], threads=1))


def layers_of(made: Made) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Every layer that has a scale, with its tensors by suffix."""
    tensors: dict[str, torch.Tensor] = {}
    for path in (made.out / "transformer").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    suffixes = made.fmt.suffixes
    for name in sorted(tensors):
        if name.endswith(f".{suffixes[1]}"):
            layer = name.removesuffix(f".{suffixes[1]}")
            yield layer, {key: tensors[f"{layer}.{key}"] for key in suffixes}


def test_tensors_are_those_of_the_contract(made: Made) -> None:
    layers = dict(layers_of(made))
    assert len(layers) == made.report.layers == LAYERS
    assert not any("img_mlp" in name for name in layers)
    for tensors in layers.values():
        rows, columns = tensors["weight"].shape
        expected = {
            "fp8": {"weight_scale": (torch.float32, (1,))},
            "fp8 block": {"weight_scale_inv": (torch.float32, (-(-rows // 128), -(-columns // 128)))},
            "fp8 4x48": {"weight_scale_inv": (torch.float32, (-(-rows // 4), -(-columns // 48)))},
            "fp8 channel": {"weight_scale": (torch.float32, (rows,))},
        }.get(made.kind, {"weight_scale": (torch.uint8, (rows, columns // 32))})
        expected["weight"] = (torch.float8_e4m3fn, (rows, columns))
        if made.kind == "mxfp4_dualscale":
            expected["weight_dual_scale"] = (torch.float32, (rows, -(-columns // 512), 1))
            expected["mul_scale"] = (torch.float32, (columns,))
            assert torch.equal(tensors["mul_scale"], torch.ones(columns))
        assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == expected
        if "mxfp4" in made.kind:
            assert set(tensors["weight"].float().abs().unique().tolist()) <= {0, 0.5, 1, 1.5, 2, 3, 4, 6}


def test_tensors_are_those_of_the_reference(made: Made, qwen_image: Path) -> None:
    source: dict[str, torch.Tensor] = {}
    for path in (qwen_image / "transformer").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            source |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for layer, tensors in layers_of(made):
        expected = made.fmt.quantize(source[f"{layer}.weight"], Facts(amax=_amax_of_group(source, layer)))
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(as_bytes(tensors[name]), as_bytes(expected[name])) for name in expected), layer


def _amax_of_group(source: dict[str, torch.Tensor], layer: str) -> float:
    """Queries, keys and values share what belongs to a weight as a whole."""
    attention, _, name = layer.rpartition(".")
    fused = [group for group in (["to_q", "to_k", "to_v"], ["add_q_proj", "add_k_proj", "add_v_proj"]) if name in group]
    members = [f"{attention}.{member}" for member in fused[0]] if fused else [layer]
    return max(float(source[f"{member}.weight"].abs().max()) for member in members)


def test_verify_finds_nothing(made: Made, qwen_image: Path) -> None:
    result = verify(made.out, source=qwen_image)
    assert [check.problems for check in result.checks if not check.ok] == []
    assert len(result.layers) == LAYERS
    mean = np.mean([item.sqnr_db for item in result.layers])
    assert mean == pytest.approx(SQNR[made.fmt.name], abs=0.35)
    assert all(0.8 < item.max_error <= 1.0001 for item in result.layers)
    assert {item.layer.removeprefix("transformer."): item.sqnr_db for item in result.layers} == pytest.approx(
        {name.removeprefix("transformer."): value for name, value in made.report.sqnr_db.items()}, rel=1e-4
    )


def test_config(made: Made) -> None:
    config = read_json(made.out / "transformer" / "config.json")["quantization_config"]
    ignored = config.pop("ignore" if made.kind == "fp8 channel" else "ignored_layers")
    assert config == CONFIG[made.kind]
    assert {"img_in", "transformer_blocks.0.img_mlp.net.2", "transformer_blocks.2.img_mod.1"} <= set(ignored)


def test_inspect_names_the_format(made: Made) -> None:
    (part,) = [item for item in inspect(made.out).components if item.name == "transformer"]
    assert part.method == format_label(made.fmt)
    assert part.quantized_layers == LAYERS


def test_same_bytes_with_two_threads(
    made: Made, qwen_image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omni_convert.converter.convert.PIECE_BYTES", 2048)  # many jobs even here
    convert(qwen_image, tmp_path / "out", **chosen(made.kind), ignore=["img_mlp"], threads=2)
    assert snapshot(tmp_path / "out") == snapshot(made.out)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("method", CONFIG)
def test_every_source_dtype(tmp_path: Path, method: str, dtype: str) -> None:
    source = write_model(tmp_path / "model", {}, {"a.weight": random(5, 576, dtype=dtype)})
    convert(source, tmp_path / "out", **chosen(method))
    assert verify(tmp_path / "out", source=source).ok


@pytest.mark.parametrize(("method", "kept"), [("mxfp8", 48), ("mxfp4", 48), ("mxfp4_dualscale", 96)])
def test_layers_whose_columns_do_not_fit_stay_as_they_are(tmp_path: Path, method: str, kept: int) -> None:
    tensors = {"a.weight": random(3, kept), "b.weight": random(3, 128)}
    source = write_model(tmp_path / "model", {}, tensors)
    reasons = [tensor.decision.reason for tensor in plan(source, method=method).tensors() if tensor.name == "a.weight"]
    assert f"K is {kept}, {method} needs a multiple of" in reasons[0]
    assert convert(source, tmp_path / "out", **chosen(method)).layers == 1
    stored = read_weights(tmp_path / "out" / WEIGHTS)
    assert (stored["a.weight"].dtype, stored["a.weight"].data) == ("BF16", tensors["a.weight"].bits.tobytes())
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"]["ignored_layers"] == ["a"]
    assert verify(tmp_path / "out", source=source).ok


@pytest.mark.parametrize("suffix", ["weight", "weight_scale", "weight_scale_inv", "weight_dual_scale", "mul_scale"])
@pytest.mark.parametrize("method", CONFIG)
def test_verify_sees_a_changed_tensor(tmp_path: Path, method: str, suffix: str) -> None:
    if suffix not in make_format(**chosen(method)).suffixes:
        pytest.skip("this format has no such tensor")
    source = write_model(tmp_path / "model", {}, {"a.weight": random(4, 64)})
    convert(source, tmp_path / "out", **chosen(method))
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
        convert(source, tmp_path / "out", **chosen(method))


def verified(tmp_path: Path, weight: Tensor, method: str) -> bool:
    source = write_model(tmp_path / "model", {}, {"a.weight": weight})
    convert(source, tmp_path / "out", **chosen(method))
    with np.errstate(all="ignore"):
        return verify(tmp_path / "out", source=source).ok


def test_a_block_of_zeros_beside_small_weights_is_verified(tmp_path: Path) -> None:
    assert verified(tmp_path, to_bits([[1e-7] * 32 + [0.0] * 32]), "mxfp4_dualscale")


def test_smallest_weights_are_verified_in_int8(tmp_path: Path) -> None:
    assert verified(tmp_path, Tensor("F32", np.array([[1, 2]], "<u4")), "int8")


@pytest.mark.parametrize("method", ["mxfp8", "mxfp4", "fp8", "fp8 block", "fp8 channel", "int8"])
def test_largest_weights_are_verified(tmp_path: Path, method: str) -> None:
    assert verified(tmp_path, Tensor("BF16", np.full((1, 64), 0x7F7F, "<u2")), method)


@pytest.mark.parametrize("method", CONFIG)
def test_zeros_are_verified(tmp_path: Path, method: str) -> None:
    assert verified(tmp_path, to_bits(np.zeros((2, 64))), method)


@pytest.mark.parametrize("kind", BALANCED)
def test_searched_scales_are_verified_and_lose_less(qwen_image: Path, tmp_path: Path, kind: str) -> None:
    found = convert(qwen_image, tmp_path / "found", **chosen(kind))
    assert "balanced" in inspect(tmp_path / "found").to_text()
    plain = convert(qwen_image, tmp_path / "plain", **chosen(kind.removesuffix(" balanced")))
    assert found.bytes_after == plain.bytes_after
    assert found.mean_sqnr_db >= plain.mean_sqnr_db + (0 if kind in ("fp8 balanced", "mxfp8 balanced") else 0.03)
    result = verify(tmp_path / "found", source=qwen_image)
    assert [check.problems for check in result.checks if not check.ok] == []
    assert {item.layer.removeprefix("transformer."): item.sqnr_db for item in result.layers} == pytest.approx(
        {name.removeprefix("transformer."): value for name, value in found.sqnr_db.items()}, rel=1e-4
    )


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(BALANCED), weights((64, 576), normal=True))
def test_searched_scales_stay_within_the_tolerance(kind: str, weight: Tensor) -> None:
    fmt, values = make_format(**chosen(kind)), to_values(weight).astype(np.float64)
    result = run_kernel(fmt, weight)
    error = np.abs(fmt.dequantize_rows(result.tensors) - values)
    assert np.all(error <= 1.0001 * fmt.tolerance(result.tensors))


def test_blocks_that_a_fused_matrix_would_cut_stay_unquantized(qwen_image: Path, tmp_path: Path) -> None:
    decisions = {
        tensor.layer: tensor.decision
        for tensor in plan(qwen_image, method="fp8", block_size=(48, 128)).tensors()
        if tensor.name.startswith("transformer_blocks.0.") and tensor.name.endswith(".weight")
    }
    fused = [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_v_proj")]
    assert {decisions[name].reason for name in fused} == {"engines fuse or cut it, and blocks of 48 rows would not fit"}
    assert decisions["transformer_blocks.0.attn.to_out.0"].format is not None
    report = convert(qwen_image, tmp_path / "out", method="fp8", block_size=(48, 128))
    assert report.layers == LAYERS - 6 * 3
    assert verify(tmp_path / "out", source=qwen_image).ok
