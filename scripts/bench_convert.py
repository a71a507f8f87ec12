"""Measure a conversion beside `cp -r` in one run.

    python scripts/bench_convert.py --gigabytes 4 --runs 5
    python scripts/bench_convert.py --method fp8 --granularity channel --quality balanced

Options that are not listed go to omni-convert.

Writes a BF16 checkpoint of Qwen-Image block shapes (hidden 3072, MLP 12288), reads it once so that it is in the page
cache, then alternates conversion and copy. Every run is a new process, so start-up, imports and hashing count.
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
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HIDDEN, MLP = 3072, 12288
BLOCK = {
    **{f"attn.{name}": (HIDDEN, HIDDEN) for name in ("to_q", "to_k", "to_v", "to_out.0")},
    **{f"attn.{name}": (HIDDEN, HIDDEN) for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")},
    **{f"{mlp}.net.0.proj": (MLP, HIDDEN) for mlp in ("img_mlp", "txt_mlp")},
    **{f"{mlp}.net.2": (HIDDEN, MLP) for mlp in ("img_mlp", "txt_mlp")},
}
SHARD_BYTES = 10**9


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """A Qwen-Image transformer folder of about that many bytes in shards of about 1 GB; returns its weight bytes."""
    import torch
    from safetensors.torch import save_file

    def tensors() -> Iterator[tuple[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        pool = torch.randn(MLP * HIDDEN + 4096, generator=generator).to(torch.bfloat16)
        for block in range(10**6):
            for layer, shape in BLOCK.items():
                start = torch.randint(4096, (1,), generator=generator).item()
                weight = pool[start : start + shape[0] * shape[1]].view(shape).clone()
                yield f"transformer_blocks.{block}.{layer}.weight", weight

    folder.mkdir(parents=True)
    shards: list[list[str]] = []
    pending: dict[str, Any] = {}
    total = size = 0
    for name, tensor in tensors():
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
        if size >= SHARD_BYTES or total >= gigabytes * 1e9:
            save_file(pending, folder / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
            shards.append(list(pending))
            pending, size = {}, 0
        if total >= gigabytes * 1e9:
            break
    weight_map = {}
    for number, names in enumerate(shards):
        final = f"diffusion_pytorch_model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}.safetensors").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"_class_name": "QwenImageTransformer2DModel"}))
    return total


def run(command: list[str]) -> dict[str, float]:
    """Wall and CPU seconds of a command; peaks of its anonymous memory and, with mapped libraries, its RSS in MiB."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = {"RssAnon": 0, "VmHWM": 0}
    stop = threading.Event()

    def sample() -> None:
        status = Path(f"/proc/{process.pid}/status")
        while not stop.wait(0.005):
            try:
                rows = dict(row.split(":", 1) for row in status.read_text().splitlines())
            except OSError:
                return
            for key in peak.keys() & rows.keys():
                peak[key] = max(peak[key], int(rows[key].split()[0]))

    sampler = threading.Thread(target=sample)
    sampler.start()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    stop.set()
    sampler.join()
    if status:
        raise SystemExit(f"{command[0]} failed with status {status}")
    return {
        "wall": wall,
        "cpu": usage.ru_utime + usage.ru_stime,
        "rss": peak["RssAnon"] / 1024,
        "max_rss": peak["VmHWM"] / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--method", default="int8")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    arguments, others = parser.parse_known_args()
    work = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        measure(work, arguments.gigabytes, arguments.runs, ["--method", arguments.method, *others])
    finally:
        shutil.rmtree(work)


def measure(work: Path, gigabytes: float, runs: int, options: list[str]) -> None:
    model, out, copy = work / "model", work / "out", work / "copy"
    total = write_checkpoint(model, gigabytes)
    os.sync()
    script = Path(sys.executable).with_name("omni-convert")
    convert = [str(script), *options, str(model), str(out)]
    results: dict[str, list[dict[str, float]]] = {"convert": [], "cp -r": []}
    for number in range(runs + 1):
        for name, command, target in (("convert", convert, out), ("cp -r", ["cp", "-r", str(model), str(copy)], copy)):
            figures = run(command)
            shutil.rmtree(target)
            if number:  # the first round warms the page cache and the kernel cache
                results[name].append(figures)
    startup = run([sys.executable, "-c", "import omni_convert.converter.execute, omni_convert.formats.kernels"])
    print(f"{total / 1e9:.2f} GB BF16, {' '.join(options)}")
    print(f"{os.cpu_count()} processors, median of {runs} alternating runs\n")
    print(f"{'':10}{'wall s':>8}{'GB/s':>8}{'CPU s':>8}{'anon MiB':>10}{'max RSS MiB':>13}{'of cp':>8}")
    median = {
        name: {key: statistics.median(item[key] for item in items) for key in items[0]}
        for name, items in results.items()
    }
    ratio = statistics.median(a["wall"] / b["wall"] for a, b in zip(results["convert"], results["cp -r"], strict=True))
    for name, figures in median.items():
        share = f"{ratio:.2f}" if name == "convert" else "1.00"
        rate = total / figures["wall"] / 1e9
        print(
            f"{name:10}{figures['wall']:8.2f}{rate:8.2f}{figures['cpu']:8.2f}{figures['rss']:10.0f}{figures['max_rss']:13.0f}{share:>8}"
        )
    print(f"\npeak memory beyond the imports: {median['convert']['rss'] - startup['rss']:.0f} MiB")


if __name__ == "__main__":
    main()
