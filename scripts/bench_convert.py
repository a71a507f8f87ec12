"""Measure conversions beside `cp -r` and beside other libraries, in one run.

    python scripts/bench_convert.py
    python scripts/bench_convert.py --gigabytes 4 --runs 5 --peers other-venv/bin/python
    python scripts/bench_convert.py --only 'int8*,*fp8 channel'

Writes a BF16 checkpoint of Qwen-Image block shapes (hidden 3072, MLP 12288) in shards of about 1 GB, so that it is in
the page cache, and converts small ones, so that the compiled kernels are on disk. Then, in every round, each conversion
runs right after a copy of the checkpoint; `of cp` is the median of the rounds' ratios. Every run is a new process, so
start-up, imports and hashing count. Rows that do not say `balanced` are `--quality fast`. All have --no-default-ignore:
every method quantizes every matrix, though by default fp8 keeps some in BF16.

`--durable` is measured beside `cp -r` and `sync` of every file and folder that it wrote: fsync of each, which waits for
these files only (`sync -f` would wait for whatever else the file system has to write).

Other libraries run once at the end, with the Python that --peers names; what is not installed there is left out. Their
memory is without imports too: `anon MiB` is what a process takes beyond one that has only imported.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from bench_tools import (
    CONVERT,
    IMPORTS,
    QWEN_HIDDEN,
    CommandError,
    Usage,
    machine,
    markdown,
    median,
    qwen_image,
    run,
    write_checkpoint,
)

from omni_convert.formats import make_format

ALL = [*CONVERT, "--no-default-ignore"]
FORMATS = {
    "int8": ["--method", "int8"],
    "fp8": ["--method", "fp8"],
    "fp8 channel": ["--method", "fp8", "--granularity", "channel"],
    "fp8 block": ["--method", "fp8", "--granularity", "block"],
    "mxfp8": ["--method", "mxfp8"],
    "mxfp4": ["--method", "mxfp4"],
    "mxfp4_dualscale": ["--method", "mxfp4_dualscale"],
}
COPY, SYNCED = "cp -r", "cp -r, sync"
PEERS = Path(__file__).with_name("bench_peers.py")
SMALL_HIDDEN = 512
HEAD = ("", "wall s", "of cp", "GB/s", "CPU s", "CPU s/GB", "anon MiB", "max RSS MiB")


@dataclass
class Row:
    """A line of the table. ``command``: MODEL and OUT are appended. ``beside``: the copy that runs before it."""

    name: str
    command: Sequence[str]
    beside: str | None = COPY
    imports: Sequence[str] = (sys.executable, "-c", IMPORTS)
    usages: list[Usage] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    failure: str | None = None

    @property
    def label(self) -> str:
        return self.name if self.beside in (COPY, None) else f"{self.name} (of {self.beside})"


def copies() -> dict[str, Row]:
    synced = 'cp -r "$0" "$1" && find "$1" -exec sync {} +'
    return {
        COPY: Row(COPY, ["cp", "-r"], beside=None, imports=()),
        SYNCED: Row(SYNCED, ["sh", "-c", synced], beside=None, imports=()),
    }


def conversions() -> list[Row]:
    rows = [Row(name, [*ALL, *options]) for name, options in FORMATS.items()]
    for name, options in FORMATS.items():
        choice = dict(zip(("method", "granularity"), options[1::2], strict=False))
        if make_format(**choice, quality="balanced").is_searched:
            rows.append(Row(f"{name} balanced", [*ALL, *options, "--quality", "balanced"]))
    return [*rows, Row("int8 --durable", [*ALL, *FORMATS["int8"], "--durable"], beside=SYNCED)]


def peers(python: str) -> list[Row]:
    """Those that ``python`` has installed; says which it has not."""
    listed = json.loads(subprocess.run([python, PEERS], capture_output=True, text=True, check=True).stdout)
    missing = sorted({name.split()[0] for name, version in listed.items() if not version})
    if missing:
        print(f"Left out, not installed for {python}: {', '.join(missing)}.")
    imports = [python, str(PEERS), "--imports"]
    return [
        Row(f"{name} ({version})", [python, str(PEERS), name], imports=[*imports, name])
        for name, version in listed.items()
        if version
    ]


def measure(row: Row, model: Path, out: Path) -> Usage | None:
    """Run once and remove what it wrote. A failure is kept in the row, which then runs no more."""
    if row.failure:
        return None
    try:
        usage = run([*row.command, str(model), str(out)])
    except CommandError as error:
        row.failure = str(error)
        print(f"Left out, {row.name}: {error}", flush=True)
        return None
    finally:
        shutil.rmtree(out, ignore_errors=True)
    row.usages.append(usage)
    return usage


def alternate(rows: Sequence[Row], model: Path, out: Path, runs: int) -> dict[str, Row]:
    """Every conversion after its copy, in turn; returns the copies."""
    beside = copies()
    for number in range(runs):
        for row in rows:
            copy = measure(beside[row.beside or COPY], model, out)
            usage = measure(row, model, out)
            if copy and usage:
                row.ratios.append(usage.wall / copy.wall)
        print(f"round {number + 1} of {runs} done", file=sys.stderr, flush=True)
    return beside


def warm_up(rows: Sequence[Row], work: Path) -> None:
    """Compile the kernels that are not on disk yet."""
    small, out = work / "small", work / "small-out"
    write_checkpoint(small, qwen_image(0.01, hidden=SMALL_HIDDEN))
    for row in rows:
        measure(row, small, out)
        row.usages.clear()


def table(rows: Sequence[Row], total: int) -> str:
    """Medians."""
    lines = []
    baselines: dict[tuple[str, ...], float] = {}
    for row in rows:
        if not row.usages:
            continue
        wall, cpu, _, anonymous, resident = median(row.usages)
        key = tuple(row.imports)
        if key and key not in baselines:
            baselines[key] = run(key).anonymous
        ratio = f"{statistics.median(row.ratios):.2f}" if row.ratios else ""
        gigabytes = total / 1e9
        lines.append(
            (row.label, f"{wall:.2f}", ratio, f"{gigabytes / wall:.2f}", f"{cpu:.2f}", f"{cpu / gigabytes:.2f}",
             f"{anonymous - baselines.get(key, 0):.0f}", f"{resident:.0f}")
        )  # fmt: skip
    return markdown(HEAD, lines)


def measure_all(work: Path, arguments: argparse.Namespace) -> None:
    wanted = arguments.only.split(",")
    rows = [row for row in conversions() if any(fnmatch(row.name, name) for name in wanted)]
    others = [row for row in peers(arguments.peers) if any(fnmatch(row.name.rpartition(" (")[0], n) for n in wanted)]
    model, out = work / "model", work / "out"
    total = write_checkpoint(model, qwen_image(arguments.gigabytes, arguments.hidden))
    warm_up(rows, work)
    os.sync()
    beside = alternate(rows, model, out, arguments.runs)
    if not beside[COPY].usages:
        measure(beside[COPY], model, out)
    copy = statistics.median(usage.wall for usage in beside[COPY].usages)
    for row in others:
        usage = measure(row, model, out)
        row.ratios = [usage.wall / copy] if usage else []
    print(f"\n{total / 1e9:.2f} GB of BF16 on {machine()}; medians of {arguments.runs} rounds, other libraries once\n")
    shown = [*beside.values(), *rows, *others]
    print(table(shown, total))
    if arguments.json:
        kept = {row.name: {"runs": [usage._asdict() for usage in row.usages], "of_copy": row.ratios} for row in shown}
        arguments.json.write_text(json.dumps({"bytes": total, "machine": machine(), "rows": kept}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.3)
    parser.add_argument("--hidden", type=int, default=QWEN_HIDDEN, help="a smaller model, for a trial")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", default="*", metavar="NAMES", help="rows to measure: names or globs, with commas")
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="that has the other libraries")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of every run too")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        measure_all(Path(work), arguments)


if __name__ == "__main__":
    main()
