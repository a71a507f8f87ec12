"""Speed of quantized layers on the CPU, relative to BF16 ``F.linear``, as the table that docs/load.md quotes.

    python scripts/bench_linear.py                    K = N = 3072, one thread
    python scripts/bench_linear.py --rows 12288       another N
    python scripts/bench_linear.py --warm             layers do not take turns

Each round runs every layer once, so that a busy moment hits all of them, and none finds its weight in a cache; the best
round of each counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from omni_convert.formats import format_label, make_format
from omni_convert.formats.base import Format
from omni_convert.runtime.linear import QuantizedLinear

FORMATS = (
    make_format("int8"),
    make_format("fp8"),
    make_format("fp8", granularity="channel"),
    make_format("fp8", granularity="block"),
    make_format("mxfp8"),
    make_format("mxfp4"),
    make_format("mxfp4_dualscale"),
)
Layer = Callable[[torch.Tensor], torch.Tensor]
TOKENS = (1, 64, 1024, 4096)


def make_layer(fmt: Format, weight: torch.Tensor) -> Layer:
    rows, columns = weight.shape
    layer = QuantizedLinear(columns, rows, bias=False, dtype=torch.bfloat16, fmt=fmt)
    layer.load_state_dict(fmt.quantize(weight))
    return layer


def best_times(layers: list[Layer], x: torch.Tensor, rounds: int, warm: bool) -> list[float]:
    """Seconds of processor time of each. ``warm``: one after the other, instead of in turns."""
    turns = [(place, layer) for _ in range(rounds) for place, layer in enumerate(layers)]
    best = [float("inf")] * len(layers)
    for place, layer in sorted(turns, key=lambda turn: turn[0]) if warm else turns:
        start = time.thread_time()
        layer(x)
        best[place] = min(best[place], time.thread_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3072)
    parser.add_argument("--columns", type=int, default=3072)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warm", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    weight = torch.randn(arguments.rows, arguments.columns, dtype=torch.bfloat16) * 0.02
    plain = lambda x: torch.nn.functional.linear(x, weight)  # noqa: E731
    layers = [plain, *(make_layer(fmt, weight) for fmt in FORMATS)]
    print(f"| tokens | BF16, ms | {' | '.join(map(format_label, FORMATS))} |")
    print("|---" * (len(layers) + 1) + "|")
    for tokens in TOKENS:
        x = torch.randn(tokens, arguments.columns, dtype=torch.bfloat16)
        with torch.inference_mode():
            rounds = arguments.rounds if tokens > 64 else 4 * arguments.rounds
            reference, *others = best_times(layers, x, rounds, arguments.warm)
        print(f"| {tokens} | {1000 * reference:.2f} | {' | '.join(f'{reference / other:.2f}' for other in others)} |")


if __name__ == "__main__":
    main()
