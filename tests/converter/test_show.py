"""The plan and the report as people and scripts see them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hostile.small import QWEN_CONFIG, qwen_shards, random, write_model, write_pipeline, write_sharded

from omni_convert.converter.convert import Means, convert, needs, plan
from omni_convert.converter.plan import Plan
from omni_convert.converter.show import group_tensors, plan_dict, plan_text, report_text
from omni_convert.formats.text import format_bytes


@pytest.fixture
def planned(tmp_path: Path) -> Plan:
    return plan(write_pipeline(tmp_path / "model", second=True), method="int8", ignore=["img_mlp"])


def test_groups(planned: Plan) -> None:
    groups = group_tensors(planned.components[0])
    assert sum(group.count for group in groups) == sum(1 for _ in planned.components[0].tensors())
    assert sum(group.bytes_before for group in groups) == planned.bytes_before / 2
    assert sum(group.bytes_after for group in groups) == planned.bytes_after / 2
    actions = [group.action for group in groups]
    assert actions == sorted(actions, key=lambda action: action.startswith("keep"))
    found = {group.pattern: group for group in groups}
    query = found["transformer_blocks.*.attn.to_q"]
    assert (query.count, query.action, query.weights) == (2, "int8 (one scale)", 2 * 16 * 16)
    assert (query.bytes_before, query.bytes_after) == (2 * 16 * 16 * 2, 2 * (16 * 16 + 4 * 16))
    ignored = found["transformer_blocks.*.img_mlp.net.2"]
    assert (ignored.count, ignored.action, ignored.why) == (2, "keep BF16", "--ignore img_mlp")


def test_numbers_that_do_not_vary_stay(tmp_path: Path) -> None:
    tensors = {f"blocks.{block}.net.{place}.weight": random(4, 4) for block in range(3) for place in (0, 2)}
    tensors["single.1.ff.weight"] = random(4, 4)
    planned = plan(write_model(tmp_path, {}, tensors), method="int8")
    patterns = {group.pattern for group in group_tensors(planned.components[0])}
    assert "single.1.ff" in patterns
    assert "blocks.*.net.*" in patterns


def test_text_holds_the_facts(planned: Plan) -> None:
    text = plan_text(planned, 123_000_000, 456_000)
    for part in (
        "transformer: QwenImageTransformer2DModel",
        "transformer_2: QwenImageTransformer2DModel",
        "table for Qwen-Image",
        "transformer_blocks.*.attn.to_q",
        "--ignore img_mlp",
        "not a quantizable linear of Qwen-Image",
        f"{format_bytes(planned.bytes_before)} -> {format_bytes(planned.bytes_after)}",
        f"{planned.bits_per_weight:.2f}",
        f"{format_bytes(planned.bytes_copied)} in {len(planned.checkpoint.others)} files",
        "123 MB",
        "456 kB",
    ):
        assert part in text


def test_text_of_an_unknown_class_says_so(tmp_path: Path) -> None:
    text = plan_text(plan(write_model(tmp_path / "model"), method="int8"), 0, 0)
    assert "SomeTransformer2DModel" in text
    assert "no table for this class" in text
    assert "to be loaded by       vLLM-Omni" in text
    other = plan_text(plan(tmp_path / "model", method="int8", target="omni-convert"), 0, 0)
    assert "(by name and shape)" in other
    assert "to be loaded by       omni_convert.load" in other
    assert "2-D weight with no other role in its name" in text


def test_data_holds_the_same_facts(planned: Plan) -> None:
    memory, disk = needs(planned, Means(threads=2))
    data: dict[str, Any] = json.loads(json.dumps(plan_dict(planned, memory, disk), allow_nan=False))
    assert (data["peak_memory"], data["disk_needed"]) == (memory, disk)
    assert (data["bytes_before"], data["bytes_after"]) == (planned.bytes_before, planned.bytes_after)
    assert data["copied"] == {name: file.size for name, file in planned.checkpoint.others.items()}
    assert [part["name"] for part in data["components"]] == ["transformer", "transformer_2"]
    part = data["components"][0]
    assert part["tensors"].keys() == {tensor.name for tensor in planned.components[0].tensors()}
    assert part["tensors"]["transformer_blocks.0.attn.to_q.weight"] == {
        "action": "int8",
        "why": "linear of Qwen-Image",
        "dtype": "BF16",
        "shape": [16, 16],
        "bytes_before": 512,
        "bytes_after": 256 + 64,
    }
    for before_or_after in ("bytes_before", "bytes_after"):
        assert sum(group[before_or_after] for group in part["groups"]) * 2 == data[before_or_after]


def test_final_table(tmp_path: Path) -> None:
    report = convert(write_pipeline(tmp_path / "model"), tmp_path / "out", method="int8")
    text = report_text(report)
    for part in (
        f"{report.layers} to int8",
        f"{format_bytes(report.bytes_before)} -> {format_bytes(report.bytes_after)}",
        f"{report.bits_per_weight:.2f}",
        f"{report.mean_sqnr_db:.2f} dB",
        "GB/s",
        str(tmp_path / "out"),
        *(f"{value:.2f} dB  {layer}" for layer, value in report.worst(3)),
    ):
        assert part in text


def test_layers_that_are_named_are_one_reason(tmp_path: Path) -> None:
    source = write_sharded(tmp_path / "model", [*qwen_shards(width=64)], QWEN_CONFIG)
    names = [f"transformer_blocks.{block}.{name}" for block in (0, 1) for name in ("attn.to_qkv", "txt_mlp.net.2")]
    text = plan_text(plan(source, method="int8", ignore=[*names[:3], "[t]ransformer_blocks.1.txt_mlp.net.2"]), 0, 0)
    assert text.count("--ignore, by name") == 1
    rules = [f"{names[1]}=fp8:channel", f"{names[3]}=fp8:channel", "img_mlp.net.2=none"]
    text = plan_text(plan(source, method="int8", layers=rules, target="omni-convert"), 0, 0)
    assert text.count("--layer, by name: fp8 (channel)") == 1
    assert "--layer img_mlp.net.2=none" in text
