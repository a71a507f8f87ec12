"""Measure what `--report` adds to a conversion, in one run.

    python scripts/bench_report.py
    python scripts/bench_report.py --gigabytes 4 --runs 7 --only 'int8,mxfp4'

Writes a BF16 checkpoint of Qwen-Image block shapes, so that it is in the page cache. In every round each method
converts it twice, without and with `--report`, in new processes and in alternating order; `CPU` and `wall` are medians
of the rounds' ratios, `least` is the ratio of the least CPU time of each, which a busy machine disturbs less. So the
page counts too, with the worst layers read back from the output, and so do start-up and hashing.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path

from bench_convert import ALL, FORMATS, SMALL_HIDDEN
from bench_tools import QWEN_HIDDEN, Usage, machine, markdown, qwen_image, run, write_checkpoint

HEAD = ("", "CPU s without", "with", "CPU", "least", "wall", "page kB")


def convert(name: str, model: Path, work: Path, page: Path | None) -> Usage:
    """Run once and remove what it wrote, but the page."""
    out = work / "out"
    try:
        report = ["--report", str(page)] if page else []
        return run([*ALL, *FORMATS[name], *report, str(model), str(out)])
    finally:
        shutil.rmtree(out, ignore_errors=True)


def rounds(name: str, model: Path, work: Path, runs: int) -> tuple[str, ...]:
    """A line of the table."""
    page = work / "report.html"
    pairs: list[tuple[Usage, Usage]] = []
    for number in range(runs):
        found = {place: convert(name, model, work, place) for place in ([None, page], [page, None])[number % 2]}
        pairs.append((found[None], found[page]))
        print(f"{name}: round {number + 1} of {runs} done", file=sys.stderr, flush=True)

    def ratio(field: str) -> str:
        ratios = [getattr(asked, field) / getattr(plain, field) for plain, asked in pairs]
        return f"{statistics.median(ratios):.3f}"

    seconds = [f"{statistics.median(pair[place].cpu for pair in pairs):.2f}" for place in (0, 1)]
    plain, asked = (min(pair[place].cpu for pair in pairs) for place in (0, 1))
    return name, *seconds, ratio("cpu"), f"{asked / plain:.3f}", ratio("wall"), f"{page.stat().st_size / 1e3:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.3)
    parser.add_argument("--hidden", type=int, default=QWEN_HIDDEN, help="a smaller model, for a trial")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", default="*", metavar="NAMES", help="methods to measure: names or globs, with commas")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    arguments = parser.parse_args()
    names = [name for name in FORMATS if any(fnmatch(name, wanted) for wanted in arguments.only.split(","))]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        work = Path(folder)
        write_checkpoint(work / "small", qwen_image(0.01, hidden=SMALL_HIDDEN))
        total = write_checkpoint(work / "model", qwen_image(arguments.gigabytes, arguments.hidden))
        for name in names:
            convert(name, work / "small", work, work / "small.html")  # compile what is not on disk yet
        rows = [rounds(name, work / "model", work, arguments.runs) for name in names]
    print(f"{total / 1e9:.2f} GB of BF16 on {machine()}; medians of {arguments.runs} rounds\n")
    print(markdown(HEAD, rows))


if __name__ == "__main__":
    main()
