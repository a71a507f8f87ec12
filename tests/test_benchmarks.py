"""The benchmarks of whole conversions run, on checkpoints of a few megabytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "scripts"


def bench(script: str, *arguments: object) -> str:
    command = [sys.executable, SCRIPTS / script, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_conversions_beside_cp(tmp_path: Path) -> None:
    kept = tmp_path / "figures.json"
    options = ["--gigabytes", 0.003, "--hidden", 250, "--runs", 2, "--folder", tmp_path, "--json", kept]
    printed = bench("bench_convert.py", *options, "--only", "int8,mxfp8")
    rows = json.loads(kept.read_text())["rows"]
    assert len(rows["int8"]["runs"]) == len(rows["int8"]["of_copy"]) == 2
    assert "| cp -r " in printed and "| int8 " in printed and "| mxfp8 " not in printed
    assert "Left out, mxfp8: status 1: Error: " in printed  # no multiple of 32
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]


def test_analysis_beside_conversions(tmp_path: Path) -> None:
    sizes = ["--gigabytes", 0.003, "--hidden", 256, "--runs", 1, "--folder", tmp_path]
    printed = bench("bench_analyze.py", *sizes, "--methods", "int8,fp8:64x64")
    for row in ("| analyze int8,fp8:64x64 ", "| convert, int8 ", "| convert, fp8:64x64 ", "of the CPU time."):
        assert row in printed
    assert list(tmp_path.iterdir()) == []


def test_scale(tmp_path: Path) -> None:
    sizes = ["--sizes", "0.003,0.006", "--hidden", 256, "--counts", "120", "--gigabytes", 0.002, "--huge", 0.005]
    parts = ["linearity", "tensors", "memory"]
    printed = bench("bench_scale.py", *parts, *sizes, "--small", 100, "--runs", 1, "--folder", tmp_path)
    for row in ("| 0.01 GB ", "| 120 of ", "| one tensor ", "| 100 tensors "):
        assert row in printed
    assert list(tmp_path.iterdir()) == []


def test_peers_are_listed_without_their_import() -> None:
    listed = json.loads(bench("bench_peers.py"))
    assert {name.split()[0] for name in listed} == {"llm-compressor", "Quark", "auto-round", "torchao"}


def test_runtime_on_a_processor() -> None:
    small = ["--device", "cpu", "--rounds", 1, "--layers", 1, "--heads", 1, "--image-tokens", 16]
    printed = bench("bench_runtime.py", *small, "--tokens", "1,3", "--shapes", "64x32,32x64", "--formats", "int8,mxfp8")
    for start in (
        "| N x K | tokens | BF16, ms | int8 | mxfp8 |",
        "| 64 x 32 | 3 |",
        "| 32 x 64 | 1 |",
        "| BF16 | BF16 |",
    ):
        assert start in printed
    assert "| mxfp8 | decode |" in printed
    assert printed.count("\n| 64 x 32 |") == printed.count("\n| 32 x 64 |") == 2


def test_runtime_without_a_gpu_says_so() -> None:
    command = [sys.executable, SCRIPTS / "bench_runtime.py"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.endswith("finds no GPU here: nothing to measure.\n")
    result = subprocess.run([*command, "--formats", "int8,int3"], capture_output=True, text=True)
    assert (result.returncode, result.stderr[:17]) == (2, "--formats: int3, ")


def test_loading(tmp_path: Path) -> None:
    sizes = ["--gigabytes", 0.01, "--hidden", 256, "--rounds", 1, "--folder", tmp_path]
    printed = bench("bench_load.py", *sizes, "--library", "diffusers")
    for what in ("load_file", "omni_convert.load", "from_pretrained", "online"):
        assert f" GB: {what} " in printed
    assert list(tmp_path.iterdir()) == []
