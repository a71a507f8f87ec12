"""Self-contained pages: one HTML file without network, for light and dark, for phones and for paper.

Functions return HTML. Whatever comes from a model goes through ``text`` or ``data``: names may hold anything. The
page's content security policy lets run only the script that was written here.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omni_convert.formats.errors import printable

_HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table. ``digits``: after the point, of numbers; None for text. ``wide``: left out on phones."""

    title: str
    digits: int | None = None
    wide: bool = False


def page(title: str, *sections: str, style: str = "", script: str = "") -> str:
    """A whole document. ``style``, ``script``: CSS and JavaScript after those of tables, copy buttons and tips."""
    style, code = (_HERE / "page.css").read_text() + style, (_HERE / "page.js").read_text() + script
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{text(title)}</title>",
            f"<style>{style}</style>",
            "<main>",
            *sections,
            "</main>",
            f"<script>{code}</script>",
            "</html>",
            "",
        ]
    )


def text(value: object) -> str:
    """Anything as text of a page: one line, nothing of it is markup."""
    return html.escape(printable(str(value), 2000))


def name(value: str) -> str:
    """The dotted name of a layer, which may be broken after its dots."""
    return text(value).replace(".", ".<wbr>")


def header(title: str, *lines: str) -> str:
    """The head of a page; ``lines``: plain text below the title."""
    return f"<header><h1>{text(title)}</h1>{''.join(f'<p>{text(line)}</p>' for line in lines)}</header>"


def section(heading: str, *parts: str) -> str:
    """A part of a page; ``parts``: HTML. Any white space of ``heading`` is a space."""
    return f"<section><h2>{text(' '.join(heading.split()))}</h2>{''.join(parts)}</section>"


def paragraph(*sentences: str) -> str:
    return f"<p>{text(' '.join(sentences))}</p>"


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Figures with their names, as tiles."""
    tiles = "".join(f"<div><dt>{text(title)}</dt><dd>{text(value)}</dd></div>" for title, value in rows)
    return f'<dl class="facts">{tiles}</dl>'


def copyable(command: str) -> str:
    """A line for a shell, with a button that copies it."""
    return f'<div class="copy"><code>{name(command)}</code><button type="button">Copy</button></div>'


def table(key: str, columns: Sequence[Column], rows: Iterable[Sequence[str | float | None]], *, hint: str = "") -> str:
    """A table that can be sorted by every column and filtered by words; light also with thousands of rows.

    ``key``: of its element. ``rows``: numbers where the column has ``digits``; None is a dash, and sorts last.
    ``hint``: in the empty field of the filter.
    """
    content = data(
        {"columns": [asdict(column) for column in columns], "rows": [[_cell(value) for value in row] for row in rows]}
    )
    return (
        f'<div class="table" id="{text(key)}">'
        f'<div class="filter"><input type="search" placeholder="{text(hint or "Filter")}" aria-label="Filter rows">'
        '<output></output></div><div class="scroll"><table><thead></thead><tbody></tbody></table></div>'
        f'<button type="button" class="more" hidden>Show all</button>{content}'
        "<noscript>This table needs JavaScript.</noscript></div>"
    )


def _cell(value: str | float | None) -> str | float | None:
    return printable(value, 2000) if isinstance(value, str) else value


def data(values: Mapping[str, Any]) -> str:
    """JSON for a script, which finds it in the element around it."""
    encoded = json.dumps(values, separators=(",", ":"), allow_nan=False)  # ASCII: no line separators, no bidi controls
    for mark in "<>&":
        encoded = encoded.replace(mark, f"\\u{ord(mark):04x}")
    return f'<script type="application/json">{encoded}</script>'
