"""Models that many tests read. Each is made once; nobody writes into its folder."""

from pathlib import Path

import pytest


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
def minilm() -> Path:
    """Folder of the trained all-MiniLM-L6-v2 in float32."""
    from models import minilm_path

    return minilm_path()
