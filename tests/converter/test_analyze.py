"""One pass over the source: the figures are those of conversions, for every method, wherever layers lie."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile.small import QWEN_CONFIG, Tensor, qwen_shards, random, write_model, write_pipeline, write_sharded

from omni_convert import OmniConvertError, UsageError, analyze, convert, plan
from omni_convert.converter import measure
from omni_convert.converter.analyze import DEFAULT_METHODS, Analysis
from omni_convert.formats import FORMATS
from omni_convert.formats.quant_config import build_quant_config, method_text, parse_method

METHODS = (
    "int8", "int8:balanced", "int8:per-channel", "fp8", "fp8:channel", "fp8:32x32", "fp8:48x16:balanced", "mxfp8",
    "mxfp4", "mxfp4:floor", "mxfp4:balanced", "mxfp4_dualscale",
)  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two blocks; queries, keys and values of one lie in three shards."""
    first, second = (dict(shard) for shard in qwen_shards(width=64))
    third = {"transformer_blocks.0.attn.to_v.weight": first.pop("transformer_blocks.0.attn.to_v.weight")}
    second["transformer_blocks.0.attn.to_q.weight"] = first.pop("transformer_blocks.0.attn.to_q.weight")
    return write_sharded(tmp_path / "model", [first, second, third], QWEN_CONFIG)


