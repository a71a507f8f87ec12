"""The page of the layer report in a real browser, and the commands that write it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from browser import DESKTOP, PHONE, opened, overflow
from click.testing import CliRunner
from hostile.small import random, snapshot, write_weights
from PIL import Image

import omni_convert
from omni_convert.cli import main
from omni_convert.quality import pictures
from omni_convert.quality.report import LayerReport, report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def found(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> LayerReport:
    folder = tmp_path_factory.mktemp("page") / "out"
    done = omni_convert.convert(minilm, folder, method="int8", target="omni-convert", statistics=True)
    return report(folder, run=done)


@pytest.fixture(scope="module")
def path(found: LayerReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(found.to_html())
    return path


@pytest.fixture
def page(browser: Browser, path: Path) -> Iterator[Page]:
    with opened(browser, path, permissions=["clipboard-read", "clipboard-write"]) as page:
        yield page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_page(browser: Browser, path: Path, found: LayerReport, scheme: str, viewport: dict[str, int]) -> None:
    with opened(browser, path, scheme=scheme, viewport=viewport) as page:
        assert overflow(page) == 0
        assert page.locator("h2").all_inner_texts() == [
            "SQNR of every layer", "The worst layers", "What keeping the worst layers costs", "All layers",
        ]  # fmt: skip
        figures = dict(zip(*(page.locator(part).all_inner_texts() for part in ("dt", "dd")), strict=True))
        assert figures["method"] == "int8" and figures["bits per weight"] == f"{found.conversion.bits_per_weight:.2f}"
        assert page.locator("tbody tr").count() == len(found.conversion.layers)
        assert page.locator(".card").count() == len(found.details)


def test_heat_map_tells_every_layer(page: Page, found: LayerReport) -> None:
    cells = page.locator(".heat i[data-tip]")
    assert cells.count() == len(found.conversion.layers)
    assert page.locator(".heat i.kept").count() == len(found.conversion.layers) - len(found.conversion.quantized)
    worst = found.details[0].layer
    cell = page.locator(f'.heat i[data-tip^="{worst.name}\\a"]')
    cell.hover()
    assert page.locator(".tip").inner_text() == f"{worst.name}\n{worst.sqnr_db:.2f} dB, int8"
    page.locator("h1").hover()
    assert not page.locator(".tip").is_visible()


def test_lower_layers_stand_out_more(browser: Browser, path: Path, found: LayerReport) -> None:
    """Contrast with the paper grows as SQNR falls, in both themes."""
    script = """() => {
        const light = (css) => css.match(/[0-9]+/g).slice(0, 3).reduce((sum, part, i) =>
            sum + [0.2126, 0.7152, 0.0722][i] * (part / 255) ** 2.2, 0);
        const paper = light(getComputedStyle(document.documentElement).backgroundColor);
        return [...document.querySelectorAll(".legend i:not(.kept)")].map((cell) =>
            Math.abs(light(getComputedStyle(cell).backgroundColor) - paper));
    }"""
    for scheme in ("light", "dark"):
        with opened(browser, path, scheme=scheme) as page:
            contrast = page.evaluate(script)
            assert len(contrast) >= 4 and contrast == sorted(contrast)


def test_table(page: Page, found: LayerReport) -> None:
    page.get_by_role("button", name="SQNR dB").click()
    names = page.locator("tbody td:first-child").all_inner_texts()
    assert names[: len(found.details)] == [item.layer.name for item in found.details]
    page.get_by_role("searchbox").fill("output.dense int8")
    shown = page.locator("tbody td:first-child").all_inner_texts()
    assert shown and all("output.dense" in name for name in shown)
    hint = page.get_by_role("searchbox").get_attribute("placeholder") or ""
    page.get_by_role("searchbox").fill(hint.removeprefix("Filter, for example: "))
    assert 0 < page.locator("tbody tr").count() < len(found.conversion.quantized)
    page.get_by_role("searchbox").fill("keep")
    assert page.locator("tbody tr").count() == len(found.conversion.layers) - len(found.conversion.quantized)


def test_copied_line_is_the_one_shown(page: Page, found: LayerReport) -> None:
    card = page.locator(".card").nth(2)
    card.get_by_role("button", name="Copy").first.click()
    card.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == found.details[2].keep


def test_paper(page: Page, tmp_path: Path) -> None:
    page.emulate_media(media="print")
    assert page.locator(".heat").first.is_visible() and not page.get_by_role("searchbox").is_visible()
    assert page.pdf(path=tmp_path / "report.pdf", format="A4").startswith(b"%PDF")


def test_a_model_of_ten_thousand_layers(browser: Browser, found: LayerReport, tmp_path: Path) -> None:
    sample = found.conversion.quantized
    layers = tuple(
        replace(
            sample[place % len(sample)],
            name=f"model.layers.{place // 200}.mlp.experts.{place % 200}.down_proj",
            kind="model.layers.*.mlp.experts.*.down_proj",
            block=place // 200,
        )
        for place in range(10_000)
    )
    path = tmp_path / "large.html"
    path.write_text(replace(found, conversion=replace(found.conversion, layers=layers)).to_html())
    assert path.stat().st_size < 2_500_000
    with opened(browser, path, viewport=PHONE) as page:
        assert overflow(page) == 0
        assert page.locator(".heat i[data-tip]").count() == 50
        page.get_by_role("searchbox").fill("layers.49.mlp experts.199")
        assert page.locator("tbody tr").count() == 1


@pytest.fixture(scope="module")
def deep(found: LayerReport) -> LayerReport:
    """A report of more blocks than a window has pixels for, with gaps between them."""
    sample = found.conversion.quantized[:8]
    layers = tuple(
        replace(layer, name=f"blocks.{block}.k{kind}", kind=f"blocks.*.k{kind}", block=block)
        for block in range(1250)
        for kind, layer in enumerate(sample)
    )
    return replace(found, conversion=replace(found.conversion, layers=layers))


def shares(path: Path) -> float:
    """The share of a picture's pixels that have a colour."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return float((np.ptp(pixels, axis=2) > 24).mean())


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_more_blocks_than_pixels(browser: Browser, deep: LayerReport, viewport: dict[str, int], tmp_path: Path) -> None:
    path, picture = tmp_path / "deep.html", tmp_path / "cells.png"
    path.write_text(deep.to_html())
    with opened(browser, path, viewport=viewport) as page:
        assert overflow(page) == 0
        page.locator(".cells").first.screenshot(path=picture)
        assert shares(picture) > 0.9
        page.emulate_media(media="print")
        assert page.locator("tbody tr").count() == 200
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.locator("tbody tr").count() == 10_000


