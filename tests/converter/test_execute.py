"""Carrying out a plan: memory that does not grow with the checkpoint, and figures that can be trusted."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hostile.small import Tensor, entry, file_bytes, random, to_values, write_model

from omni_convert.converter.convert import plan
from omni_convert.converter.execute import Settings, execute
from omni_convert.converter.file_writer import FileRecord
from omni_convert.converter.layer_error import LayerError
from omni_convert.formats.errors import OmniConvertError


def run(source: Path, out: Path, piece_bytes: int = 4096, threads: int = 2) -> tuple[dict[str, FileRecord], list[int]]:
    planned = plan(source, method="int8")
    done: list[int] = []
    records: dict[str, FileRecord] = {}
    out.mkdir()
    names = [*planned.shards, *planned.checkpoint.others]
    settings = Settings(threads=threads, piece_bytes=piece_bytes)
    execute(planned, out, names, settings, known={}, record=records.__setitem__, progress=done.append)
    return records, done


def test_progress_adds_up_to_what_is_read(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    (source / "more").write_bytes(bytes(1234))
    records, done = run(source, tmp_path / "out", piece_bytes=100)
    assert sum(done) == 16 * 24 * 2 + 16 * 2 + 1234
    assert max(done) <= 100
    assert records.keys() == {"diffusion_pytorch_model.safetensors", "more"}
    assert records["more"].size == 1234


def test_error_sums_are_those_of_the_layer(tmp_path: Path) -> None:
    weight = random(16, 24, dtype="F32")
    source = write_model(tmp_path / "model", {}, {"a.weight": weight})
    records, _ = run(source, tmp_path / "out")
    error = records["diffusion_pytorch_model.safetensors"].errors["a"]
    assert error.signal == pytest.approx(float(np.sum(to_values(weight).astype(np.float64) ** 2)), rel=1e-5)
    assert 30 < error.sqnr_db < 60


@pytest.mark.parametrize(
    ("signal", "noise", "decibel"), [(100.0, 1.0, 20.0), (1.0, 0.0, math.inf), (0.0, 0.0, math.inf)]
)
def test_sqnr(signal: float, noise: float, decibel: float) -> None:
    assert LayerError(signal=signal, noise=noise).sqnr_db == decibel


@pytest.mark.parametrize("threads", [1, 3])
def test_first_error_stops_every_thread(tmp_path: Path, threads: int) -> None:
    bad = random(1000, 24)
    bad.bits[0, 0] = 0x7F80
    source = write_model(tmp_path / "model", {}, {"a.weight": bad})
    done: list[int] = []
    planned = plan(source, method="int8")
    (tmp_path / "out").mkdir()
    settings = Settings(threads=threads, piece_bytes=48)
    with pytest.raises(OmniConvertError, match="row 0, column 0"):
        execute(planned, tmp_path / "out", list(planned.shards), settings, known={}, record=print, progress=done.append)
    assert len(done) < 900


def test_row_wider_than_a_piece(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", {}, {"a.weight": random(3, 200)})
    records, done = run(source, tmp_path / "out", piece_bytes=32)
    assert sorted(done) == [0, 400, 400, 400]
    assert records["diffusion_pytorch_model.safetensors"].errors.keys() == {"a"}


def test_memory_is_what_the_plan_says(tmp_path: Path) -> None:
    """200 MB of weights, and 100 MB that are kept, go through buffers: the process stays about as small as one that
    only plans."""
    rows, columns, layers = 4096, 2048, 12
    size = 2 * rows * columns
    header = {f"blocks.{n}.ff.weight": entry("BF16", [rows, columns], n * size, (n + 1) * size) for n in range(layers)}
    end = layers * size
    header["embed_tokens.weight"] = entry("BF16", [6 * rows, columns], end, end + 6 * size)
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        start = file.write(file_bytes(header))
        file.truncate(start + end + 6 * size)  # holes: zeros
    small = write_model(tmp_path / "small", {}, {"a.weight": Tensor("BF16", np.zeros((8, 8), "<u2"))})
    planned = json.loads(_peak(["--dry-run", "--json", "--threads", "2", path, tmp_path / "out"])[0])
    _, base = _peak(["--threads", "2", small, tmp_path / "small-out"])
    _, peak = _peak(["--threads", "2", path, tmp_path / "out"])
    assert planned["peak_memory"] < 50e6
    assert peak - base < planned["peak_memory"] + 10e6


def _peak(args: list[object]) -> tuple[str, int]:
    """Standard output of a conversion and its peak memory in bytes."""
    code = (
        "import resource, sys; from omni_convert import cli; cli.main(sys.argv[1:], standalone_mode=False); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "--method", "int8", *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout, int(result.stderr.split()[-1])
