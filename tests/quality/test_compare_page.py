"""The page of a comparison in a real Chromium: nothing from the network, sliders move, pictures are the outputs."""

from __future__ import annotations

import base64
import io
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from browser import DESKTOP, PHONE, opened, overflow
from PIL import Image

import omni_convert
from omni_convert.quality.compare_charts import difference, numbered_line
from omni_convert.quality.trace import keeping_lines

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

    from omni_convert.quality.compare import Comparison

HOSTILE = "a cup</style><script>document.title = 'owned'</script>"


@pytest.fixture(scope="module")
def pictures(qwen_image: Path) -> Comparison:
    return omni_convert.compare(
        qwen_image, quantization="int8", task="t2i", prompt=[HOSTILE, "a red bicycle"], height=32, width=48,
        num_inference_steps=3, gate="psnr_db>=5,mae<=0.001", trace_layers=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def page_file(pictures: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(pictures.to_html())
    return path


def pixels(image: Locator) -> Any:
    source = image.get_attribute("src") or ""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))))


def split(slider: Locator) -> float:
    clipped: str = slider.locator(".above").evaluate("image => getComputedStyle(image).clipPath")
    return float(clipped.split()[-1].rstrip("%)"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_page_shows_everything(
    browser: Browser, page_file: Path, pictures: Comparison, scheme: str, viewport: dict[str, int]
) -> None:
    with opened(browser, page_file, scheme=scheme, viewport=viewport) as page:
        assert page.title() == "What changed: int8"
        assert overflow(page) == 0
        assert page.locator("h2").all_inner_texts()[0] == f"Prompt 1: {HOSTILE}"
        assert page.locator(".slider").count() == 2
        assert page.locator("svg").count() == 4
        assert page.locator(".gate .missed").all_inner_texts()[0].startswith("mae ")
        assert page.locator("#layers tbody tr").count() == 36
        assert pictures.trace is not None
        assert page.locator(".copy code").all_inner_texts() == keeping_lines(pictures.trace, 3)
        box = page.locator(".slider").first.bounding_box()
        assert box is not None and box["width"] / box["height"] == pytest.approx(48 / 32, rel=0.02)


def test_pictures_are_the_outputs(browser: Browser, page_file: Path, pictures: Comparison) -> None:
    with opened(browser, page_file) as page:
        for number, pair in enumerate(pictures.pairs):
            below, above = page.locator(".slider").nth(number).locator("img").all()
            assert np.array_equal(pixels(below), pair.reference.output[0])
            assert np.array_equal(pixels(above), pair.candidate.output[0])
            amplified, factor = difference(pair.reference.output[0], pair.candidate.output[0])
            assert np.array_equal(pixels(page.get_by_alt_text("difference of the picture").nth(number)), amplified)
            assert f"difference, {factor} times" in page.locator("figcaption").all_inner_texts()


def test_slider_follows_mouse_and_keyboard(browser: Browser, page_file: Path) -> None:
    with opened(browser, page_file) as page:
        slider = page.locator(".slider").first
        box = slider.bounding_box()
        assert box is not None and split(slider) == 50
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 20)
        page.mouse.up()
        assert split(slider) == pytest.approx(25, abs=1)
        page.keyboard.press("ArrowRight")
        assert split(slider) == pytest.approx(25.5, abs=1)
        page.keyboard.press("End")
        assert split(slider) == 100
        assert split(page.locator(".slider").nth(1)) == 50


def test_slider_follows_a_finger(browser: Browser, page_file: Path) -> None:
    with opened(browser, page_file, viewport=PHONE, has_touch=True) as page:
        slider = page.locator(".slider").first
        slider.scroll_into_view_if_needed()
        box = slider.bounding_box()
        assert box is not None
        page.touchscreen.tap(box["x"] + box["width"] * 0.8, box["y"] + box["height"] / 2)
        assert split(slider) == pytest.approx(80, abs=1)


def test_frames_and_tokens(browser: Browser, wan: Path, language_model: Path, tmp_path: Path) -> None:
    size = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2}
    video = omni_convert.compare(wan, quantization="int8", task="t2v", prompt="a", **size)
    (tmp_path / "video.html").write_text(video.to_html())
    with opened(browser, tmp_path / "video.html") as page:
        assert page.locator(".slider").count() == 6
        assert page.get_by_alt_text("frame 8 of the candidate", exact=True).count() == 1
        assert "6 of 9 frames are shown." in page.locator("p").all_inner_texts()
    words = omni_convert.compare(
        language_model, quantization="fp8", target="omni-convert", task="text", prompt="a red bicycle"
    )
    (tmp_path / "text.html").write_text(words.to_html())
    with opened(browser, tmp_path / "text.html", viewport=PHONE) as page:
        assert overflow(page) == 0
        hidden = "[...document.querySelectorAll('.scroll')].map((box) => box.scrollWidth - box.clientWidth)"
        assert set(page.evaluate(hidden)) == {0}
        rows = page.locator("#tokens-1 tbody tr")
        assert rows.count() == words.pairs[0].reference.output.shape[0]
        assert "".join(page.locator("#tokens-1 td:nth-child(2)").all_inner_texts()).replace(" ", "") == "aredbicycle"


def heights(page: Page, number: int) -> list[float]:
    """Of the dots of a chart above its lowest line, as a share of the way to the highest."""
    chart = page.locator("svg").nth(number)
    grid = chart.locator("path[stroke='var(--line)']").evaluate_all("lines => lines.map((line) => line.getBBox().y)")
    dots = chart.locator("circle").evaluate_all("dots => dots.map((dot) => Number(dot.getAttribute('cy')))")
    return [(max(grid) - dot) / (max(grid) - min(grid)) for dot in dots]


def test_drift_is_told_by_axes_that_show_it(browser: Browser, page_file: Path, pictures: Comparison) -> None:
    with opened(browser, page_file) as page:
        captions = page.locator(".charts figcaption").all_inner_texts()
        assert captions[:2] == ["relative L2, prompt 1", "1 - cosine, logarithmic, prompt 1"]
        distance = [step.relative_l2 for step in pictures.pairs[0].drift]
        assert heights(page, 0) == pytest.approx([value / max(distance) for value in distance], abs=0.01)
        turned = np.log10([1 - step.cosine_similarity for step in pictures.pairs[0].drift])
        low, high = math.floor(turned.min()), math.ceil(turned.max())
        assert heights(page, 1) == pytest.approx((turned - low) / (high - low), abs=0.01)
        labels = page.locator("svg").nth(1).locator("text[text-anchor=end]").all_text_contents()
        assert [float(label) for label in labels[: high - low + 1]] == pytest.approx(10.0 ** np.arange(low, high + 1))


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [math.nan, math.inf], [1e-5], [1e-15, 1e-2], [3.0, 3.0]])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_lines_of_any_values(values: list[float], logarithmic: bool) -> None:
    shown = [value for value in values if math.isfinite(value) and (value > 0 or not logarithmic)]
    drawn = numbered_line(values, "title", "step", logarithmic=logarithmic)
    assert drawn.count("<circle") == len(shown) and "nan" not in drawn and "inf" not in drawn
    for y in map(float, re.findall(r'cy="([^"]+)"', drawn)):
        assert 10 <= y <= 136


@pytest.mark.parametrize(("distance", "factor"), [(0, 64), (1, 64), (9, 16), (40, 4), (255, 1)])
def test_difference_is_amplified_as_far_as_it_goes(distance: int, factor: int) -> None:
    reference = np.zeros((4, 4, 3), np.uint8)
    found, by = difference(reference, reference + np.uint8(distance))
    assert by == factor
    assert (found == distance * factor).all()
