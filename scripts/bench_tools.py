"""What the benchmarks of whole conversions share: a checkpoint of any size, a measured process, a table."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from omni_convert.formats.header import TensorSpec, encode_header, read_header

Matrices = Iterable[tuple[str, tuple[int, int]]]
QWEN_HIDDEN = 3072
QWEN_BLOCK = {  # rows and columns in units of the hidden size
    **{f"attn.{name}": (1, 1) for name in ("to_q", "to_k", "to_v", "to_out.0")},
    **{f"attn.{name}": (1, 1) for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")},
    **{f"{mlp}.net.0.proj": (4, 1) for mlp in ("img_mlp", "txt_mlp")},
    **{f"{mlp}.net.2": (1, 4) for mlp in ("img_mlp", "txt_mlp")},
}
CONVERT = [sys.executable, "-m", "omni_convert"]
IMPORTS = (
    "import omni_convert.converter.execute, omni_convert.formats.kernels, omni_convert.formats.fp8_kernels, "
    "omni_convert.formats.mx_kernels, omni_convert.formats.dual_kernels, omni_convert.formats.search_kernels"
)
_SAMPLE_SECONDS = 0.005


class Usage(NamedTuple):
    """What a process took. ``user``: what of ``cpu`` is its own, the rest the system's (page cache, files).

    ``anonymous``: peak of its own memory; ``resident``: with the files that it maps; MiB.
    """

    wall: float
    cpu: float
    user: float
    anonymous: float
    resident: float


class CommandError(Exception):
    """With what the command said last."""


def qwen_image(gigabytes: float, hidden: int = QWEN_HIDDEN) -> Iterator[tuple[str, tuple[int, int]]]:
    """The matrices of a Qwen-Image transformer with as many whole blocks as it takes."""
    block_bytes = 2 * hidden**2 * sum(rows * columns for rows, columns in QWEN_BLOCK.values())
    for block in range(math.ceil(gigabytes * 1e9 / block_bytes)):
        for layer, (rows, columns) in QWEN_BLOCK.items():
            yield f"transformer_blocks.{block}.{layer}.weight", (rows * hidden, columns * hidden)


def equal_layers(count: int, gigabytes: float) -> Iterator[tuple[str, tuple[int, int]]]:
    """Whole blocks of about so many matrices, all of one shape, under the names of Qwen-Image."""
    numel = gigabytes * 1e9 / 2 / count
    columns = max(64, round(numel**0.5 / 64) * 64)
    for block in range(math.ceil(count / len(QWEN_BLOCK))):
        for layer in QWEN_BLOCK:
            yield f"transformer_blocks.{block}.{layer}.weight", (max(1, round(numel / columns)), columns)


def write_checkpoint(
    folder: Path, matrices: Matrices, *, shard_bytes: float = 1e9, sparse: bool = False, whole_blocks: bool = False
) -> int:
    """A Qwen-Image transformer folder in shards of about that size; returns its weight bytes.

    Weights are normally distributed, cut from one pool at random places. ``sparse``: they are all zero, and take no
    room on disk. ``whole_blocks``: a shard ends with a block, so that the first shards are a checkpoint too.
    """
    folder.mkdir(parents=True)
    shards: list[dict[str, TensorSpec]] = [{}]
    size, last = 0, ""
    for name, shape in matrices:
        block = name.split(".")[1]
        if size >= shard_bytes and (not whole_blocks or block != last):
            shards.append({})
            size = 0
        shards[-1][name] = TensorSpec("BF16", shape)
        size += shards[-1][name].nbytes
        last = block
    pool = None if sparse else _normal_bf16(max(spec.numel for shard in shards for spec in shard.values()) + 4096)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file_name)
        _write_shard(folder / file_name, shard, pool)
    _write_index(folder, weight_map)
    return sum(spec.nbytes for shard in shards for spec in shard.values())


def link_shards(folder: Path, smaller: Path, count: int) -> int:
    """A checkpoint of the first shards of another, which take no room; returns its weight bytes."""
    smaller.mkdir()
    paths = sorted(folder.glob("*.safetensors"))[:count]
    for path in paths:
        os.link(path, smaller / path.name)
    headers = [read_header(path) for path in paths]
    _write_index(smaller, {name: header.path.name for header in headers for name in header.tensors})
    return sum(tensor.spec.nbytes for header in headers for tensor in header.tensors.values())


def _write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"_class_name": "QwenImageTransformer2DModel"}))


def _write_shard(path: Path, tensors: dict[str, TensorSpec], pool: np.ndarray | None) -> None:
    header = encode_header(tensors, {"format": "pt"})
    generator = np.random.default_rng(len(tensors))
    with path.open("wb") as file:
        file.write(header)
        for spec in tensors.values() if pool is not None else ():
            start = generator.integers(4096)
            file.write(pool[start : start + spec.numel].data)
        file.truncate(len(header) + sum(spec.nbytes for spec in tensors.values()))


def _normal_bf16(count: int) -> np.ndarray:
    """Bits of BF16 numbers, rounded to nearest."""
    bits = np.random.default_rng(0).standard_normal(count, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Usage:
    """Run a command to its end; ``environment``: None for this process's own.

    Raises:
        CommandError: its exit status is not 0.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    peak = {"RssAnon": 0, "VmHWM": 0}
    stop = threading.Event()
    errors: list[str] = []
    assert process.stderr is not None
    threads = [
        threading.Thread(target=_sample, args=(process.pid, peak, stop)),
        threading.Thread(target=errors.extend, args=(process.stderr,)),
    ]
    for thread in threads:
        thread.start()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    stop.set()
    for thread in threads:
        thread.join()
    if status:
        raise CommandError(f"status {process.returncode}: {' '.join(''.join(errors[-3:]).split())[-300:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return Usage(wall, cpu, usage.ru_utime, peak["RssAnon"] / 1024, peak["VmHWM"] / 1024)


def _sample(pid: int, peak: dict[str, int], stop: threading.Event) -> None:
    """Peaks of what /proc says of a process, in KiB; of anonymous memory, which has no mark of its own, by looking."""
    status = Path(f"/proc/{pid}/status")
    while not stop.wait(_SAMPLE_SECONDS):
        try:
            rows = dict(row.split(":", 1) for row in status.read_text().splitlines())
        except OSError:
            return
        for key in peak.keys() & rows.keys():
            peak[key] = max(peak[key], int(rows[key].split()[0]))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns are as wide as they must be, all but the first aligned to the right."""
    table = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    table.insert(1, rule)
    padded = (
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in table
    )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def machine() -> str:
    """The processor's name and how many this process may use."""
    rows = Path("/proc/cpuinfo").read_text().splitlines()
    names = (row.partition(":")[2].strip() for row in rows if row.startswith("model name"))
    return f"{len(os.sched_getaffinity(0))} processors ({next(names, 'unknown')})"


def median(usages: Sequence[Usage]) -> Usage:
    """Of every figure."""
    return Usage(*(statistics.median(column) for column in zip(*usages, strict=True)))
