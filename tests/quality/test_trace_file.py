"""Traced layers in the layer report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import PHONE, opened, overflow
from click.testing import CliRunner

import omni_convert
from omni_convert import OmniConvertError, cli

if TYPE_CHECKING:
    from playwright.sync_api import Browser


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a file"),
        ("{}", "traces no quantized layer"),
        ('{"trace": null}', "traces no quantized layer"),
        ('{"trace": [{"layer": "other.layer", "sqnr_db": 30.0}]}', "traces no quantized layer"),
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
