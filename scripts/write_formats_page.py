"""Write the tables of docs/formats.md from the code, and with --measure from the kernels.

    python scripts/write_formats_page.py               the contract, which a test compares with the page
    python scripts/write_formats_page.py --measure     also quality and speed, on a quiet machine, in some minutes

What stands between ``<!-- name -->`` and ``<!-- /name -->`` is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_formats import CHOICES, measure, outputs
from demo_models import minilm_path

from omni_convert.formats import format_label, make_format
from omni_convert.formats.base import Facts, Format
from omni_convert.formats.engine import row_maxima
from omni_convert.formats.target import TARGETS, format_kind

PAGE = Path(__file__).parents[1] / "docs" / "formats.md"
KINDS: Sequence[Format] = (
    make_format("int8"),
    make_format("fp8"),
    make_format("fp8", activation_scheme="static"),
    make_format("fp8", granularity="channel"),
    make_format("fp8", granularity="block"),
    make_format("mxfp8"),
    make_format("mxfp4"),
    make_format("mxfp4_dualscale"),
)
# A shape whose every derived size is another number, so that each shows where it comes from.
SHAPE = (1100, 2240)
SYMBOLS = {
    1100: "N", 2240: "K", 9: "ceil(N / 128)", 18: "ceil(K / 128)", 70: "K / 32", 5: "ceil(K / 512)", 1: "1",
}  # fmt: skip
MATRIX = re.compile(r"encoder\.layer\.\d+\..*(query|key|value|dense)\.weight")


def loaded_by(fmt: Format) -> str:
    """Which targets load it, on which hardware."""
    kind = format_kind(fmt)
    return "; ".join(
        f"{target.title} on {' and '.join(target.formats[kind])}"
        for target in TARGETS.values()
        if kind in target.formats
    )


def flags(fmt: Format) -> str:
    """What to type for it."""
    words = [f"--method {fmt.name}"]
    if "channel" in format_label(fmt) or "block" in format_label(fmt):
        words.append(f"--granularity {getattr(fmt, 'granularity', '')}")
    if "static" in format_label(fmt):
        words.append("--activation-scheme static")
    return f"`{' '.join(words)}`"


def bits_per_weight(fmt: Format, code_bits: int = 8, size: int = 3072) -> float:
    """Of a square matrix, scales included."""
    tensors = fmt.tensors((size, size))
    scales = sum(spec.nbytes for suffix, spec in tensors.items() if suffix != "weight")
    return code_bits + 8 * scales / size**2


def contract() -> str:
    """Tensors, sizes and engines of every kind."""
    lines = ["| | suffix | dtype | shape | bits/weight | loaded natively by |", "|---|---|---|---|---|---|"]
    for fmt in KINDS:
        four_bits = int(np.count_nonzero(fmt.valid_codes)) < 16
        size = f"{bits_per_weight(fmt):.2f}"
        size += f" (device: {bits_per_weight(fmt, 4):.2f})" if four_bits else ""
        first = [flags(fmt), size, loaded_by(fmt)]
        for suffix, spec in fmt.tensors(SHAPE).items():
            shape = ", ".join(SYMBOLS[side] for side in spec.shape) + ("," if len(spec.shape) == 1 else "")
            note = " (e2m1 values)" if four_bits and suffix == "weight" else ""
            lines.append(f"| {first[0]} | `{suffix}` | {spec.dtype}{note} | ({shape}) | {first[1]} | {first[2]} |")
            first = ["", "", ""]
    return "\n".join(lines)


def configs() -> str:
    """What every kind's ``config.json`` announces."""
    lines = ["| | `quantization_config` |", "|---|---|"]
    lines += [f"| {flags(fmt)} | `{json.dumps(fmt.config(['...']))}` |" for fmt in KINDS]
    return "\n".join(lines)


def sqnr_db(fmt: Format, weight: torch.Tensor) -> float:
    """Signal-to-quantization-noise ratio of one BF16 weight."""
    bits = weight.view(torch.uint16).numpy()
    facts = Facts(amax=float(row_maxima(bits, "BF16").max()))
    power = np.empty((len(bits), 2))
    assert fmt.quantize_rows(bits, "BF16", outputs(fmt, bits), power, facts) is None
    signal, noise = power.sum(axis=0)
    return float(10 * np.log10(signal / noise))


def samples() -> dict[str, list[torch.Tensor]]:
    """The weights that quality is measured on."""
    from safetensors.torch import load_file

    rng = np.random.default_rng(1)
    normal = torch.from_numpy(rng.standard_normal((1024, 4096)) * 0.02).to(torch.bfloat16)
    heavy = torch.from_numpy(rng.standard_t(4, (1024, 4096)) * 0.02).to(torch.bfloat16)
    stored = load_file(minilm_path() / "model.safetensors")
    trained = [weight.to(torch.bfloat16) for name, weight in stored.items() if MATRIX.fullmatch(name)]
    return {"normal": [normal], "Student t": [heavy], "MiniLM": trained}


def mean_sqnr(fmt: Format, weights: Iterable[torch.Tensor]) -> float:
    return statistics.mean(sqnr_db(fmt, weight) for weight in weights)


def figures(rounds: int) -> str:
    """Measured quality and speed of every kind that the benchmark knows."""
    weights = samples()
    generator = torch.Generator().manual_seed(0)
    matrix = (torch.randn(12288, 3072, generator=generator) * 0.02).to(torch.bfloat16)
    titles = [f"SQNR dB, {name}" for name in weights]
    lines = [f"| | {' | '.join(titles)} | GB/s of BF16 | of memcpy |", "|---" * (len(titles) + 3) + "|"]
    for name, choice in CHOICES.items():
        fmt = make_format(**choice)
        speed: dict[str, Any] = measure(name, matrix, rounds, 1)
        cells = [f"{mean_sqnr(fmt, group):.2f}" for group in weights.values()]
        cells += [f"{speed['kernel']:.2f}", f"{speed['kernel of memcpy']:.2f}"]
        lines.append(f"| {format_label(fmt)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def replaced(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` as the block ``name``."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"{PAGE}: found no block {name}")
    return pattern.sub(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    page = replaced(replaced(PAGE.read_text(), "contract", contract()), "config", configs())
    if arguments.measure:
        page = replaced(page, "figures", figures(arguments.rounds))
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
