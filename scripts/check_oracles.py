"""Compare our codes and scales with other libraries', bit for bit; prints a Markdown table.

    pip install -e '.[oracles]'
    python scripts/check_oracles.py

Six weights: Gaussian and Student's t (nu = 4) in BF16, Gaussian in float32, a grid of ties in BF16, and two trained
matrices of MiniLM in BF16. Libraries get them in float32, because that is what our arithmetic is, and zeros of both
signs count as equal. A weight is exact if every code and every scale is. Where the codes differ, ``ties`` says how many
of them lie exactly between the two.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import peers
import torch
from peers import Parts, expand, power_of_two

from omni_convert.formats import Format, make_format

RULES = ("floor", "even", "rceil")
GRANULARITIES = ("tensor", "channel", "block")
AWAY, TO_ZERO = "ties go away from zero", "ties go towards zero"
BUMP = "one more where amax is 448 * 2^k"


class Case(NamedTuple):
    package: str
    against: str
    """The method of ours, and the option that matters."""
    quantize: Callable[[torch.Tensor], Parts]
    differs: str = ""


def cases() -> list[Case]:
    """Every comparison, library by library."""
    return [*_torchao(), *_compressed_tensors(), *_modelopt(), *_modelslim(), *_others()]


def _torchao() -> list[Case]:
    mx = [
        Case("torchao", f"{method} {rule}", partial(peers.torchao_mx, method=method, rule=rule))
        for method in ("mxfp8", "mxfp4")
        for rule in RULES
    ]
    fp8 = [Case("torchao", f"fp8 {kind}", partial(peers.torchao_fp8, granularity=kind)) for kind in GRANULARITIES]
    return [Case("torchao", "int8", peers.torchao_int8, "multiplies by 1 / scale"), *fp8, *mx]


def _compressed_tensors() -> list[Case]:
    name, call = "compressed-tensors", peers.compressed_tensors
    return [
        Case(name, "int8", partial(call, bits=8, number="int", strategy="channel"), "scale is amax / 127.5"),
        Case(name, "fp8 tensor", partial(call, bits=8, number="float", strategy="tensor")),
        Case(name, "fp8 channel", partial(call, bits=8, number="float", strategy="channel")),
        Case(name, "fp8 block", partial(call, bits=8, number="float", strategy="block", block_structure=[128, 128])),
        Case(name, "mxfp8 rceil", partial(peers.compressed_tensors_mx, method="mxfp8"), BUMP),
        Case(name, "mxfp4 even", partial(peers.compressed_tensors_mx, method="mxfp4")),
        Case(name, "mxfp4_dualscale", peers.compressed_tensors_dual),
    ]


def _modelopt() -> list[Case]:
    name = "nvidia-modelopt"
    fp8 = [Case(name, f"fp8 {kind}", partial(peers.modelopt, method="fp8", granularity=kind)) for kind in GRANULARITIES]
    return [
        Case(name, "int8", partial(peers.modelopt, method="int8", granularity="channel")),
        *fp8,
        Case(name, "mxfp8 rceil", partial(peers.modelopt_mx, method="mxfp8")),
        Case(name, "mxfp4 rceil", partial(peers.modelopt_mx, method="mxfp4"), TO_ZERO),
    ]


def _modelslim() -> list[Case]:
    name, call = "msmodelslim", peers.modelslim
    return [
        Case(name, "int8", partial(call, scheme="int8_per_channel_sym", algorithm="minmax")),
        Case(name, "fp8 channel", partial(call, scheme="fp8_e4m3_per_channel_sym", algorithm="minmax")),
        Case(name, "mxfp8 floor", partial(call, scheme="mxfp8_per_block_sym", algorithm="minmax"), AWAY),
        Case(name, "mxfp4 even", partial(call, scheme="mxfp4_per_block_sym", algorithm="minmax"), AWAY),
        Case(name, "mxfp4_dualscale", partial(call, scheme="mxfp4_dual_scale_sym", algorithm="dualscale"), AWAY),
    ]


def _others() -> list[Case]:
    rounding = [
        Case(
            "auto-round",
            f"{method} {rule}",
            partial(peers.autoround_mx, method=method, kind=f"mx_{method[2:]}{suffix}"),
        )
        for method in ("mxfp8", "mxfp4")
        for rule, suffix in (("floor", ""), ("rceil", "_rceil"))
    ]
    fp8 = [Case("auto-round", f"fp8 {kind}", partial(peers.autoround_fp8, granularity=kind)) for kind in GRANULARITIES]
    sdnq = [
        Case("sdnq", against, partial(peers.sdnq, method=against.split()[0], granularity=kind))
        for against, kind in (("int8", "channel"), ("fp8 tensor", "tensor"), ("fp8 channel", "channel"))
    ]
    return [*fp8, *rounding, *sdnq, Case("gguf", "mxfp4 floor", peers.gguf_mxfp4, TO_ZERO)]


def our_format(against: str) -> Format:
    method, _, option = against.partition(" ")
    chosen = {"scale_rule": option} if option in RULES else {"granularity": option} if option else {}
    return make_format(method, quality="fast", **chosen)


def ours(weight: torch.Tensor, against: str) -> Parts:
    fmt = our_format(against)
    tensors = fmt.quantize(weight)
    codes = tensors["weight"].float()
    scale = tensors[fmt.suffixes[1]]
    if fmt.name == "int8" or fmt.name == "fp8":
        kind = against.partition(" ")[2] or "channel"
        return Parts(codes, (expand(scale, peers.block_of(kind, weight), weight),))
    scales = [expand(power_of_two(scale), (1, 32), weight)]
    if fmt.name == "mxfp4_dualscale":
        scales.append(expand(tensors["weight_dual_scale"], (1, 512), weight))
    return Parts(codes, tuple(scales))


def samples() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(256, 1024, generator=generator) * 0.02
    spread = torch.randn(4, 256, 1024, generator=generator).square().sum(dim=0) / 4
    student = torch.randn(256, 1024, generator=generator) / spread.sqrt() * 0.02
    grid = torch.arange(1, 257) / 16 * 2.0 ** torch.arange(-4, 4).repeat_interleave(32).unsqueeze(1)
    grid = torch.cat([grid, -grid], dim=1)
    grid[:, ::32] = torch.tensor([1.0, 1.25, 1.5, 1.75, 1.8125, 1.875, 1.9375, 1.96875]).repeat(2) * 16
    matrices = peers.minilm_matrices()
    trained = [matrices[f"encoder.layer.0.{name}.weight"] for name in ("attention.self.query", "output.dense")]
    bf16 = [weight.bfloat16().float() for weight in (normal, student, grid, *trained)]
    return dict(zip(["gauss", "student t", "ties", "query", "output"], bf16, strict=True)) | {"gauss float32": normal}


class Difference(NamedTuple):
    weights: int
    scales: int
    """Weights whose scales differ."""
    codes: int
    """Of the others, those whose codes differ."""
    ties: int
    """Of these, those that lie exactly between the two."""


def compare(weight: torch.Tensor, found: Parts, expected: Parts) -> Difference:
    same = torch.ones_like(weight, dtype=torch.bool)
    quotient = weight
    for scale, theirs in zip(reversed(expected.scales), reversed(found.scales), strict=True):
        same &= scale == theirs
        quotient = quotient / scale
    other = same & (found.codes != expected.codes)
    ties = other & ((found.codes + expected.codes) / 2 == quotient)
    return Difference(weight.numel(), *(int(mask.sum()) for mask in (~same, other, ties)))


def check(case: Case, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    row: dict[str, Any] = {"library": case.package, "version": peers.version(case.package), "against": case.against}
    try:
        with peers.quiet():
            found = [compare(weight, case.quantize(weight), ours(weight, case.against)) for weight in weights.values()]
    except Exception as error:  # another version of a library may have other names
        return row | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    exact = sum(not (one.scales or one.codes) for one in found)
    total = Difference(*map(sum, zip(*found, strict=True)))
    return row | {
        "exact": exact,
        "of": len(found),
        **total._asdict(),
        "differs": case.differs if exact < len(found) else "",
    }


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g} %" if part else "0"


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| library | against | exact | scales differ | codes differ | of them ties | because |", "|---" * 7 + "|"]
    for row in rows:
        name = f"{row['library']} {row['version'] or ''}".strip()
        if "error" in row:
            lines.append(f"| {name} | {row['against']} | | | | | {row['error']} |")
            continue
        ties = percent(row["ties"], row["codes"]) if row["codes"] else ""
        figures = [percent(row["scales"], row["weights"]), percent(row["codes"], row["weights"] - row["scales"]), ties]
        cells = [name, f"{row['against']}", f"{row['exact']}/{row['of']}", *figures, row["differs"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    weights, known = samples(), cases()
    rows = [check(case, weights) for case in known if peers.version(case.package)]
    missing = sorted({case.package for case in known if not peers.version(case.package)})
    rows += [{"library": name, "version": None, "against": "", "error": "not installed"} for name in missing]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print(
        f"omni-convert {peers.version('omni-convert')}, torch {torch.__version__}, Python {platform.python_version()}\n"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
