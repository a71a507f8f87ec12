"""Speed and memory of quantized linears, and of a whole transformer made of them, on a GPU, as Markdown tables.

    python scripts/bench_runtime.py
    python scripts/bench_runtime.py --formats int8,fp8 --tokens 1024,4096 --layers 0

Linears: every token count with every shape of a Qwen-Image block, beside cuBLAS in BF16 and, where it is installed,
torchao. Each round runs every layer once, with the L2 cache flushed in between, so that a busy moment hits all of them;
the median of the rounds counts. The rightmost columns are ratios to BF16: above 1 is faster.

Transformer: Diffusers' Qwen-Image in its own widths with random weights, `--layers 60` being the whole of it; every
linear inside its blocks is quantized.

`--device cpu` is for trying the script out.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omni_convert.formats import make_format
from omni_convert.formats.base import Format
from omni_convert.runtime.kernels import choose, device_of
from omni_convert.runtime.linear import QuantizedLinear

FORMATS: dict[str, Format] = {
    "int8": make_format("int8"),
    "fp8": make_format("fp8"),
    "fp8-channel": make_format("fp8", granularity="channel"),
    "fp8-block": make_format("fp8", granularity="block"),
    "mxfp8": make_format("mxfp8"),
    "mxfp4": make_format("mxfp4"),
}
TOKENS = "1,16,1024,4096,16384"
SHAPES = "3072x3072,12288x3072,3072x12288"
"""N x K: attention, into and out of the MLP."""
TEXT = 512
"""Tokens of the prompt, which the transformer takes beside those of the image."""
TEXT_WIDTH = 3584

Layer = Callable[[Tensor], Tensor]


def quantize(linear: nn.Linear, fmt: Format) -> QuantizedLinear:
    layer = QuantizedLinear(
        linear.in_features, linear.out_features, linear.bias is not None, linear.weight.device, torch.bfloat16, fmt=fmt
    )
    bias = {} if linear.bias is None else {"bias": linear.bias.detach()}
    layer.load_state_dict(fmt.quantize(linear.weight.detach()) | bias)
    return layer


def torchao_layers(linear: nn.Linear) -> dict[str, Layer]:
    """Its two ways of W8A8, compiled, because they are meant to be."""
    if linear.weight.device.type == "cpu" or importlib.util.find_spec("torchao") is None:
        return {}
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    configs = {"torchao int8": Int8DynamicActivationInt8WeightConfig()}
    if torch.cuda.get_device_capability() >= (8, 9):
        configs["torchao fp8"] = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    layers: dict[str, Layer] = {}
    for name, config in configs.items():
        holder = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, device="meta", dtype=torch.bfloat16))
        holder[0].weight, holder[0].bias = linear.weight, linear.bias
        quantize_(holder, config)
        layers[name] = torch.compile(holder[0])
    return layers


class Clock:
    """Milliseconds on a device, with a cold L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self._cache = torch.empty(1 << 28 if self.is_cuda else 1, dtype=torch.uint8, device=device)

    def milliseconds(self, run: Callable[[], object]) -> float:
        self._cache.zero_()
        if not self.is_cuda:
            start = time.perf_counter()
            run()
            return 1000 * (time.perf_counter() - start)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def medians(runs: dict[str, Callable[[], object]], clock: Clock, rounds: int) -> dict[str, float | None]:
    """Milliseconds by name; None for what cannot run, with the reason on stderr."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    broken: set[str] = set()
    with torch.inference_mode():
        for turn in range(rounds + 2):  # the first two compile
            for name, run in runs.items():
                if name in broken:
                    continue
                try:
                    took = clock.milliseconds(run)
                except Exception as error:  # of any library: the others are still worth measuring
                    print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
                    broken.add(name)
                    continue
                if turn >= 2:
                    times[name].append(took)
    return {name: None if name in broken else statistics.median(values) for name, values in times.items()}


def print_row(cells: Sequence[object]) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def bench_linears(options: argparse.Namespace, formats: dict[str, Format]) -> None:
    device, clock = torch.device(options.device), Clock(torch.device(options.device))
    for number, (rows, columns) in enumerate(options.shapes):
        linear = nn.Linear(columns, rows, device=device, dtype=torch.bfloat16)
        layers: dict[str, Layer] = {"BF16, ms": linear}
        layers |= {name: quantize(linear, fmt) for name, fmt in formats.items()} | torchao_layers(linear)
        if number == 0:
            print_row(["N x K", "tokens", *layers])
            print_row(["---"] * (len(layers) + 2))
        for tokens in options.tokens:
            x = torch.randn(tokens, columns, device=device, dtype=torch.bfloat16)
            runs = {name: functools.partial(layer, x) for name, layer in layers.items()}
            plain, *others = medians(runs, clock, options.rounds).values()
            assert plain is not None, "BF16 always runs"
            ratios = ["-" if other is None else f"{plain / other:.2f}" for other in others]
            print_row([f"{rows} x {columns}", tokens, f"{plain:.4f}", *ratios])


def make_transformer(options: argparse.Namespace) -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    with torch.device(options.device):
        model = QwenImageTransformer2DModel(num_layers=options.layers, num_attention_heads=options.heads)
    return model.to(torch.bfloat16).eval()


def inputs_of(tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    side = round(tokens**0.5)
    kind = {"device": options.device, "dtype": torch.bfloat16}
    return {
        "hidden_states": torch.randn(1, side * side, 64, **kind),
        "encoder_hidden_states": torch.randn(1, TEXT, TEXT_WIDTH, **kind),
        "encoder_hidden_states_mask": torch.ones(1, TEXT, device=options.device, dtype=torch.bool),
        "timestep": torch.tensor([0.5], **kind),
        "img_shapes": [[(1, side, side)]],
        "return_dict": False,
    }


def quantize_blocks(model: nn.Module, fmt: Format) -> None:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name.startswith("transformer_blocks."):
            model.set_submodule(name, quantize(module, fmt))


def kernels_of(model: nn.Module) -> list[str]:
    layers = [part for part in model.modules() if isinstance(part, QuantizedLinear)]
    device = device_of(next(model.parameters()).device)
    shaped = [(part.format, (part.out_features, part.in_features)) for part in layers]
    return sorted({choose(fmt, shape, device).kernel.name for fmt, shape in shaped})


def bench_transformer(options: argparse.Namespace, formats: dict[str, Format]) -> None:
    print_row(["Qwen-Image blocks", "kernel", "GiB", "ms", "of BF16"])
    print_row(["---"] * 5)
    clock, plain = Clock(torch.device(options.device)), None
    inputs = inputs_of(options.image_tokens, options)
    for name, fmt in {"BF16": None, **formats}.items():
        torch.manual_seed(0)
        model = make_transformer(options)
        if fmt is not None:
            quantize_blocks(model, fmt)
        took = medians({name: functools.partial(model, **inputs)}, clock, options.rounds)[name]
        size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) / 2**30
        plain = plain or took
        ratio = "-" if took is None or plain is None else f"{plain / took:.2f}"
        shown = "-" if took is None else f"{took:.1f}"
        print_row([name, ", ".join(kernels_of(model)) or "BF16", f"{size:.2f}", shown, ratio])
        del model


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--formats", default=",".join(FORMATS), help="of %(default)s")
    parser.add_argument("--tokens", type=numbers, default=TOKENS)
    parser.add_argument("--shapes", type=shapes, default=SHAPES, help="N x K of linears, such as %(default)s")
    parser.add_argument("--layers", type=int, default=20, help="blocks of the transformer; 0 leaves it out")
    parser.add_argument("--heads", type=int, default=24, help="its width divided by 128")
    parser.add_argument("--image-tokens", type=int, default=4096, help="4096 are 1024 x 1024 pixels")
    parser.add_argument("--rounds", type=int, default=20)
    return parser.parse_args(arguments)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def shapes(text: str) -> list[tuple[int, int]]:
    pairs = [part.split("x") for part in text.split(",") if part]
    return [(int(rows), int(columns)) for rows, columns in pairs]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    unknown = set(options.formats.split(",")) - FORMATS.keys()
    if unknown:
        print(f"--formats: {', '.join(sorted(unknown))}, expected some of {', '.join(FORMATS)}.", file=sys.stderr)
        return 2
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"PyTorch {torch.__version__} finds no GPU here: nothing to measure.", file=sys.stderr)
        return 1
    formats = {name: FORMATS[name] for name in options.formats.split(",")}
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device
    print(f"{name}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}\n")
    bench_linears(options, formats)
    if options.layers:
        print()
        bench_transformer(options, formats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
