"""``omni-convert models``: what each target loads, for people and for scripts."""

from __future__ import annotations

import json
import re

from omni_convert.converter.models import models_dict, models_text
from omni_convert.formats.target import TARGETS


def test_data_says_for_every_method_where_it_runs_or_why_not() -> None:
    data = json.loads(json.dumps(models_dict()))
    assert data.keys() == TARGETS.keys()
    assert data["omni-convert"]["architectures"] == []
    found = {entry["name"]: entry for entry in data["vllm-omni"]["architectures"]}
    assert len(found) == 17
    for entry in found.values():
        assert entry["methods"].keys() == data["vllm-omni"]["formats"].keys()
        for method in entry["methods"].values():
            assert bool(method["hardware"]) != bool(method["refused"])
    assert found["Qwen-Image"]["methods"]["int8"] == {
        "flags": "--method int8",
        "status": "loaded",
        "hardware": ["CUDA", "Ascend NPU"],
        "refused": None,
        "kept_by_default": [],
        "cautions": [],
    }
    assert found["Qwen-Image"]["methods"]["fp8 block"]["kept_by_default"] == [r"\.img_mlp\."]
    assert found["FLUX.2-dev"]["classes"] == ["Flux2Transformer2DModel"]
    assert "Flux2KleinPipeline" in found["FLUX.2-klein"]["pipelines"]
    assert len(found["HunyuanImage-3.0"]["methods"]["int8"]["cautions"]) == 1


def test_text_holds_the_same_facts() -> None:
    text = models_text()
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    for entry in models_dict()["vllm-omni"]["architectures"]:
        cells = re.split(r"\s{2,}", rows[entry["name"]])[1:]
        methods = entry["methods"].values()
        assert [cell.startswith("no") for cell in cells] == [bool(method["refused"]) for method in methods]
        assert [method["status"] for method in methods] == ["refused" if m["refused"] else "loaded" for m in methods]
    for part in (
        "int8 on CUDA and Ascend NPU",
        "mxfp8 on Ascend NPU",
        "any linear of any class",
        r"\.img_mlp\.",
        "TypeError",
    ):
        assert part in text
