"""Measure every format's kernels beside memcpy, beside the torch expression and beside torchao, in one run.

    python scripts/bench_formats.py
    python scripts/bench_formats.py --formats int8 'fp8 channel' --rounds 11

One thread, one BF16 matrix of Qwen-Image's MLP (12288 x 3072), all sides in turn in every round, so that a busy
machine is busy for all of them; medians. Rates are GB/s of BF16 (two bytes per weight, also for dequantization);
``of memcpy`` is the median of the ratios to the copy of the same bytes in the same round.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from omni_convert.formats import format_label, make_format
from omni_convert.formats.base import Facts, Format
from omni_convert.formats.bits import OUTPUT_DTYPE
from omni_convert.formats.engine import row_maxima

TORCH_ROWS = 2048  # of the matrix, for the sides that take long; their float32 temporaries do not fit a cache either
CHUNK_BYTES = 256 << 10  # of BF16: with float32 temporaries about a level-2 cache
PIECE_BYTES = 4 << 20  # what a conversion or verify has in hand at a time
CHOICES: Mapping[str, dict[str, Any]] = {
    "int8": {"method": "int8"},
    "fp8": {"method": "fp8"},
    "fp8 channel": {"method": "fp8", "granularity": "channel"},
    "fp8 block": {"method": "fp8", "granularity": "block"},
    "mxfp8": {"method": "mxfp8"},
    "mxfp4": {"method": "mxfp4"},
    "mxfp4_dualscale": {"method": "mxfp4_dualscale"},
    "int8 balanced": {"method": "int8", "quality": "balanced"},
    "fp8 channel balanced": {"method": "fp8", "granularity": "channel", "quality": "balanced"},
    "fp8 block balanced": {"method": "fp8", "granularity": "block", "quality": "balanced"},
    "mxfp4 balanced": {"method": "mxfp4", "quality": "balanced"},
    "mxfp4_dualscale balanced": {"method": "mxfp4_dualscale", "quality": "balanced"},
}
Task = Callable[[], object]


def outputs(fmt: Format, bits: Any) -> dict[str, Any]:
    """Arrays for the tensors that follow the rows."""
    specs = {name: spec for name, spec in fmt.tensors(bits.shape).items() if name not in fmt.whole_suffixes}
    return {name: np.empty(spec.shape, OUTPUT_DTYPE[spec.dtype]) for name, spec in specs.items()}


def quantizer(fmt: Format, bits: Any, out: dict[str, Any], power: Any) -> Task:
    """Our kernel; a format that needs the weight's largest magnitude finds it first, which counts."""

    def run() -> None:
        facts = Facts(amax=float(row_maxima(bits, "BF16").max())) if "amax" in fmt.needs else Facts()
        assert fmt.quantize_rows(bits, "BF16", out, power, facts) is None

    return run


