"""The whole product in a minute, on a CPU: convert, inspect, verify, load, run, compare.

``scripts/quickstart`` installs what this needs and runs it.

First a trained text model, whose embeddings must keep their meaning; then an image pipeline in the layout of
Qwen-Image with random weights, whose pictures must stay the same. Exits with 1 if one does not.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo_models import SENTENCES, embed, load_bf16, minilm_path, write_qwen_image

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
MARKER = ".made-by-quickstart"
PROMPT = "a cup of coffee on a wooden table"
SIDE = 256
STEPS = 8
AMPLIFY = 8
ENOUGH = 0.995


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "quickstart-out", help="folder for everything it writes")
    out = parser.parse_args().out
    start = time.monotonic()
    _silence_libraries()
    _fresh(out)
    passed = all([text_model(out), image_pipeline(out)])
    seconds = time.monotonic() - start
    print(f"\n{'Done' if passed else 'FAILED'} in {seconds:.0f} s. Everything is in {_short(out)}")
    return 0 if passed else 1


def text_model(out: Path) -> bool:
    """Convert the trained MiniLM and compare its embeddings, sentence by sentence."""
    from transformers import AutoModel, AutoTokenizer

    import omni_convert

    source, converted = minilm_path(), out / "minilm-int8"
    _title("1. A trained model: all-MiniLM-L6-v2, sentence embeddings")
    page = out / "minilm-report.html"
    _omni_convert("--method", "int8", "--target", "omni-convert", "--report", page, source, converted)
    _omni_convert("inspect", converted)

    print(f'>>> import omni_convert\n>>> model = omni_convert.load("{_short(converted)}")\n')
    tokenizer = AutoTokenizer.from_pretrained(source)
    before = embed(AutoModel.from_pretrained(source), tokenizer, SENTENCES)
    after = embed(omni_convert.load(converted), tokenizer, SENTENCES)
    cosines = (before * after).sum(dim=1).tolist()
    print("cosine  of the embeddings, INT8 vs. float32")
    for cosine, sentence in zip(cosines, SENTENCES, strict=True):
        print(f"{cosine:.4f}  {sentence}")
    same = _neighbours(before) == _neighbours(after)
    print(f"\nnearest sentence of each: {'the same' if same else 'CHANGED'}")
    _print_sizes(source, converted)
    return _check("smallest cosine", min(cosines)) and same


def image_pipeline(out: Path) -> bool:
    """Convert a Qwen-Image pipeline and compare its pictures of the same noise."""
    import omni_convert

    source, converted = out / "qwen-image", out / "qwen-image-int8"
    _title("2. An image pipeline: Qwen-Image in small, random weights")
    write_qwen_image(source, layers=4, heads=16)
    _omni_convert("--method", "int8", "--ignore", "img_mlp", source, converted)
    _omni_convert("inspect", converted)
    _omni_convert("verify", converted, "--source", source)

    print(f'>>> pipe = omni_convert.load("{_short(converted)}")')
    print(f'>>> pipe("{PROMPT}", num_inference_steps={STEPS}, height={SIDE}, width={SIDE}).images[0]\n')
    before = _generate(load_bf16(source))
    after = _generate(omni_convert.load(converted))
    picture = out / "qwen-image.png"
    _side_by_side(before, after).save(picture)
    similarity = _cosine(before, after)
    print(f"cosine  {similarity:.4f}, PSNR {_psnr(before, after):.1f} dB: the picture of INT8 vs. that of BF16")
    _print_sizes(source / "transformer", converted / "transformer")
    print(f"picture {_short(picture)}: texture, not art, as the weights are random")
    return _check("cosine", similarity)


def _omni_convert(*args: str | Path) -> None:
    """Run the command line as a user would, showing the line; a failure ends the quickstart with its exit code."""
    program = Path(sys.executable).with_name("omni-convert")
    words = [_short(arg) if isinstance(arg, Path) else arg for arg in args]
    name = "omni-convert" if shutil.which("omni-convert") == str(program) else _short(program)
    print(f"$ {shlex.join([name, *words])}", flush=True)
    result = subprocess.run([program, *args], check=False)
    print(flush=True)
    if result.returncode:
        sys.exit(result.returncode)


def _generate(pipe: Any) -> Tensor:
    """float32 (3, SIDE, SIDE) in [0, 1], the same noise each time."""
    import torch

    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    result = pipe(PROMPT, num_inference_steps=STEPS, height=SIDE, width=SIDE, generator=noise, output_type="pt")
    return result.images[0].float()


def _neighbours(vectors: Tensor) -> list[int]:
    """For each of the unit vectors (n, d), which other one is closest."""
    similarity = vectors @ vectors.T
    return similarity.fill_diagonal_(-1).argmax(dim=1).tolist()


def _cosine(before: Tensor, after: Tensor) -> float:
    """Cosine of the pixels around mid-grey, where the decoder has its zero."""
    import torch

    return torch.cosine_similarity(before.flatten() - 0.5, after.flatten() - 0.5, dim=0).item()


def _psnr(before: Tensor, after: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1]; infinite if they are equal."""
    return -10 * (before - after).square().mean().log10().item()


def _side_by_side(before: Tensor, after: Tensor) -> Image.Image:
    """The pictures and their amplified difference in a row, each under its caption."""
    from PIL import Image, ImageDraw, ImageFont

    gap, header, footer = 16, 40, 36
    panels = {"BF16": before, "INT8": after, f"difference x {AMPLIFY}": (before - after).abs() * AMPLIFY}
    width = gap + len(panels) * (SIDE + gap)
    sheet = Image.new("RGB", (width, header + SIDE + footer), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (caption, pixels) in enumerate(panels.items()):
        left = gap + column * (SIDE + gap)
        draw.text((left + SIDE / 2, header / 2), caption, "black", ImageFont.load_default(18), anchor="mm")
        array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(array), (left, header))
    note = "Qwen-Image layout, random weights: texture, not art"
    draw.text((width / 2, header + SIDE + footer / 2), note, "dimgray", ImageFont.load_default(13), anchor="mm")
    return sheet


def _check(what: str, value: float) -> bool:
    ok = value >= ENOUGH
    print(f"check   {what} {value:.4f} {'>=' if ok else '<'} {ENOUGH}: {'ok' if ok else 'FAILED'}")
    return ok


def _print_sizes(source: Path, converted: Path) -> None:
    before, after = _weight_bytes(source), _weight_bytes(converted)
    print(f"weights {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB ({after / before:.0%})")


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def _fresh(folder: Path) -> None:
    """An empty ``folder``: an earlier quickstart's output goes, anything else makes us stop."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            sys.exit(f"quickstart: {folder} holds other files; name an empty or a new folder with --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def _short(path: Path) -> str:
    """The path as one would type it from here."""
    return min(str(path.absolute()), os.path.relpath(path), key=len)


def _title(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}\n")


def _silence_libraries() -> None:
    """Keep hints and progress bars of the libraries out of the way; errors still come as exceptions."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # every model is local
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    sys.exit(main())