def manifest(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What a conversion says of every layer that it quantized."""
    components = json.loads((out / "omni_convert.json").read_text())["components"]
    return {
        (name, tensor.removesuffix(".weight")): entry
        for name, part in components.items()
        for tensor, entry in part["tensors"].items()
        if "sqnr_db" in entry
    }


def assert_like_conversions(found: Analysis, source: Path, folder: Path, **choices: Any) -> None:
    for number, method in enumerate(found.methods):
        report = convert(source, folder / str(number), method, **choices)
        errors = found.errors[number]
        assert list(report.sqnr_db.values()) == [error.sqnr_db for error in errors.values()]
        assert found.plans[number].bytes_after == report.bytes_after
        assert found.mean_sqnr_db(number) == report.mean_sqnr_db
        entries = manifest(folder / str(number))
        assert entries.keys() == errors.keys()
        for key, error in errors.items():
            assert entries[key]["sqnr_db"] == round(error.sqnr_db, 2)
            assert entries[key].get("shared_scale_db") == (
                None if error.shared_scale_db is None else round(error.shared_scale_db, 2)
            )


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("piece", [1024, 1 << 20])
def test_every_figure_is_that_of_a_conversion(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, piece: int
) -> None:
    monkeypatch.setattr("omni_convert.converter.analyze.PIECE_BYTES", piece)
    found = analyze(source, METHODS, threads=threads)
    assert found.methods == METHODS
    assert_like_conversions(found, source, tmp_path)


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_other_dtypes(tmp_path: Path, dtype: str) -> None:
    source = write_sharded(tmp_path / "model", [*qwen_shards(dtype, width=64)], QWEN_CONFIG)
    assert_like_conversions(analyze(source), source, tmp_path)


def test_several_components(tmp_path: Path) -> None:
    source = write_pipeline(tmp_path / "model", second=True)
    found = analyze(source, ["int8", "fp8"])
    assert_like_conversions(found, source, tmp_path)
    assert {item.component for item in found.layers} == {"transformer", "transformer_2"}
    assert found.title("transformer_2", "a") == "transformer_2.a"


def test_rules_are_those_of_a_conversion(source: Path, tmp_path: Path) -> None:
    choices: dict[str, Any] = {"ignore": ["txt_mlp", "0.attn.to_k"], "ignore_whole_group": True}
    found = analyze(source, ["int8", "fp8"], **choices)
    assert_like_conversions(found, source, tmp_path, **choices)
    kept = {item.layer for item in found.layers if "fp8" not in item.sqnr_db}
    assert kept == {f"transformer_blocks.{n}.img_mlp.net.{name}" for n in (0, 1) for name in ("0.proj", "2")}
    assert not any("txt_mlp" in item.layer or "blocks.0.attn.to_q" in item.layer for item in found.layers)


def test_trained_weights(minilm: Path, tmp_path: Path) -> None:
    found = analyze(minilm, target="omni-convert", memory=6 << 20)
    assert found.methods == DEFAULT_METHODS
    assert_like_conversions(found, minilm, tmp_path, target="omni-convert")


def test_worst_layers_first(minilm: Path) -> None:
    found = analyze(minilm, ["int8"], target="omni-convert")
    values = [item.sqnr_db["int8"] for item in found.layers]
    assert values == sorted(values)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[tuple[str, int]]]:
    """How often every piece of a file is read, by name and offset."""
    found: Counter[tuple[str, int]] = Counter()
    preadv = os.preadv

    def counted(fd: int, buffers: Any, offset: int, *rest: int) -> int:
        found[Path(f"/proc/self/fd/{fd}").readlink().name, offset] += 1
        return preadv(fd, buffers, offset, *rest)

    monkeypatch.setattr(os, "preadv", counted)
    return found


def test_rows_are_read_once_for_all_methods(
    source: Path, reads: Counter[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omni_convert.converter.analyze.PIECE_BYTES", 1024)
    analyze(source, ["int8:per-channel", "fp8:channel", "mxfp8", "mxfp4"], threads=1)
    assert set(reads.values()) == {1}
    assert len(reads) == 24 * 8  # every layer has 8 kB, and some method for it
    reads.clear()
    analyze(source, ["int8", "int8:balanced", "fp8"], threads=1)
    assert set(reads.values()) == {1, 2}  # what shares a scale is seen before, once for all methods


def test_nothing_is_read_before_when_a_weight_is_in_hand(source: Path, reads: Counter[tuple[str, int]]) -> None:
    analyze(source, ["fp8"], threads=1)
    fused = [count for count in reads.values() if count > 1]
    assert len(reads) == 20
    assert len(fused) == 12  # two groups of three in two blocks
    reads.clear()
    analyze(source, ["fp8"], threads=1, ignore=["to_qkv", "add_kv_proj"])
    assert set(reads.values()) == {1}


@pytest.mark.parametrize(
    ("budget", "expected"),
    [("size<=0.2", r"the smallest choice takes \d+ of"), ("size<=1", "keep everything as it is")],
)
def test_what_headers_refuse_costs_no_pass(
    source: Path, tmp_path: Path, reads: Counter[tuple[str, int]], budget: str, expected: str
) -> None:
    with pytest.raises(UsageError, match=expected):
        analyze(source, ["int8", "fp8"], budget=budget)
    with pytest.raises(UsageError, match=expected):
        convert(source, tmp_path / "out", methods=["int8", "fp8"], budget=budget)
    with pytest.raises(UsageError, match="expected sqnr>=DECIBELS"):
        analyze(source, auto_ignore="30")
    assert not reads


def test_methods_that_make_nothing_smaller(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", None, {"blocks.0.ff.weight": random(32, 2)})
    found = analyze(source, ["int8"], target="omni-convert")
    assert found.plans[0].bytes_after > found.plans[0].bytes_before
    assert found.curve() == []
    with pytest.raises(UsageError, match=r'"sqnr>=10": no method makes any of the model smaller'):
        found.choose(auto_ignore="sqnr>=10")


def test_nothing_is_written(source: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    analyze(source)
    assert sorted(tmp_path.rglob("*")) == before


def test_memory_is_limited(source: Path) -> None:
    with pytest.raises(UsageError, match=r"--memory 1000: found a need of at least \d+ bytes"):
        analyze(source, memory=1000)
    plans = [plan(source, method="int8"), plan(source, method="fp8", block_size=(48, 16))]
    one = measure.Settings(threads=1, piece_bytes=1024)
    assert measure.memory_bytes(plans, one) == 2 * 48 * 128 + 2 * 20 * 2 * 64


def test_damage_is_named(tmp_path: Path) -> None:
    weight = random(64, 64)
    weight.bits[40, 3] = 0x7F80
    layer = "transformer_blocks.0.attn.to_out.0"
    source = write_sharded(tmp_path / "model", [{f"{layer}.weight": weight}], QWEN_CONFIG)
    for methods in (["fp8"], ["mxfp8"], ["int8", "fp8"]):
        with pytest.raises(OmniConvertError, match=rf"{layer}\.weight holds NaN or Inf at row 40, column 3"):
            analyze(source, methods, threads=2)


def test_zeros_are_exact(tmp_path: Path) -> None:
    zeros = Tensor("BF16", random(32, 32).bits * 0)
    source = write_model(tmp_path / "model", None, {"blocks.0.ff.weight": zeros, "blocks.1.ff.weight": random(32, 32)})
    found = analyze(source, ["int8"])
    assert found.layers[-1].layer == "blocks.0.ff"
    assert found.to_dict()["layers"][-1]["sqnr_db"] == {"int8": None}


def test_methods_that_the_target_refuses(sources: dict[str, Path]) -> None:
    found = analyze(sources["Wan TI2V-5B"])
    assert found.methods == ("int8", "fp8", "mxfp8")
    assert "its own tools refuse this model with 4 bits" in found.refused["mxfp4"]
    with pytest.raises(UsageError, match="its own tools refuse this model with 4 bits"):
        analyze(sources["Wan TI2V-5B"], ["int8", "mxfp4"])


def test_methods_that_cannot_hold_a_model(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", None, {"blocks.0.ff.weight": random(16, 24)})
    found = analyze(source)
    assert found.methods == ("int8", "fp8")
    assert found.refused["mxfp8"].startswith("model: none of its 1 tensors would be quantized")
    with pytest.raises(OmniConvertError, match="K is 24, mxfp8 needs a multiple of 32"):
        analyze(source, ["mxfp8"])
    with pytest.raises(UsageError, match="no layer of the model matches"):
        analyze(source, ignore=["nothing"])
    with pytest.raises(UsageError, match="found methods beside a method or recipe"):
        analyze(source, ["int8"], method="fp8")


@pytest.mark.parametrize("text", METHODS)
def test_methods_as_typed(text: str) -> None:
    config = build_quant_config(text)
    assert config is not None
    assert not isinstance(config, dict)
    assert method_text(config.format) == text
    assert build_quant_config(parse_method(text)) == config


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_has_its_name(name: str) -> None:
    assert method_text(FORMATS[name]) == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int9", "int9"),
        ("fp8:chanel", "fp8 knows tensor, channel, block"),
        ("int9:channel", "of int8, fp8"),
        ("int8:16x16", "int8 knows"),
        ("fp8:0x16", "as in 128x128"),
        ("fp8:static", "input_scale"),
    ],
)
def test_other_methods(source: Path, text: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        analyze(source, [text])
