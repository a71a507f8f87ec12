"""Models that many tests read. Each is made once; nobody writes into its folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hub_cli import Cli
from hub_server import HubServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium; see ``browser.opened``."""
    from browser import chromium

    with chromium() as opened:
        yield opened


@pytest.fixture(scope="session")
def qwen_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small QwenImagePipeline in BF16, random weights."""
    from models import write_qwen_image  # imports torch, which many tests do without

    return write_qwen_image(tmp_path_factory.mktemp("qwen-image"))


@pytest.fixture(scope="session")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small ZImagePipeline in BF16, random weights."""
    from models import write_z_image

    return write_z_image(tmp_path_factory.mktemp("z-image"))


@pytest.fixture(scope="session")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small WanPipeline in BF16, random weights."""
    from models import write_wan

    return write_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small Qwen3ForCausalLM in BF16 with its tokenizer, random weights."""
    from models import write_language_model

    return write_language_model(tmp_path_factory.mktemp("language-model"))


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of the trained all-MiniLM-L6-v2 in float32."""
    from models import minilm_path

    return minilm_path()


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of a small model of every family by its name, written when first asked for."""
    from families import FAMILIES

    class Sources(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = FAMILIES[name].write(tmp_path_factory.mktemp("family"))
            return self[name]

    return Sources()


@pytest.fixture(scope="session")
def outputs(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Those models converted, by family and kind of method, when first asked for."""
    from conversions import write_output

    class Outputs(dict[tuple[str, str], Path]):
        def __missing__(self, key: tuple[str, str]) -> Path:
            self[key] = write_output(sources[key[0]], tmp_path_factory.mktemp("output") / "out", *key)
            return self[key]

    return Outputs()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """An empty Hub of the test's own, which sends large files by plain HTTP."""
    with HubServer(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def xet_hub(tmp_path: Path) -> Iterator[HubServer]:
    """An empty Hub of the test's own with Xet storage."""
    pytest.importorskip("hf_xet", reason="huggingface_hub needs hf_xet for Xet storage")
    with HubServer(tmp_path / "hub", xet=True) as server:
        yield server


@pytest.fixture
def cli(hub: HubServer, tmp_path: Path) -> Cli:
    """The command line with ``hub`` as its Hub and nothing in its cache."""
    return Cli(hub, tmp_path / "work")
