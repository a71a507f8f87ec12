"""Small checkpoints in real layouts, shared with the quickstart: defined once, in ``scripts/demo_models.py``."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from demo_models import (
    SENTENCES,
    add_outliers,
    embed,
    load_bf16,
    minilm_path,
    write_language_model,
    write_qwen_image,
    write_wan,
    write_z_image,
)

__all__ = [
    "SENTENCES",
    "add_outliers",
    "embed",
    "load_bf16",
    "minilm_path",
    "write_language_model",
    "write_qwen_image",
    "write_wan",
    "write_z_image",
]
