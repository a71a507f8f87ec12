"""Coverage-guided fuzzing of the readers that meet hostile files first; prints a Markdown table.

    pip install -e '.[fuzz]'
    python scripts/fuzz.py                                 # a million inputs for each of the two targets
    python scripts/fuzz.py --target index --runs 100000
    python scripts/fuzz.py --target header --repeat crash-1234

``header`` is ``read_header``, ``index`` is ``read_index``, ``read_json`` and ``read_shards``. ``fuzz_targets.py``
says what counts as a crash: it ends the target's run, and the input that did it is kept in ``--crashes``. Not in CI:
it takes minutes, and atheris has no wheels for every Python.
"""

from __future__ import annotations

import argparse
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED_MEMORY = Path("/dev/shm")
MEMORY_MB = 100
SECONDS = 5
MAX_BYTES = 8192
MEASURED = "measured"
MEASURES = struct.Struct("<qqddd")
"""Inputs, accepted ones, seconds of the slowest, MB before the first, MB at the peak."""
COLUMNS = (
    "target",
    "inputs",
    "accepted",
    "seconds",
    "inputs/s",
    "edges",
    "peak MB",
    "of it by inputs",
    "slowest ms",
    "crashes",
)


def fuzz(target: str, runs: int, seed: int, crashes: Path, repeat: Path | None) -> tuple[str, ...]:
    """A row of the table, after ``runs`` inputs or the first crash."""
    crashes.mkdir(parents=True, exist_ok=True)
    home = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=home) as name:
        folder = Path(name)
        options = [f"-artifact_prefix={crashes.resolve()}/", f"-timeout={SECONDS}"]
        options += [f"-runs={runs}", f"-seed={seed}", f"-max_len={MAX_BYTES}", str(folder / "corpus")]
        if repeat:
            options[-4:] = [str(repeat.resolve())]
        paths = [str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        command = [sys.executable, str(ROOT / "scripts" / "fuzz_targets.py"), target, name, *options]
        started = time.perf_counter()
        with (folder / "log").open("wb") as log:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
            status = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
        seconds = time.perf_counter() - started
        text = (folder / "log").read_text(errors="replace")
        if status:
            print(text[-4000:], file=sys.stderr)
        if not (folder / MEASURED).exists():
            raise SystemExit(f"{target}: did not start. pip install -e '.[fuzz]'")
        inputs, accepted, slowest, start_mb, peak_mb = MEASURES.unpack((folder / MEASURED).read_bytes())
    edges = (re.findall(r"cov: (\d+)", text) or ["?"])[-1]
    figures = (f"{inputs:,}", f"{accepted:,}", f"{seconds:.0f}", f"{inputs / seconds:,.0f}", edges)
    memory = (f"{peak_mb:.0f}", f"{peak_mb - start_mb:.0f}")
    return (target, *figures, *memory, f"{slowest * 1000:.0f}", str(int(status != 0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=("header", "index"), action="append", help="default: both")
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs per target (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives much the same inputs")
    parser.add_argument("--crashes", type=Path, default=Path("crashes"), help="where inputs that crash are kept")
    parser.add_argument("--repeat", type=Path, help="one input to run again, such as one that crashed")
    chosen = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    failed = False
    for target in chosen.target or ("header", "index"):
        row = fuzz(target, chosen.runs, chosen.seed, chosen.crashes, chosen.repeat)
        print(f"| {' | '.join(row)} |", flush=True)
        failed |= row[-1] != "0"
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
