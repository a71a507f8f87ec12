"""Weight SQNR in dB of our formats beside other libraries' at the same bytes on disk; prints a Markdown table.

    pip install -e '.[oracles]'
    pip install --no-deps llmcompressor
    python scripts/compare_quality.py

No calibration data: every library uses the modes that need the weight alone, by its own functions, on BF16 weights, and
what it stored is dequantized in float32. The weights: Gaussian and Student's t (nu = 4), both 1024 x 4096, and the mean
over the 36 matrices of MiniLM's encoder. llm-compressor pins older versions of its dependencies, hence --no-deps.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import peers
import torch

from omni_convert.formats import make_format

Dequantized = Callable[[torch.Tensor], torch.Tensor]
FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"method": "int8"},
    "fp8 channel": {"method": "fp8", "granularity": "channel"},
    "fp8 block": {"method": "fp8", "granularity": "block"},
    "fp8 tensor": {"method": "fp8", "granularity": "tensor"},
    "mxfp8": {"method": "mxfp8"},
    "mxfp4": {"method": "mxfp4"},
    "mxfp4_dualscale": {"method": "mxfp4_dualscale"},
}
SCHEMES = {
    "int8": "int8_per_channel_sym",
    "fp8 channel": "fp8_e4m3_per_channel_sym",
    "mxfp8": "mxfp8_per_block_sym",
    "mxfp4": "mxfp4_per_block_sym",
    "mxfp4_dualscale": "mxfp4_dual_scale_sym",
}
ALGORITHMS = {
    "int8": ("minmax", "ssz"),
    "fp8 channel": ("minmax",),
    "mxfp8": ("minmax", "mse_round"),
    "mxfp4": ("minmax", "ceil_x", "fouroversix"),
    "mxfp4_dualscale": ("dualscale",),
}
"""msModelSlim's, by format."""
MARGIN = 0.0005
"""dB, half of the last digit shown: less is no lead."""


class Mode(NamedTuple):
    format: str
    package: str
    name: str
    quantize: Callable[[torch.Tensor], peers.Parts]


def modes() -> Iterator[Mode]:
    """The other libraries' modes, format by format."""
    for label in FORMATS:
        method, _, granularity = label.partition(" ")
        yield from _torchao(label, method, granularity)
        yield from _llm_compressor(label, method, granularity)
        if method in ("mxfp8", "mxfp4"):
            yield Mode(label, "nvidia-modelopt", "rceil", partial(peers.modelopt_mx, method=method))
            for kind in (f"mx_{method[2:]}", f"mx_{method[2:]}_rceil", f"opt_rtn_mx_{method[2:]}"):
                yield Mode(label, "auto-round", kind, partial(peers.autoround_mx, method=method, kind=kind))
        elif method in ("int8", "fp8"):
            kind = granularity or "channel"
            yield Mode(label, "nvidia-modelopt", "absmax", partial(peers.modelopt, method=method, granularity=kind))
        if method == "int8":
            yield Mode(label, "auto-round", "opt_rtn_int_sym", peers.autoround_int8)
            yield Mode(label, "sdnq", "absmax", partial(peers.sdnq, method=method, granularity="channel"))
        elif method == "fp8":
            yield Mode(label, "auto-round", "fp8_sym", partial(peers.autoround_fp8, granularity=granularity))
        for name in ALGORITHMS.get(label, ()):
            yield Mode(label, "msmodelslim", name, partial(peers.modelslim, scheme=SCHEMES[label], algorithm=name))


def _torchao(label: str, method: str, granularity: str) -> Iterator[Mode]:
    configurations = {"int8": "Int8WeightOnlyConfig", "fp8 channel": "Float8WeightOnlyConfig"}
    if label in configurations:
        name = configurations[label]
        yield Mode(label, "torchao", name, partial(peers.torchao_layer, configuration=name))
    elif method == "fp8":
        yield Mode(label, "torchao", "absmax", partial(peers.torchao_fp8, granularity=granularity))
    elif method in ("mxfp8", "mxfp4"):
        for rule in ("floor", "even", "rceil"):
            yield Mode(label, "torchao", rule, partial(peers.torchao_mx, method=method, rule=rule))


