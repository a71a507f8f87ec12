"""Measure how conversions scale: with bytes, with the number of tensors, with nothing to do; and their memory.

    python scripts/bench_scale.py
    python scripts/bench_scale.py linearity memory --sizes 1,2,4,8 --method fp8 --granularity channel

linearity   one checkpoint of Qwen-Image shapes and its first shards alone, each right after `cp -r` of it; how far
            the process's own CPU time is from the straight line that fits best (the system's depends on what
            fresh memory costs it at the moment, for `cp` too)
tensors     few large and many small tensors of the same bytes, each beside `cp -r` of the same folder
memory      one huge tensor (of a sparse file, which holds zeros and takes no room) and 10,000 small ones
start       `--help`, and a model of 10 MB with and without compiled kernels on disk; which heavy libraries it imports

Every figure is the median of several runs, each a new process, on checkpoints in the page cache. Memory is anonymous
memory beyond that of a process that has only imported. Options that are not listed go to omni-convert.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from bench_tools import (
    CONVERT,
    IMPORTS,
    Usage,
    equal_layers,
    link_shards,
    machine,
    markdown,
    median,
    qwen_image,
    run,
    write_checkpoint,
)

HUGE_COLUMNS = 1 << 17
SMALL_HIDDEN = 448  # a block of about 10 MB
SMALL_SHAPE = (64, 64)
HEAVY = ("torch", "numba", "numpy", "diffusers", "transformers")


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def once(command: Sequence[str], model: Path, out: Path) -> Usage:
    usage = run([*command, str(model), str(out)])
    shutil.rmtree(out)
    return usage


def linearity(work: Path, convert: Sequence[str], arguments: argparse.Namespace) -> str:
    sizes = sorted(arguments.sizes)
    whole = work / "whole"
    write_checkpoint(whole, qwen_image(sizes[-1], arguments.hidden), shard_bytes=1e9 * sizes[0], whole_blocks=True)
    shards = len(list(whole.glob("*.safetensors")))
    models = {}
    for size in sizes:
        model = work / f"first-{size:g}"
        models[model] = link_shards(whole, model, max(1, round(shards * size / sizes[-1]))) / 1e9
    os.sync()
    usages: dict[Path, list[Usage]] = {model: [] for model in models}
    ratios: dict[Path, list[float]] = {model: [] for model in models}
    for _ in range(arguments.runs):
        for model, found in usages.items():
            copied = once(["cp", "-r"], model, work / "copy")
            found.append(once(convert, model, work / "out"))
            ratios[model].append(found[-1].wall / copied.wall)
    medians = [median(found) for found in usages.values()]
    slope, start = np.polyfit(list(models.values()), [usage.user for usage in medians], 1)
    rows = [
        (f"{size:.2f} GB", f"{usage.wall:.2f}", f"{usage.wall / size:.3f}", f"{np.median(ratios[model]):.2f}",
         f"{usage.cpu:.2f}", f"{usage.user:.2f}", f"{100 * (usage.user / (start + slope * size) - 1):+.1f}")
        for (model, size), usage in zip(models.items(), medians, strict=True)
    ]  # fmt: skip
    table = markdown(("", "wall s", "wall s/GB", "of cp", "CPU s", "user CPU s", "off line, %"), rows)
    return f"{table}\n\nLine: user CPU s = {slope:.3f} x GB + {start:.2f}."


def tensors(work: Path, convert: Sequence[str], arguments: argparse.Namespace) -> str:
    """One checkpoint at a time, so that both need not fit the page cache together."""
    rows = []
    for count in map(int, arguments.counts):
        model = work / "model"
        matrices = list(equal_layers(count, arguments.gigabytes))
        size = write_checkpoint(model, matrices) / 1e9
        os.sync()
        copies, usages = [], []
        for _ in range(arguments.runs):
            copies.append(once(["cp", "-r"], model, work / "copy"))
            usages.append(once(convert, model, work / "out"))
        shutil.rmtree(model)
        usage, ratio = median(usages), np.median([a.wall / b.wall for a, b in zip(usages, copies, strict=True)])
        rows.append(
            (f"{len(matrices)} of {' x '.join(map(str, matrices[0][1]))}", f"{size:.2f}", f"{usage.wall:.2f}",
             f"{usage.wall / size:.3f}", f"{ratio:.2f}", f"{usage.cpu:.2f}", f"{usage.cpu / size:.3f}")
        )  # fmt: skip
    return markdown(("tensors", "GB", "wall s", "wall s/GB", "of cp", "CPU s", "CPU s/GB"), rows)


def memory(work: Path, convert: Sequence[str], arguments: argparse.Namespace) -> str:
    rows_of_huge = round(arguments.huge * 1e9 / 2 / HUGE_COLUMNS)
    models = {
        "one tensor": [("transformer_blocks.0.attn.to_out.0.weight", (rows_of_huge, HUGE_COLUMNS))],
        f"{arguments.small:,} tensors": [
            (f"transformer_blocks.{block}.attn.to_out.0.weight", SMALL_SHAPE) for block in range(arguments.small)
        ],
    }
    imports = run([sys.executable, "-c", IMPORTS]).anonymous
    rows = []
    for name, matrices in models.items():
        model = work / name.replace(" ", "-").replace(",", "")
        size = write_checkpoint(model, matrices, sparse=True) / 1e9
        usage = once(convert, model, work / "out")
        shutil.rmtree(model)
        rows.append(
            (name, f"{size:.2f}", f"{usage.wall:.2f}", f"{usage.anonymous - imports:.0f}", f"{usage.resident:.0f}")
        )
    return markdown(("", "GB", "wall s", "anon MiB beyond imports", "max RSS MiB"), rows)


def start(work: Path, convert: Sequence[str], arguments: argparse.Namespace) -> str:
    model, out = work / "model", work / "out"
    size = write_checkpoint(model, qwen_image(0.009, hidden=SMALL_HIDDEN))
    cold = {**os.environ, "NUMBA_CACHE_DIR": str(work / "kernels")}
    compiled = run([*convert, str(model), str(out)], cold)
    shutil.rmtree(out)
    figures = {
        f"{size / 1e6:.0f} MB, kernels compiled": compiled,
        f"{size / 1e6:.0f} MB": median([once(convert, model, out) for _ in range(arguments.runs)]),
        "--help": median([run([*convert, "--help"]) for _ in range(arguments.runs)]),
    }
    rows = [(name, f"{usage.wall:.2f}", f"{usage.cpu:.2f}") for name, usage in figures.items()]
    imported = {
        name: heavy_imports([*convert, *rest])
        for name, rest in {"--help": ["--help"], "a conversion": [str(model), str(out)]}.items()
    }
    said = "\n".join(f"Imported by {name}: {', '.join(found) or 'none of them'}." for name, found in imported.items())
    return f"{markdown(('', 'wall s', 'CPU s'), rows)}\n\nOf {', '.join(HEAVY)}:\n{said}"


def heavy_imports(command: Sequence[str]) -> list[str]:
    python, *rest = command
    result = subprocess.run([python, "-X", "importtime", *rest], capture_output=True, text=True, check=True)
    return [name for name in HEAVY if re.search(rf"^import time:.*\| +{name}$", result.stderr, re.MULTILINE)]


PARTS = {"linearity": linearity, "tensors": tensors, "memory": memory, "start": start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default all: {', '.join(PARTS)}")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sizes", type=numbers, default=[1, 2, 4, 8], metavar="GB,GB", help="of linearity")
    parser.add_argument("--hidden", type=int, default=3072, help="of linearity: a smaller model, for a trial")
    parser.add_argument("--counts", type=numbers, default=[500, 50_000], metavar="N,N", help="of tensors")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="of tensors")
    parser.add_argument("--huge", type=float, default=12.0, metavar="GB", help="of memory")
    parser.add_argument("--small", type=int, default=10_000, metavar="N", help="of memory: number of small tensors")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    arguments, options = parser.parse_known_args()
    options = options if "--method" in options else ["--method", "int8", *options]
    if unknown := set(arguments.parts) - PARTS.keys():
        parser.error(f"there is no part {', '.join(unknown)}, only {', '.join(PARTS)}")
    print(f"{' '.join(options)} on {machine()}, medians of {arguments.runs} runs")
    for name in arguments.parts or PARTS:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
            print(f"\n{name}\n\n{PARTS[name](Path(work), [*CONVERT, *options], arguments)}", flush=True)


if __name__ == "__main__":
    main()