def test_picture_of_more_blocks_than_pixels(deep: LayerReport, tmp_path: Path) -> None:
    assert shares(next(pictures.write_pictures(deep, tmp_path / "pictures"))) > 0.3


def test_names_that_want_to_be_more(browser: Browser, tmp_path: Path) -> None:
    """Of a hostile file: markup, a block number that nobody can draw up to, one that is no number, no end of a name."""
    names = [
        "a.<img src=x onerror=alert(1)>.0.q",
        "b.999999999.q",
        f"c.{'9' * 5000}.q",
        "d.3.'\"&;$(reboot)`.q",
        "e" * 3000,
    ]
    source = write_weights(tmp_path / "model.safetensors", {f"{name}.weight": random(64, 64) for name in names})
    done = omni_convert.convert(source, tmp_path / "out", method="int8", target="omni-convert", statistics=True)
    path = tmp_path / "report.html"
    path.write_text(report(done.out, run=done).to_html())
    assert path.stat().st_size < 200_000
    with opened(browser, path, viewport=PHONE) as page:
        assert overflow(page) == 0 and page.locator("img").count() == 0
        assert page.locator("tbody tr").count() == len(names)
        lines = page.locator(".copy code").all_inner_texts()
        assert any(shlex.split(line) == ["--ignore", names[3]] for line in lines)


