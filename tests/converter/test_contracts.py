"""What a conversion stores beside codes, what it refuses, and what verify needs no source to see."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversions import own_failures
from hostile.small import (
    random,
    read_json,
    read_weights,
    to_bits,
    write_json,
    write_model,
    write_pipeline,
)
from quantized import run_kernel

from omni_convert.converter.convert import convert, plan
from omni_convert.converter.hashes import file_sha256
from omni_convert.converter.show import plan_text
from omni_convert.converter.verify import verify
from omni_convert.formats import FORMATS, make_format
from omni_convert.formats.config import parse_config
from omni_convert.formats.errors import OmniConvertError, UsageError
from omni_convert.formats.header import read_header

WEIGHTS = "diffusion_pytorch_model.safetensors"
FP8 = {"quant_method": "fp8", "is_checkpoint_fp8_serialized": True, "activation_scheme": "dynamic"}
SUFFIXES = sorted({name for fmt in FORMATS.values() for name in fmt.suffixes if name != "weight"} | {"input_scale"})


def patch(out: Path, suffix: str, place: int, byte: int) -> None:
    """Change one byte of tensor ``a.suffix``, and the manifest with it."""
    path = out / WEIGHTS
    data = bytearray(path.read_bytes())
    data[read_header(path).tensors[f"a.{suffix}"].start + place] = byte
    path.write_bytes(data)
    manifest = read_json(out / "omni_convert.json")
    manifest["files"][WEIGHTS]["sha256"] = file_sha256(path)
    write_json(out / "omni_convert.json", manifest)


@pytest.mark.parametrize("rule", ["floor", "even", "rceil"])
@pytest.mark.parametrize("method", ["mxfp8", "mxfp4"])
def test_scale_rule_is_verified_as_the_manifest_says(tmp_path: Path, method: str, rule: str) -> None:
    weight = random(64, 256)
    source = write_model(tmp_path / "model", {}, {"a.weight": weight})
    convert(source, tmp_path / "out", method=method, scale_rule=rule)
    result = verify(tmp_path / "out", source=source)
    assert result.ok
    assert 0.9 < result.layers[0].max_error <= 1.0001
    tensor = read_weights(tmp_path / "out" / WEIGHTS)["a.weight_scale"]
    assert tensor.data == run_kernel(make_format(method, scale_rule=rule), weight).scale.tobytes()


@pytest.mark.parametrize("threads", [1, 2])
def test_the_largest_weight_counts_wherever_it_stands(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omni_convert.converter.convert.PIECE_BYTES", 256)
    values = np.ones((100, 64), np.float32)
    values[97, 5] = -448
    source = write_model(tmp_path / "model", {}, {"a.weight": to_bits(values), "b.weight": to_bits(values / 448)})
    convert(source, tmp_path / "out", method="fp8", threads=threads)
    stored = read_weights(tmp_path / "out" / WEIGHTS)
    assert np.frombuffer(stored["a.weight_scale"].data, "<f4").tolist() == [1]
    assert np.frombuffer(stored["b.weight_scale"].data, "<f4").tolist() == [np.float32(1 / 448)]


@pytest.mark.parametrize("threads", [1, 2])
def test_nonfinite_weight_beside_a_weight_that_waits_for_it(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omni_convert.converter.convert.PIECE_BYTES", 256)
    values = np.ones((100, 64), np.float32)
    values[50, 5] = np.nan
    source = write_model(tmp_path / "model", {}, {"a.weight": to_bits(values)})
    with pytest.raises(OmniConvertError, match=r"a\.weight.*row 50, column 5"):
        convert(source, tmp_path / "out", method="fp8", threads=threads)
    assert not (tmp_path / "out").exists()


def test_static_activations_take_recorded_scales(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", {}, {"a.weight": random(4, 64), "b.weight": random(4, 64)})
    scales = {"a": 0.5, "b": 0.0625}
    convert(source, tmp_path / "out", method="fp8", activation_scheme="static", input_scales=scales)
    stored = read_weights(tmp_path / "out" / WEIGHTS)
    for layer, scale in scales.items():
        assert np.frombuffer(stored[f"{layer}.input_scale"].data, "<f4").tolist() == [scale]
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert config == FP8 | {"activation_scheme": "static", "ignored_layers": []}
    assert verify(tmp_path / "out", source=source).ok


@pytest.mark.parametrize(
    ("suffix", "byte", "said"),
    [
        ("weight", 0x7F, "holds 127 at [2, 1], expected a code of mxfp4"),
        ("weight", 0x31, "holds 49 at [2, 1], expected a code of mxfp4"),
        ("weight_scale", 0xFF, "holds 255 at [1, 1], expected a finite positive scale"),
    ],
)
def test_verify_needs_no_source_to_see_what_cannot_be(tmp_path: Path, suffix: str, byte: int, said: str) -> None:
    source = write_model(tmp_path / "model", {}, {"a.weight": random(4, 64)})
    convert(source, tmp_path / "out", method="mxfp4")
    patch(tmp_path / "out", suffix, 2 * 64 + 1 if suffix == "weight" else 3, byte)
    (check,) = own_failures(verify(tmp_path / "out"))
    assert check.problems == (f"a.{suffix}: {said}.",)


def test_verify_compares_config_and_recipe(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", {}, {"a.weight": random(4, 64)})
    convert(source, tmp_path / "out", method="fp8")
    manifest = read_json(tmp_path / "out" / "omni_convert.json")
    manifest["recipe"]["granularity"] = "channel"
    write_json(tmp_path / "out" / "omni_convert.json", manifest)
    (check,) = own_failures(verify(tmp_path / "out"))
    assert "FP8_PER_CHANNEL_PER_TOKEN" in check.problems[0]


def test_static_scales_of_two_transformers(tmp_path: Path) -> None:
    source = write_pipeline(tmp_path / "model", second=True)
    with pytest.raises(UsageError, match="--activation-scales has no scale for"):
        plan(source, method="fp8", activation_scheme="static", input_scales={"transformer_blocks.0.attn.to_q": 1.0})
    layers = {tensor.layer for tensor in plan(source, method="fp8").tensors() if tensor.decision.format}
    scales = dict.fromkeys(layers, 0.5) | {f"transformer_2.{layer}": 0.25 for layer in layers}
    convert(source, tmp_path / "out", method="fp8", activation_scheme="static", input_scales=scales)
    assert verify(tmp_path / "out", source=source).ok
    for name, expected in (("transformer", 0.5), ("transformer_2", 0.25)):
        for path in (tmp_path / "out" / name).glob("*.safetensors"):
            for tensor, stored in read_weights(path).items():
                if tensor.endswith(".input_scale"):
                    assert np.frombuffer(stored.data, "<f4").tolist() == [expected]


@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), "x", True])
def test_scales_from_python_are_checked_too(tmp_path: Path, value: Any) -> None:
    source = write_model(tmp_path / "model", {}, {"a.weight": random(4, 64)})
    with pytest.raises(UsageError, match="finite"):
        convert(source, tmp_path / "out", method="fp8", activation_scheme="static", input_scales={"a": value})


def test_names_that_are_parts_of_quantized_ones_are_spelled_exactly(tmp_path: Path) -> None:
    """ModelOpt's list is searched for parts of names, so a kept proj_out would keep every block's."""
    names = ("proj_out", "blocks.0.proj_out", "head")
    tensors = {f"{name}.weight": random(4, 64) for name in names}
    source = write_model(tmp_path / "model", {}, tensors)
    for granularity, expected in (("channel", ["head", "[p]roj_out"]), ("tensor", ["head", "proj_out"])):
        out = tmp_path / granularity
        assert convert(source, out, method="fp8", granularity=granularity).layers == 1
        config = read_json(out / "config.json")["quantization_config"]
        ignored = config.get("ignore", config.get("ignored_layers"))
        assert sorted(ignored) == sorted(expected)
        quantized = ["blocks.0.proj_out"]
        hit = [name for name in quantized for rule in ignored if fnmatch(name, rule) or rule in name]
        assert granularity == "tensor" or not hit
        assert fnmatch("proj_out", "[p]roj_out")
        assert sorted(parse_config(config).ignored_layers) == ["head", "proj_out"]
        assert verify(out, source=source).ok


def test_experts_in_one_tensor_stay_and_are_listed(tmp_path: Path) -> None:
    tensors = {"mlp.experts.gate_up_proj": random(3, 4, 64), "a.weight": random(4, 64)}
    source = write_model(tmp_path / "model", {}, tensors)
    convert(source, tmp_path / "out", method="fp8")
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert config["ignored_layers"] == ["mlp.experts.gate_up_proj"]
    assert "mlp.experts.gate_up_proj" in plan_text(plan(source, method="fp8"), 0, 0)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_source_with_the_name_of_a_scale_is_refused(tmp_path: Path, suffix: str) -> None:
    tensors = {"a.weight": random(4, 64), f"a.{suffix}": random(64, dtype="F32")}
    source = write_model(tmp_path / "model", {}, tensors)
    with pytest.raises(OmniConvertError, match=f"already quantized.*a.{suffix}"):
        convert(source, tmp_path / "out", method="mxfp4_dualscale")


def test_int8_layers_too_tall_for_an_npu_stay(tmp_path: Path) -> None:
    tensors = {"a.weight": random(65536, 16), "b.weight": random(65535, 16)}
    source = write_model(tmp_path / "model", {}, tensors)
    assert convert(source, tmp_path / "out", method="int8").layers == 1
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"]["ignored_layers"] == ["a"]


@pytest.mark.parametrize(
    ("kind", "suffix", "byte", "said"),
    [
        ("int8", "weight", 0x80, "holds -128 at [0, 0], expected a code of int8"),
        ("mxfp8", "weight", 0x80, "holds 128 at [0, 0], expected a code of mxfp8"),
        ("mxfp4_dualscale", "mul_scale", 0x01, "at [0], expected 1.0"),
        ("static", "input_scale", 0x01, "at [0], expected 0.5"),
    ],
)
def test_verify_knows_what_is_never_written(tmp_path: Path, kind: str, suffix: str, byte: int, said: str) -> None:
    source = write_model(tmp_path / "model", {}, {"a.weight": random(4, 64)})
    static: dict[str, Any] = {"method": "fp8", "activation_scheme": "static", "input_scales": {"a": 0.5}}
    convert(source, tmp_path / "out", **(static if kind == "static" else {"method": kind}))
    patch(tmp_path / "out", suffix, 0, byte)
    (check,) = own_failures(verify(tmp_path / "out"))
    assert said in check.problems[0]


def test_an_error_a_little_beyond_the_tolerance_is_seen(tmp_path: Path) -> None:
    """The weight is 0.45 of a step from its own code and 0.55 from the next."""
    values = np.full((1, 64), 8.45, np.float32)
    values[0, 0] = 127
    source = write_model(tmp_path / "model", {}, {"a.weight": to_bits(values, "F32")})
    convert(source, tmp_path / "out", method="int8")
    for code, ok in ((8, True), (9, False), (7, False)):
        patch(tmp_path / "out", "weight", 5, code)
        with np.errstate(all="ignore"):
            assert verify(tmp_path / "out", source=source).ok is ok
