"""Traced layers in the layer report."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browser import PHONE, opened, overflow
from click.testing import CliRunner

import omni_convert
from omni_convert import OmniConvertError, cli
from omni_convert.quality.trace import keeping_lines

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ENTRY = '{"layer": "model.layers.0.mlp.up_proj", "sqnr_db": 30.0, "format": "int8"}'


def test_traced_errors_stand_beside_those_of_weights(browser: Browser, language_model: Path, tmp_path: Path) -> None:
    out, trace, page_file = tmp_path / "out", tmp_path / "trace.json", tmp_path / "page.html"
    omni_convert.convert(language_model, out, method="int8", target="omni-convert")
    result = omni_convert.compare(language_model, out, task="text", prompt="a red bicycle", trace_layers=True)
    trace.write_text(json.dumps(result.to_dict()))
    report = omni_convert.report(out, trace=trace)
    assert result.trace is not None
    traced = {layer.layer: round(layer.sqnr_db, 3) for layer in result.trace}
    assert {entry["name"]: entry.get("output_sqnr_db") for entry in report.to_dict()["layers"]} == {
        layer.full_name: traced.get(layer.full_name) for layer in report.conversion.layers
    }
    done = CliRunner().invoke(cli.main, ["report", str(out), "--trace", str(trace), "-o", str(page_file)])
    assert done.exit_code == 0, done.output
    with opened(browser, page_file, viewport=PHONE) as page:
        assert overflow(page) == 0
        page.get_by_role("button", name="output dB").click()
        worst = result.trace[0]
        assert page.locator("#layers tbody tr td:nth-child(1)").first.inner_text() == worst.layer
        assert page.locator("#layers tbody tr td:nth-child(4)").first.inner_text() == f"{worst.sqnr_db:.2f}"
        lines = page.locator(".card li").all_inner_texts()
        assert f"its output on real activations: {worst.sqnr_db:.2f} dB" in lines


@pytest.mark.parametrize("spec", [{"method": "int8", "quality": "balanced"}, {"method": "mxfp8", "scale_rule": "even"}])
def test_how_scales_were_chosen_is_no_other_method(spec: dict[str, str], language_model: Path, tmp_path: Path) -> None:
    """The manifest knows, but not the checkpoint that is loaded."""
    out, trace = tmp_path / "out", tmp_path / "trace.json"
    omni_convert.convert(language_model, out, quantization=spec, target="omni-convert", ignore=["down_proj"])
    for candidate in ({"candidate": out}, {"quantization": spec, "target": "omni-convert"}):
        options: dict[str, Any] = {"task": "text", "prompt": "a", "trace_layers": True}
        trace.write_text(json.dumps(omni_convert.compare(language_model, **candidate, **options).to_dict()))  # type: ignore[arg-type]
        report = omni_convert.report(out, trace=trace)
        assert report.outputs.keys() >= {layer.full_name for layer in report.conversion.quantized}


def test_layers_are_named_as_in_the_checkpoint(vision_language_model: Path, tmp_path: Path) -> None:
    """Transformers calls model.layers of Qwen2.5-VL model.language_model.layers."""
    out, trace = tmp_path / "out", tmp_path / "trace.json"
    omni_convert.convert(vision_language_model, out, method="int8", target="omni-convert", ignore=["visual"])
    for candidate in ({"candidate": out}, {"quantization": "int8", "target": "omni-convert", "ignore": ["visual"]}):
        options: dict[str, Any] = {"task": "text", "prompt": "a", "trace_layers": True}
        result = omni_convert.compare(vision_language_model, **candidate, **options)  # type: ignore[arg-type]
        assert result.trace is not None
        names = {layer.layer for layer in result.trace}
        assert "model.layers.0.self_attn.q_proj" in names
        trace.write_text(json.dumps(result.to_dict()))
        report = omni_convert.report(out, trace=trace)
        assert report.outputs.keys() == {layer.full_name for layer in report.conversion.quantized} == names
        for line in keeping_lines(result.trace, 99):
            ignored = shlex.split(line)[1]
            plan = omni_convert.plan(
                vision_language_model, method="int8", target="omni-convert", ignore=["visual", ignored]
            )
            assert sum(bool(tensor.decision.format) for tensor in plan.tensors()) < len(names)


@pytest.fixture
def vision_language_model(qwen_image: Path, tmp_path: Path) -> Path:
    """The text encoder of Qwen-Image, with its tokenizer."""
    folder = Path(shutil.copytree(qwen_image / "text_encoder", tmp_path / "encoder"))
    return Path(shutil.copytree(qwen_image / "tokenizer", folder, dirs_exist_ok=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a file"),
        ("{}", "traces no quantized layer"),
        ('{"trace": null}', "traces no quantized layer"),
        ('{"trace": [{"layer": "other.layer", "sqnr_db": 30.0, "format": "int8"}]}', "traces no quantized layer"),
        (
            f'{{"trace": [{ENTRY}, {{"layer": "x", "sqnr_db": 1.0, "format": "int8"}}]}}',
            "traces 1 layers that .*, as x",
        ),
        (
            f'{{"trace": [{ENTRY.replace("int8", "fp8 (channel)")}]}}',
            r"in fp8 \(channel\), but \S+ has it in int8, expected",
        ),
        (f'{{"trace": [{ENTRY.replace("format", "kind")}]}}', "its trace is damaged"),
        ('{"trace": [{"layer": "x"}]}', "its trace is damaged"),
        ('{"trace": 7}', "its trace is damaged"),
    ],
)
def test_other_files_are_refused(content: str | None, message: str, language_model: Path, tmp_path: Path) -> None:
    omni_convert.convert(language_model, tmp_path / "out", method="int8", target="omni-convert")
    if content is not None:
        (tmp_path / "trace.json").write_text(content)
    with pytest.raises(OmniConvertError, match=message):
        omni_convert.report(tmp_path / "out", trace=tmp_path / "trace.json")