def dequantizer(fmt: Format, tensors: Mapping[str, Any]) -> Task:
    """Our kernel, in pieces of rows into a reused buffer, as verify works."""
    rows, columns = tensors["weight"].shape
    step = max(1, PIECE_BYTES // (4 * columns) // fmt.rows_per_scale) * fmt.rows_per_scale
    buffer = np.empty((step, columns), np.float32)

    def run() -> None:
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            scales = slice(start // fmt.rows_per_scale, -(-stop // fmt.rows_per_scale))
            piece = {
                name: array if name in fmt.whole_suffixes else array[slice(start, stop) if name == "weight" else scales]
                for name, array in tensors.items()
            }
            fmt.dequantize_rows(piece, buffer[: stop - start])

    return run


def expression(fmt: Format, weight: torch.Tensor, chunk_bytes: int | None) -> Task:
    """The readable torch expression on the whole matrix, or on pieces that fit a cache (where it can be cut so)."""
    step = len(weight)
    if chunk_bytes:
        step = max(1, chunk_bytes // (2 * weight.shape[1]) // fmt.rows_per_scale) * fmt.rows_per_scale
    facts = Facts(amax=float(weight.abs().max()))

    def run() -> None:
        for start in range(0, len(weight), step):
            fmt.quantize(weight[start : start + step], facts)

    return run


def torchao(name: str, weight: torch.Tensor) -> Task | None:
    """torchao's quantization of the same kind, if it is installed and has one."""
    if importlib.util.find_spec("torchao") is None or "balanced" in name or "dual" in name:
        return None
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    from torchao.quantization import quant_primitives as primitives

    rows, columns = weight.shape
    if name == "int8":
        block = (1, columns)

        def int8() -> None:
            scale, zero = primitives.choose_qparams_affine(
                weight, primitives.MappingType.SYMMETRIC, block, torch.int8, -127, 127
            )
            primitives.quantize_affine(weight, block, scale, zero, torch.int8, -127, 127)

        return int8
    if name.startswith("fp8"):
        sizes = {"fp8": [rows, columns], "fp8 channel": [1, columns], "fp8 block": [128, 128]}

        def fp8() -> None:
            scale = primitives._choose_scale_float8(weight, sizes[name])
            primitives._quantize_affine_float8(weight, scale)

        return fp8
    element = torch.float8_e4m3fn if name == "mxfp8" else torch.float4_e2m1fn_x2
    mode = ScaleCalculationMode.RCEIL if name == "mxfp8" else ScaleCalculationMode.EVEN
    return lambda: to_mx(weight, element, 32, mode)


def is_exact(fmt: Format, weight: torch.Tensor) -> bool:
    """Whether the kernel's tensors are the reference's, bit for bit."""
    bits = weight.view(torch.uint16).numpy()
    tensors = outputs(fmt, bits)
    quantizer(fmt, bits, tensors, None)()
    expected = fmt.quantize(weight)
    views = {name: t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for name, t in expected.items()}
    return all(array.tobytes() == views[name].numpy().tobytes() for name, array in tensors.items())


def measure(name: str, weight: torch.Tensor, rounds: int, slow_rounds: int) -> dict[str, Any]:
    """Rates in GB/s of BF16 and ratios to memcpy for one format."""
    fmt = make_format(**CHOICES[name])
    bits = weight.view(torch.uint16).numpy()
    facts = Facts(amax=float(row_maxima(bits, "BF16").max()))
    out, power = outputs(fmt, bits), np.empty((len(bits), 2))
    whole = fmt.whole(bits.shape, facts)
    copy = np.empty_like(bits)
    fast: dict[str, Task] = {
        "memcpy": lambda: np.copyto(copy, bits),
        "kernel": quantizer(fmt, bits, out, None),
        "with error sums": quantizer(fmt, bits, out, power),
        "dequantize": dequantizer(fmt, out | whole),
    }
    part = weight[:TORCH_ROWS]
    slow: dict[str, Task | None] = {
        "torch": expression(fmt, part, None),
        "torch in chunks": expression(fmt, part, CHUNK_BYTES),
        "torchao": torchao(name, part),
    }
    result: dict[str, Any] = {"format": format_label(fmt), "exact": None}
    times = alternate(fast, rounds) | alternate({key: task for key, task in slow.items() if task}, slow_rounds)
    result["exact"] = is_exact(fmt, part)
    for key, seconds in times.items():
        result[key] = (part if key in slow else weight).nbytes / statistics.median(seconds) / 1e9
    for key in ("kernel", "with error sums", "dequantize"):
        result[f"{key} of memcpy"] = statistics.median(
            copied / ours for copied, ours in zip(times["memcpy"], times[key], strict=True)
        )
    return result


def alternate(tasks: Mapping[str, Task], rounds: int) -> dict[str, list[float]]:
    """Seconds of every task in every round, after one round to warm up."""
    times: dict[str, list[float]] = {key: [] for key in tasks}
    for number in range(rounds + 1):
        for key, task in tasks.items():
            started = time.perf_counter()
            task()
            if number:
                times[key].append(time.perf_counter() - started)
    return times


def to_text(results: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    columns = ["kernel", "with error sums", "dequantize", "torch in chunks", "torch", "torchao", "memcpy"]
    titles = {"torch": "torch expression", "torch in chunks": "torch, chunks"}
    lines = ["| format | " + " | ".join(titles.get(name, name) for name in columns) + " | bits |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for result in results:
        cells = []
        for name in columns:
            rate = f"{result[name]:.2f}" if name in result else "-"
            share = result.get(f"{name} of memcpy")
            cells.append(f"{rate} ({share:.2f})" if share else rate)
        lines.append(f"| {result['format']} | {' | '.join(cells)} | {'exact' if result['exact'] else 'DIFFER'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=list(CHOICES), default=list(CHOICES), metavar="NAME")
    parser.add_argument("--rows", type=int, default=12288)
    parser.add_argument("--columns", type=int, default=3072)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--slow-rounds", type=int, default=1, help="of the torch expressions and torchao")
    parser.add_argument("--json", action="store_true", dest="as_json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # torchao's, about its CUDA libraries
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(arguments.rows, arguments.columns, generator=generator) * 0.02).to(torch.bfloat16)
    results = [measure(name, weight, arguments.rounds, arguments.slow_rounds) for name in arguments.formats]
    if arguments.as_json:
        print(json.dumps(results, indent=2))
    else:
        print(f"GB/s of BF16, one thread (of memcpy in the same round), {arguments.rows} x {arguments.columns}\n")
        print(to_text(results))


if __name__ == "__main__":
    main()
