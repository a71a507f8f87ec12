"""Measure `analyze` beside the conversions whose figures it gives, in one run.

    python scripts/bench_analyze.py
    python scripts/bench_analyze.py --gigabytes 4 --runs 5 --methods int8,fp8,mxfp8,mxfp4

Writes a BF16 checkpoint of Qwen-Image block shapes, so that it is in the page cache. In every round one `analyze` of
all methods runs, then a conversion with each of them, all in new processes: start-up counts, and that conversions write
and hash their output. Ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from bench_convert import SMALL_HIDDEN
from bench_tools import CONVERT, IMPORTS, QWEN_HIDDEN, Usage, machine, markdown, qwen_image, run, write_checkpoint

from omni_convert.formats.quant_config import parse_method

HEAD = ("", "wall s", "CPU s", "MiB beyond imports")
EVERY = "--no-default-ignore"


def analyze(methods: list[str], model: Path) -> Usage:
    return run([*CONVERT, "analyze", str(model), "--methods", ",".join(methods), EVERY, "--json"])


def convert(method: str, model: Path, out: Path) -> Usage:
    recipe = out.with_name("recipe.json")
    recipe.write_text(json.dumps(parse_method(method)))
    try:
        return run([*CONVERT, "--recipe", str(recipe), EVERY, str(model), str(out)])
    finally:
        shutil.rmtree(out, ignore_errors=True)


def measure_all(work: Path, arguments: argparse.Namespace) -> None:
    methods = arguments.methods.split(",")
    small, model, out = work / "small", work / "model", work / "out"
    write_checkpoint(small, qwen_image(0.01, hidden=SMALL_HIDDEN))
    analyze(methods, small)  # compiles the kernels that are not on disk yet
    total = write_checkpoint(model, qwen_image(arguments.gigabytes, arguments.hidden))
    passes: list[Usage] = []
    conversions: dict[str, list[Usage]] = {method: [] for method in methods}
    for number in range(arguments.runs):
        passes.append(analyze(methods, model))
        for method, usages in conversions.items():
            usages.append(convert(method, model, out))
        print(f"round {number + 1} of {arguments.runs} done", file=sys.stderr, flush=True)
    rounds = list(zip(passes, zip(*conversions.values(), strict=True), strict=True))
    imports = run([sys.executable, "-c", IMPORTS]).anonymous

    def line(name: str, usages: list[Usage]) -> tuple[str, ...]:
        wall, cpu, memory = (statistics.median(usage[field] for usage in usages) for field in (0, 1, 3))
        return name, f"{wall:.2f}", f"{cpu:.2f}", f"{memory - imports:.0f}"

    rows = [line(f"analyze {arguments.methods}", passes)]
    rows += [line(f"convert, {method}", usages) for method, usages in conversions.items()]
    print(f"\n{total / 1e9:.2f} GB of BF16 on {machine()}; medians of {arguments.runs} rounds\n")
    print(markdown(HEAD, rows))
    wall, cpu = (
        statistics.median(one[field] / sum(u[field] for u in usages) for one, usages in rounds) for field in (0, 1)
    )
    print(f"\nOf all these conversions together, analyze takes {wall:.2f} of the wall time, {cpu:.2f} of the CPU time.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.3)
    parser.add_argument("--hidden", type=int, default=QWEN_HIDDEN, help="a smaller model, for a trial")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--methods", default="int8,fp8,mxfp8,mxfp4")
    parser.add_argument("--folder", type=Path, help="where to write the checkpoint and the outputs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        measure_all(Path(work), arguments)


if __name__ == "__main__":
    main()