def test_conversion_writes_the_page(browser: Browser, qwen_image: Path, tmp_path: Path) -> None:
    command = ["--method", "int8", "--ignore", "img_mlp", "--report", f"{tmp_path / 'r.html'}"]
    result = CliRunner().invoke(main, [*command, str(qwen_image), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    with opened(browser, tmp_path / "r.html") as page:
        assert "Measured during the conversion." in page.locator("main").inner_text()
        assert page.locator('.heat i.kept[data-tip*="--ignore img_mlp"]').count() > 0
        assert page.locator("dt", has_text="time").count() == 1


def test_command(found: LayerReport, minilm: Path, tmp_path: Path) -> None:
    out = str(found.conversion.path)
    page = tmp_path / "report.html"
    places = ["-o", str(page), "--pictures", str(tmp_path / "pictures")]
    command = ["report", out, "--source", str(minilm), *places, "--json"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["worst"][0]["keep"] == found.details[0].keep
    assert len(data["layers"]) == len(found.conversion.layers)
    assert page.read_text().startswith("<!doctype html>")
    text = CliRunner().invoke(main, ["report", out]).stdout
    assert found.details[0].keep in text and "need --source" in text


@pytest.mark.parametrize("option", ["--report", "-o"])
def test_places_that_cannot_be_written_are_refused_first(
    option: str, found: LayerReport, minilm: Path, tmp_path: Path
) -> None:
    (tmp_path / "link.html").symlink_to(minilm / "config.json")
    before = snapshot(minilm)
    command = [str(minilm), str(tmp_path / "out")]
    if option == "-o":
        command = ["report", str(found.conversion.path), "--source", str(minilm)]
    for place, said in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "r.html", "found no folder"),
        (minilm / "config.json", f"lies in {minilm}"),
        (tmp_path / "link.html", f"lies in {minilm}"),
    ):
        result = CliRunner().invoke(main, [*command, option, str(place)])
        assert result.exit_code == 2 and said in result.output
    assert not (tmp_path / "out").exists() and snapshot(minilm) == before


@pytest.mark.parametrize("option", ["-o", "--pictures"])
def test_the_conversion_stays_as_it_is(option: str, found: LayerReport, tmp_path: Path) -> None:
    out = found.conversion.path
    before = snapshot(out)
    for place in (out / "README.md", out):
        result = CliRunner().invoke(main, ["report", str(out), option, str(place)])
        assert result.exit_code == 2 and f"lies in {out}" in result.output
    assert snapshot(out) == before
    (tmp_path / "file").touch()
    result = CliRunner().invoke(main, ["report", str(out), "--pictures", str(tmp_path / "file")])
    assert result.exit_code == 2 and "is a file" in result.output


def test_a_conversion_does_not_take_its_output_for_the_report(minilm: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for place in (out, out / "r.html"):
        result = CliRunner().invoke(main, ["--method", "int8", "--report", str(place), str(minilm), str(out)])
        assert result.exit_code == 2 and f"lies in {out}" in result.output
    assert not any(out.iterdir())


def test_a_page_that_is_interrupted_leaves_the_conversion(
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: LayerReport) -> str:
        raise KeyboardInterrupt

    command = ["--method", "int8", "--report", str(tmp_path / "r.html"), str(minilm), str(tmp_path / "out")]
    monkeypatch.setattr(LayerReport, "to_html", interrupt)
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1 and "out is complete; only the report is missing" in result.output
    assert "Nothing of this run" not in result.output
    assert omni_convert.verify(tmp_path / "out").ok


@pytest.mark.parametrize("option", ["-o", "--pictures"])
def test_what_the_system_refuses_is_one_paragraph(option: str, found: LayerReport) -> None:
    result = CliRunner().invoke(main, ["report", str(found.conversion.path), option, "/proc/x"])
    assert result.exit_code == 1 and result.stderr.startswith("Error: /proc/x: cannot be written (No such file")


def test_a_full_disk_leaves_the_pictures_before(found: LayerReport, tmp_path: Path) -> None:
    (tmp_path / "size-error.png").symlink_to("/dev/full")
    result = CliRunner().invoke(main, ["report", str(found.conversion.path), "--pictures", str(tmp_path)])
    assert result.exit_code == 1 and f"{tmp_path}: cannot be written (No space left" in result.stderr
    assert f"Wrote {tmp_path / 'sqnr.png'}" in result.stderr and Image.open(tmp_path / "worst-layers.png").width


def test_an_interruption_tells_what_is_kept(
    found: LayerReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: LayerReport) -> str:
        raise KeyboardInterrupt

    page = tmp_path / "report.html"
    command = ["report", str(found.conversion.path), "-o", str(page), "--pictures", str(tmp_path / "pictures")]
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "_heat_maps", interrupt)
        result = CliRunner().invoke(main, command)
    assert result.stderr.endswith(f"Wrote {page}\nError: Interrupted. Nothing else of this run is kept.\n")
    assert result.exit_code == 1 and page.read_text() == report(found.conversion.path).to_html()
    page.unlink()
    monkeypatch.setattr(LayerReport, "to_html", interrupt)
    result = CliRunner().invoke(main, command)
    assert result.stderr.endswith("Error: Interrupted. Nothing of this run is kept.\n") and not page.exists()


def test_a_dry_run_has_no_report(minilm: Path, tmp_path: Path) -> None:
    command = ["--method", "int8", "--dry-run", "--report", str(tmp_path / "r.html"), str(minilm), str(tmp_path / "o")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2 and "--dry-run converts nothing" in result.output
