"""What is gathered of every layer while it is converted, beside a plain computation on the whole weight."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile.small import snapshot, to_bits, write_pipeline, write_weights
from numpy.typing import NDArray
from safetensors.torch import load_file

from omni_convert.converter import convert as conversion
from omni_convert.converter import execute as engine
from omni_convert.converter.convert import Means, convert, plan
from omni_convert.converter.execute import memory_bytes
from omni_convert.converter.jobs import Job, Worker
from omni_convert.converter.statistics import BINS, LayerStatistics, histogram, sample_rows
from omni_convert.formats import make_format

ROWS, COLUMNS = 500, 2048
METHODS = {
    "int8": {"method": "int8"},
    "fp8 block": {"method": "fp8", "block_size": (128, 128)},
    "mxfp4": {"method": "mxfp4"},
}


@pytest.fixture(scope="module", params=["BF16", "F32"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One weight with a large row, a large column, and a row of zeros; and one that is nothing but zeros."""
    values = np.random.default_rng(0).standard_normal((ROWS, COLUMNS))
    values[123] *= 10
    values[:, 77] *= 20
    values[400] = 0
    tensors = {"a.weight": to_bits(values, request.param), "b.weight": to_bits(np.zeros((40, 64)), request.param)}
    return write_weights(tmp_path_factory.mktemp("statistics") / "model.safetensors", tensors)


def weight(source: Path) -> NDArray[np.float64]:
    return load_file(source)["a.weight"].to(torch.float64).numpy()


@pytest.mark.parametrize("kind", METHODS)
def test_statistics(source: Path, tmp_path: Path, kind: str) -> None:
    report = convert(source, tmp_path / "out", target="omni-convert", statistics=True, **METHODS[kind])
    found = report.statistics["", "a"]
    exact = weight(source)
    fmt = make_format(**METHODS[kind])
    error = exact - fmt.dequantize(fmt.quantize(load_file(source)["a.weight"])).numpy()
    rows = [place for place in range(ROWS) if np.any(error[place])]
    assert 400 not in rows and len(rows) == ROWS - 1
    decibel = {row: 10 * np.log10(np.sum(exact[row] ** 2) / np.sum(error[row] ** 2)) for row in rows}
    assert found.channel_db == pytest.approx(np.quantile([*decibel.values()], [0, 0.05, 0.5, 0.95, 1]), abs=0.02)
    assert found.worst_channels[0][1] == pytest.approx(min(decibel.values()), abs=0.02)
    assert all(found_db == pytest.approx(decibel[row], abs=0.02) for row, found_db in found.worst_channels)
    assert [row for row, _ in found.large_rows] == [123]
    assert [column for column, _ in found.large_columns] == [77]
    assert found.large_rows[0][1] == pytest.approx(10, rel=0.1)
    assert found.large_columns[0][1] == pytest.approx(20, rel=0.35)  # of a few rows


def test_sample(source: Path, tmp_path: Path) -> None:
    found = convert(source, tmp_path / "out", method="int8", statistics=True).statistics["", "a"]
    rows = [row for row in range(ROWS) if row % (ROWS // 32) == 0]
    seen = weight(source)[rows]
    assert found.sampled_rows == len(rows) == len(sample_rows((ROWS, COLUMNS)))
    assert found.limit == pytest.approx(np.abs(seen).max())
    expected, _ = np.histogram(seen.astype(np.float32), BINS, (-found.limit, found.limit))
    assert np.abs(np.subtract(found.counts, expected)).sum() <= 4  # a float32 on the edge of two bins
    assert sum(found.counts) == seen.size


def test_zeros_have_statistics(source: Path, tmp_path: Path) -> None:
    found = convert(source, tmp_path / "out", method="int8", statistics=True).statistics["", "b"]
    assert (found.channel_db, found.worst_channels, found.large_rows, found.limit) == (None, (), (), 0.0)
    assert sum(found.counts) == 40 * 64


@pytest.mark.parametrize("threads", [1, 3])
def test_pieces_do_not_matter(source: Path, tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convert(source, tmp_path / "whole", method="int8", statistics=True)
    monkeypatch.setattr(conversion, "PIECE_BYTES", 7 * COLUMNS)
    cut = convert(source, tmp_path / "cut", method="int8", statistics=True, threads=threads)
    assert cut.statistics == whole.statistics


def test_nothing_is_gathered_unasked(source: Path, tmp_path: Path) -> None:
    plain = convert(source, tmp_path / "plain", method="int8")
    asked = convert(source, tmp_path / "asked", method="int8", statistics=True)
    assert plain.statistics == {} and asked.statistics.keys() == {("", "a"), ("", "b")}
    assert snapshot(tmp_path / "plain") == snapshot(tmp_path / "asked")
    planned = plan(source, method="int8")
    needs = [memory_bytes(planned, Means(statistics=asked, threads=1).settings(planned)) for asked in (False, True)]
    assert needs[0] < needs[1] < needs[0] + (1 << 20)


def test_statistics_survive_json(source: Path, tmp_path: Path) -> None:
    found = convert(source, tmp_path / "out", method="int8", statistics=True).statistics
    for statistics in found.values():
        assert LayerStatistics.parse(json.loads(json.dumps(asdict(statistics)))) == statistics


@pytest.mark.parametrize("before", [True, False], ids=["asked before", "asked late"])
def test_resumed_run_has_those_of_finished_files(tmp_path: Path, before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_pipeline(tmp_path / "model"), tmp_path / "out"
    whole = convert(source, tmp_path / "whole", method="int8", statistics=True).statistics
    first = out / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors"

    def run_jobs(files: Iterator[Iterator[Job]], *_: object) -> None:
        for job in chain.from_iterable(files):
            job.run(Worker())
            if first.exists():
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "run_jobs", run_jobs)
        convert(source, out, method="int8", statistics=before)
    resumed = convert(source, out, method="int8", statistics=True).statistics
    assert resumed == whole if before else 0 < len(resumed) < len(whole)


def test_histogram_keeps_what_lies_beyond() -> None:
    counts = histogram(np.array([-9, -1, 0, 0.99, 1, 9], np.float32), 1.0)
    assert (counts[0], counts[BINS // 2], counts[-1], sum(counts)) == (2, 1, 3, 6)
