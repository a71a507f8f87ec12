"""Pages in a real browser: they load without network, tables work, what is copied is whole, names stay text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import DESKTOP, PHONE, opened, overflow

from omni_convert.quality import html

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOSTILE = "a<script>document.title='owned'</script>\u202e\"'&</style></main>"
COLUMNS = (html.Column(title="layer"), html.Column(title="SQNR", digits=2), html.Column(title="why", wide=True))
ROWS = [("blocks.10.q", 31.25, "x"), ("blocks.2.k", None, "y"), (HOSTILE, -4.0, "z")]
LINE = "--ignore 'blocks.10.q' --ignore-whole-group"


def write(path: Path, rows: list[tuple[str, float | None, str]] = ROWS) -> Path:
    table = html.table("layers", COLUMNS, rows)
    parts = (html.paragraph("So it is."), html.facts([("size", HOSTILE)]), html.copyable(LINE), table)
    path.write_text(html.page(HOSTILE, html.header(HOSTILE, HOSTILE), html.section("All", *parts)))
    return path


def shown(page: Page) -> list[str]:
    return page.locator("tbody tr td:first-child").all_inner_texts()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_page(browser: Browser, tmp_path: Path, scheme: str, viewport: dict[str, int]) -> None:
    with opened(browser, write(tmp_path / "page.html"), scheme=scheme, viewport=viewport) as page:
        assert "owned" in page.title() and page.title().startswith("a<script>")
        assert page.locator("h1").inner_text() == page.locator("dd").inner_text() == page.title()
        assert overflow(page) == 0
        background = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert (sum(map(int, background[4:-1].split(","))) < 384) == (scheme == "dark")


@pytest.mark.parametrize("heading", ["湯気の立つ\u3000一杯の珈琲 " * 9, f"a\u00a0cup\nof {'coffee' * 99}"])
def test_headings_of_any_prompt_fit_a_phone(browser: Browser, tmp_path: Path, heading: str) -> None:
    (tmp_path / "page.html").write_text(html.page("a", html.section(heading)), encoding="utf-8")
    with opened(browser, tmp_path / "page.html", viewport=PHONE) as page:
        assert overflow(page) == 0
        assert page.locator("h2").inner_text() == " ".join(heading.split())


def test_foreign_scripts_do_not_run(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(html.page("still", "<script>document.title = 'owned'</script>"))
    context = browser.new_context()
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.title() == "still"
    context.close()


def test_table_sorts_and_filters(browser: Browser, tmp_path: Path) -> None:
    with opened(browser, write(tmp_path / "page.html")) as page:
        hostile = shown(page)[2]
        assert hostile.startswith("a<script>") and "\\u202e" in hostile
        assert shown(page) == ["blocks.10.q", "blocks.2.k", hostile]
        page.get_by_role("button", name="SQNR").click()
        assert shown(page) == [hostile, "blocks.10.q", "blocks.2.k"]
        page.get_by_role("button", name="SQNR").click()
        assert shown(page) == ["blocks.10.q", hostile, "blocks.2.k"]
        assert page.locator("th[aria-sort=descending]").inner_text() == "SQNR"
        page.get_by_role("button", name="layer").click()
        assert shown(page) == [hostile, "blocks.2.k", "blocks.10.q"]
        page.get_by_role("searchbox").fill("BLOCKS 2")
        assert shown(page) == ["blocks.2.k"]
        assert page.locator("output").inner_text() == "1 of 3"
        assert page.locator("tbody td").all_inner_texts() == ["blocks.2.k", "\u2013", "y"]


def test_many_rows_are_shown_on_demand(browser: Browser, tmp_path: Path) -> None:
    rows: list[tuple[str, float | None, str]] = [(f"layer {place}", float(place), "") for place in range(10_000)]
    path = write(tmp_path / "page.html", rows)
    assert path.stat().st_size < 500_000
    with opened(browser, path) as page:
        assert len(shown(page)) == 200
        page.get_by_role("button", name="Show all 10000").click()
        assert page.locator("tbody tr").count() == 10_000


@pytest.mark.parametrize("clipboard", [True, False], ids=["clipboard", "without"])
def test_copy(browser: Browser, tmp_path: Path, clipboard: bool) -> None:
    with opened(browser, write(tmp_path / "page.html"), permissions=["clipboard-read", "clipboard-write"]) as page:
        if not clipboard:
            page.evaluate("void (navigator.clipboard.writeText = () => Promise.reject())")
        page.get_by_role("button", name="Copy").click()
        page.get_by_role("button", name="Copied").wait_for()
        assert page.evaluate("navigator.clipboard.readText()") == LINE


def test_paper_is_light_and_has_no_buttons(browser: Browser, tmp_path: Path) -> None:
    with opened(browser, write(tmp_path / "page.html"), scheme="dark") as page:
        page.emulate_media(media="print")
        assert not page.get_by_role("button", name="Copy").is_visible()
        assert not page.get_by_role("searchbox").is_visible()
        assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(253, 253, 252)"
