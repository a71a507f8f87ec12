"""Every ``bash`` and ``python`` block of the README and of ``docs/`` runs, in order, page by page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks(page: Path) -> list[tuple[str, str]]:
    return _BLOCK.findall(page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(
    page: Path, qwen_image: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a Hub of the tests' own, where the token is that of the user ``me``."""
    blocks = _blocks(page)
    shutil.copytree(qwen_image, tmp_path / "model")
    hub.store.add_folder("Qwen/Qwen-Image", qwen_image)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name, value in hub.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    # A page may start where another one ends: with a converted model.
    if not any("model/ out/\n" in text and "dry-run" not in text.splitlines()[-1] for _, text in blocks):
        _run(["omni-convert", "--method", "int8", "model/", "out/"], tmp_path)
    python = ""
    for language, text in blocks:
        if language == "bash":
            _run(["bash", "-euc", text], tmp_path)
        else:
            python += text
    if python:
        _run([sys.executable, "-c", python], tmp_path)


def test_pages_have_snippets() -> None:
    assert len(_blocks(ROOT / "README.md")) >= 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_formats_page_is_what_the_code_says() -> None:
    sys.path.append(str(ROOT / "scripts"))
    import write_formats_page as writer

    page = writer.PAGE.read_text()
    assert writer.replaced(writer.replaced(page, "contract", writer.contract()), "config", writer.configs()) == page


def _run(command: list[str], folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