def _llm_compressor(label: str, method: str, granularity: str) -> Iterator[Mode]:
    known: dict[str, dict[str, Any]] = {
        "int8": {"bits": 8, "number": "int", "strategy": "channel"},
        "fp8": {"bits": 8, "number": "float", "strategy": granularity},
        "mxfp8": {"bits": 8, "number": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        "mxfp4": {"bits": 4, "number": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    }
    if method in known:
        how = known[method] | ({"block_structure": [128, 128]} if granularity == "block" else {})
        for name in ("memoryless_minmax", "memoryless_mse"):
            yield Mode(label, "llmcompressor", name, partial(peers.llm_compressor, observer=name, **how))


def ours(label: str, quality: str) -> Dequantized:
    fmt = make_format(quality=quality, **FORMATS[label])
    return lambda weight: fmt.dequantize(fmt.quantize(weight))


def theirs(mode: Mode) -> Dequantized:
    return lambda weight: mode.quantize(weight).dequantized()


def samples() -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (1024, 4096)
    normal = torch.randn(shape, generator=generator)
    spread = sum(torch.randn(shape, generator=generator).square() for _ in range(4)) / 4
    student = torch.randn(shape, generator=generator) / spread.sqrt()
    weights = {
        "Gaussian": [normal * 0.02],
        "Student t": [student * 0.02],
        "MiniLM": list(peers.minilm_matrices().values()),
    }
    return {name: [weight.bfloat16() for weight in group] for name, group in weights.items()}


def sqnr(weight: torch.Tensor, values: torch.Tensor) -> float:
    signal = weight.double()
    noise = (signal - values.double()).square().sum()
    return 10 * math.log10(float(signal.square().sum() / noise))


def measure(row: dict[str, Any], quantize: Dequantized, weights: dict[str, list[torch.Tensor]]) -> dict[str, Any]:
    """``row`` with the mean dB of every group of weights, and the seconds of all."""
    started = time.perf_counter()
    try:
        with peers.quiet(), torch.no_grad():
            for name, group in weights.items():
                found = [sqnr(weight, quantize(weight)) for weight in group]
                row[name] = sum(found) / len(found)
    except Exception as error:  # another version of a library may have other names
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    row["seconds"] = time.perf_counter() - started
    print(f"{row['format']}: {row['library']} {row['mode']}", file=sys.stderr)
    return row


def rows_of(weights: dict[str, list[torch.Tensor]]) -> list[dict[str, Any]]:
    rows = []
    for label in FORMATS:
        for quality in ("fast", "balanced"):
            row = {"format": label, "library": "omni-convert", "mode": quality}
            rows.append(measure(row, ours(label, quality), weights))
        for mode in modes():
            if mode.format == label and peers.version(mode.package):
                row = {"format": label, "library": mode.package, "mode": mode.name}
                rows.append(measure(row, theirs(mode), weights))
    for row in rows:
        own = [one for one in rows if one["format"] == row["format"] and one["library"] == "omni-convert"]
        if row["library"] != "omni-convert" and "error" not in row:
            leads = {name: row[name] - max(one[name] for one in own) for name in weights}
            row["ahead"] = {name: lead for name, lead in leads.items() if lead > MARGIN}
    return rows


def table(rows: list[dict[str, Any]], names: list[str]) -> str:
    lines = [f"| format | library | mode | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
    for row in rows:
        start = f"| {row['format']} | {row['library']} | {row['mode']} |"
        if "error" in row:
            lines.append(f"{start} {row['error']}{' |' * len(names)}")
            continue
        ahead = row.get("ahead", {})
        cells = [f"{row[name]:.3f}" + (f" **(+{ahead[name]:.3f})**" if name in ahead else "") for name in names]
        lines.append(f"{start} {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    weights = samples()
    packages = dict.fromkeys(mode.package for mode in modes())
    rows = rows_of(weights)
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print(
        ", ".join(f"{name} {peers.version(name) or 'not installed'}" for name in ("omni-convert", "torch", *packages))
    )
    print("\nIn bold: how far a library is ahead of the better of ours.\n")
    print(table(rows, list(weights)))


if __name__ == "__main__":
    main()
