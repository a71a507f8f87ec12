"""The page of an analysis in a real browser: every layer, every method, and a choice."""

from __future__ import annotations

import html
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browser import DESKTOP, PHONE, opened, overflow
from hostile.small import QWEN_CONFIG, qwen_shards, random, write_model, write_sharded

from omni_convert import analyze
from omni_convert.formats.text import format_db
from omni_convert.quality.analysis_page import analysis_page

if TYPE_CHECKING:
    from playwright.sync_api import Browser

METHODS = ["int8", "fp8:channel", "mxfp4"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sharded(tmp_path_factory.mktemp("model"), [*qwen_shards(width=64)], QWEN_CONFIG)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_page(browser: Browser, source: Path, tmp_path: Path, scheme: str, viewport: dict[str, int]) -> None:
    found = analyze(source, METHODS, target="omni-convert", default_ignore=False)
    choice = found.choose(budget="size<=0.8")
    path = tmp_path / "page.html"
    path.write_text(analysis_page(found, choice))
    with opened(browser, path, scheme=scheme, viewport=viewport) as page:
        assert overflow(page) == 0
        assert page.locator("dd").first.inner_text().startswith(format_db(found.mean_sqnr_db(0)))
        assert page.locator("#layers tbody tr").count() == 24
        first = found.layers[0]
        cells = page.locator("#layers tbody tr").first.locator("td").all_inner_texts()
        assert cells[0] == first.layer
        shown = page.locator("#layers tbody tr").first.locator("td.number").all_inner_texts()
        assert shown == [f"{first.sqnr_db[method]:.2f}" for method in METHODS]
        page.locator("#layers").get_by_role("button", name="mxfp4").click()
        worst = min(found.layers, key=lambda item: item.sqnr_db["mxfp4"])
        assert page.locator("#layers tbody td").first.inner_text() == worst.layer
        page.locator("#layers").get_by_role("searchbox").fill("txt_mlp")
        assert page.locator("#layers tbody tr").count() == 4
        assert page.locator("#chosen tbody tr").count() == len(choice.deviating)
        assert page.locator("#sizes tbody tr").count() == 20
        assert page.locator("svg text", has_text="signal to error, dB (higher is better)").is_visible()
        ticks = [float(text) for text in page.locator("svg text[text-anchor=end]").all_text_contents()]
        assert len(ticks) > 2 and all(tick % 10 == 0 for tick in ticks)
        rings = page.locator("circle[fill=transparent]")
        assert rings.count() == len(METHODS)
        rings.nth(2).hover()
        tip = page.locator(".tip").inner_text()
        alone = found.plans[2].bytes_after / found.plans[2].bytes_before
        assert tip.startswith(f"mxfp4: {alone:.1%} of the bytes")


def test_the_line_to_copy_runs(browser: Browser, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(analysis_page(analyze(source, METHODS)))
    with opened(browser, path) as page:
        line = page.locator(".copy code").inner_text()
        assert line.startswith("omni-convert --methods int8,fp8:channel,mxfp4 --target vllm-omni --budget 'size<=0.")
        assert line.endswith("MODEL OUT")
        assert page.get_by_text("img_mlp", exact=False).count() >= 4
        assert page.locator("#chosen").count() == 0
        fields = page.locator("#layers tbody tr", has_text="img_mlp").first.locator("td.number").all_inner_texts()
        assert fields[1] == "\u2013"  # kept by default with fp8


def test_the_line_says_all_that_was_asked(source: Path) -> None:
    asked: dict[str, Any] = {"ignore": ["txt_mlp"], "default_ignore": False, "target": "omni-convert"}
    page = html.unescape(analysis_page(analyze(source, ["fp8", "int8"], layers=["img_mod=int8:per-channel"], **asked)))
    line = re.search(r"omni-convert --methods .* MODEL OUT", page)
    assert line is not None
    words = shlex.split(line[0])
    assert words[1:-4] == [  # then the budget, MODEL and OUT
        "--methods", "fp8,int8", "--target", "omni-convert", "--layer", "img_mod=int8:per-channel",
        "--ignore", "txt_mlp", "--no-default-ignore",
    ]  # fmt: skip


def test_a_model_that_nothing_makes_smaller(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", None, {"blocks.0.ff.weight": random(32, 2)})
    page = analysis_page(analyze(source, ["int8"], target="omni-convert"))
    assert "blocks.0.ff" in page
    assert "What a size costs" not in page


def test_one_layer_and_a_hostile_name(browser: Browser, tmp_path: Path) -> None:
    name = "</script><b>blocks.0"
    source = write_model(tmp_path / "model", None, {f"{name}.weight": random(32, 32)})
    path = tmp_path / "page.html"
    path.write_text(analysis_page(analyze(source, ["int8"])))
    with opened(browser, path) as page:
        assert page.locator("#layers tbody td").first.inner_text() == name
        assert page.locator("b").count() == 0
