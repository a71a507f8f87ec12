"""Write the pictures of ``docs/quality.md``: the layer report of the trained MiniLM in INT8.

python scripts/write_quality_pictures.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from demo_models import minilm_path

import omni_convert
from omni_convert.quality.pictures import write_pictures

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "minilm-int8"
        run = omni_convert.convert(minilm_path(), out, method="int8", target="omni-convert", statistics=True)
        for path in write_pictures(omni_convert.report(out, run=run), PICTURES):
            print(path)


if __name__ == "__main__":
    main()
