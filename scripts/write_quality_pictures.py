"""Write the pictures of ``docs/quality.md``: layer reports of the trained MiniLM and of a small pipeline in INT8, and
the page that compares what the pipeline generates. Needs Chromium.

python scripts/write_quality_pictures.py
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from demo_models import add_outliers, minilm_path, write_qwen_image
from PIL import Image
from playwright.sync_api import sync_playwright

import omni_convert
from omni_convert.quality.pictures import write_pictures

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
WIDTH = 1000
COLOURS = 128
"""Of a screenshot: a third of the bytes."""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.chdir(work)  # so that the page names the models without it
        trained = omni_convert.convert(
            minilm_path(), work / "minilm-int8", method="int8", target="omni-convert", statistics=True
        )
        found = list(write_pictures(omni_convert.report(trained.out, run=trained), PICTURES))
        found += write_pipeline(work)
        for path in found:
            print(path)


def write_pipeline(work: Path) -> list[Path]:
    """The heat map of its layers, and two parts of the page of the comparison."""
    model, out = add_outliers(write_qwen_image(Path("qwen-image"))), Path("qwen-image-int8")
    omni_convert.convert(model, out, method="int8", target="omni-convert")
    heat = PICTURES / "pipeline-sqnr.png"
    shutil.move(next(write_pictures(omni_convert.report(out), work)), heat)
    result = omni_convert.compare(
        model, out, task="t2i", prompt="a cup of coffee", height=64, width=64, num_inference_steps=8,
        gate="strict", trace_layers=True,
    )  # fmt: skip
    page = work / "page.html"
    page.write_text(result.to_html())
    return [
        heat,
        *take(page, {"compare.png": ("header", "section", 3), "trace.png": ("section:has(#layers)", "#layers tr", 11)}),
    ]


def take(page: Path, parts: dict[str, tuple[str, str, int]]) -> list[Path]:
    """Screenshots of a page. ``parts``: by name, the first element, and the last, by selector and number."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": WIDTH, "height": 900})
        view.goto(page.as_uri())
        for name, (first, last, number) in parts.items():
            top, end = view.locator(first).first.bounding_box(), view.locator(last).nth(number - 1).bounding_box()
            assert top and end
            area = {"x": 0, "y": top["y"] - 16, "width": WIDTH, "height": end["y"] + end["height"] - top["y"] + 32}
            view.screenshot(path=PICTURES / name, clip=area, full_page=True)
            picture = Image.open(PICTURES / name).convert("RGB").quantize(COLOURS)
            picture.save(PICTURES / name, optimize=True)
        browser.close()
    return [PICTURES / name for name in parts]


if __name__ == "__main__":
    main()
