"""The layer report as data: figures of real conversions, lines that do what they say, a curve that holds."""

from __future__ import annotations

import json
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hostile.small import (
    QWEN_CONFIG,
    Tensor,
    qwen_shards,
    random,
    to_bits,
    write_pipeline,
    write_sharded,
    write_weights,
)
from numpy.typing import NDArray
from safetensors.torch import load_file

import omni_convert
from omni_convert.converter import execute as engine
from omni_convert.converter.convert import Report
from omni_convert.converter.jobs import Job, Worker
from omni_convert.converter.plan import Plan
from omni_convert.converter.statistics import histogram, sample_rows
from omni_convert.formats.errors import OmniConvertError
from omni_convert.quality.layers import Layer
from omni_convert.quality.report import WORST, LayerReport, report

METHODS = {
    "int8": {"method": "int8", "target": "vllm-omni"},
    "fp8": {"method": "fp8", "target": "omni-convert"},
    "fp8 block": {"method": "fp8", "block_size": (32, 32), "target": "omni-convert"},
    "mxfp4": {"method": "mxfp4", "target": "omni-convert"},
    "mxfp4_dualscale": {"method": "mxfp4_dualscale", "target": "omni-convert"},
}


@pytest.fixture(scope="module", params=METHODS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def run(kind: str, minilm: Path, qwen_image: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A conversion that gathered statistics, and its source: of a pipeline with fused layers, or of trained weights."""
    source = qwen_image if kind in ("int8", "fp8") else minilm
    out = tmp_path_factory.mktemp("report") / "out"
    return source, omni_convert.convert(source, out, statistics=True, **METHODS[kind])  # type: ignore[arg-type]


def test_measured_anew_is_what_the_conversion_measured(run: tuple[Path, Report]) -> None:
    source, done = run
    before, after = report(done.out, run=done), report(done.out, source=source)
    assert before.origin == "Measured during the conversion."
    assert after.origin == f"Measured anew, against {source.name}."
    assert len(before.statistics) == len(before.conversion.quantized) == len(after.statistics) > 20
    for place, found in before.statistics.items():
        anew = after.statistics[place]
        assert (found.limit, found.counts, found.large_columns) == (anew.limit, anew.counts, anew.large_columns)
        assert found.channel_db == pytest.approx(anew.channel_db, abs=0.02)
        assert [db for _, db in found.worst_channels] == pytest.approx([db for _, db in anew.worst_channels], abs=0.02)
    decibel = [[layer.sqnr_db for layer in item.conversion.quantized] for item in (before, after)]
    assert decibel[0] == pytest.approx(decibel[1], abs=0.01)


def test_manifest_and_codes_alone(run: tuple[Path, Report], tmp_path: Path) -> None:
    done = run[1]
    alone, whole = report(done.out), report(done.out, run=done)
    assert alone.statistics == {} and "needs" not in alone.origin and "need --source" in alone.origin
    assert alone.conversion == whole.conversion and alone.curve == whole.curve
    assert alone.mean_sqnr_db == done.mean_sqnr_db
    assert alone.seconds is None and whole.seconds == done.seconds
    for few, all_ in zip(alone.details, whole.details, strict=True):
        assert few.statistics is None and all_.statistics
        assert few.scales == all_.scales
        assert sum(few.after) == sum(all_.after) == sum(all_.statistics.counts)


def dequantized(found: LayerReport, layer: Layer) -> NDArray[np.float32]:
    """The whole weight, by other libraries and the format's reference."""
    folder = found.conversion.path / layer.component
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    fmt, prefix = found.conversion.formats[layer.component][layer.name], f"{layer.name}."
    stored = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    values: NDArray[np.float32] = fmt.dequantize({suffix: stored[suffix] for suffix in fmt.suffixes}).numpy()
    return values


def test_details(run: tuple[Path, Report]) -> None:
    done = run[1]
    found = report(done.out, run=done)
    assert len(found.details) == min(WORST, len(found.conversion.quantized))
    assert [item.layer.sqnr_db for item in found.details] == sorted(
        layer.sqnr_db or 0 for layer in found.conversion.quantized
    )[: len(found.details)]
    for item in found.details:
        expected = histogram(dequantized(found, item.layer)[sample_rows(item.layer.shape)], item.limit)
        assert item.after == expected
        for scales in item.scales:
            assert 0 < scales.smallest <= scales.largest and sum(scales.counts) == scales.number
    json.dumps(found.to_dict(), allow_nan=False)


def planned(source: Path, kind: str, line: str) -> set[str]:
    """What a line on the command keeps, compared with the conversion without it."""
    option, value = shlex.split(line)
    assert option == "--ignore"
    return changed(*(omni_convert.plan(source, **METHODS[kind], ignore=ignore) for ignore in ([], [value])))  # type: ignore[arg-type]


def changed(before: Plan, after: Plan) -> set[str]:
    """The layers that become something else."""
    formats = [
        {t.layer: t.decision.format and t.decision.format.name for t in plan.tensors()} for plan in (before, after)
    ]
    return {layer for layer, fmt in formats[0].items() if formats[1][layer] != fmt}


def test_lines_for_layers_that_a_rule_quantizes(tmp_path: Path) -> None:
    source = write_sharded(tmp_path / "model", [*qwen_shards(width=64)], QWEN_CONFIG)
    asked = {"method": "int8", "target": "omni-convert"}
    rules = ["to_k=fp8", "re:txt_mlp.*=mxfp4"]
    omni_convert.convert(source, tmp_path / "out", **asked, layers=rules)  # type: ignore[arg-type]
    found = report(tmp_path / "out")
    options = Counter(shlex.split(item.keep)[0] for item in found.details)
    assert set(options) == {"--layer", "--ignore"}
    for item in found.details:
        option, value = shlex.split(item.keep)
        ignore, first = ([value], []) if option == "--ignore" else ([], [value])
        before = omni_convert.plan(source, **asked, layers=rules)  # type: ignore[arg-type]
        after = omni_convert.plan(source, **asked, layers=[*first, *rules], ignore=ignore)  # type: ignore[arg-type]
        group = {layer.name for layer in found.conversion.layers if layer.group == item.layer.group}
        assert changed(before, after) == group


def test_lines_name_a_group_and_nothing_else(run: tuple[Path, Report], kind: str) -> None:
    source, done = run
    found = report(done.out)
    for item in found.details:
        group = {layer.name for layer in found.conversion.layers if layer.group == item.layer.group}
        assert item.layer.name in group
        assert planned(source, kind, item.keep) == group


def test_curve_is_what_conversions_cost(run: tuple[Path, Report], kind: str) -> None:
    source, done = run
    found = report(done.out)
    sizes, errors = [step.bytes_after for step in found.curve], [step.error for step in found.curve]
    assert (sizes[0], sizes[-1]) == (done.bytes_after, done.bytes_before)
    assert (errors[0], errors[-1]) == (1.0, pytest.approx(0, abs=1e-9))
    assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)
    groups = [step.group for step in found.curve[1:4]]
    plan = omni_convert.plan(source, **METHODS[kind], ignore=groups)  # type: ignore[arg-type]
    assert plan.bytes_after == sizes[3]
    lost = {layer.name: layer.error for layer in found.conversion.quantized}
    kept = sum(layer.error for layer in found.conversion.quantized if layer.group in groups)
    assert errors[3] == pytest.approx(1 - kept / sum(lost.values()))


def test_names_inside_of_names(tmp_path: Path) -> None:
    names = ["blocks.1.q", "x.blocks.1.q", "blocks.1.q.more", "blocks.10.q", "blocks.4.re:x*[a]", "[b].q", "re:.*"]
    source = write_weights(tmp_path / "model.safetensors", {f"{name}.weight": random(64, 64) for name in names})
    done = omni_convert.convert(source, tmp_path / "out", method="mxfp4", target="omni-convert")
    found = report(done.out)
    assert {item.layer.name for item in found.details} == set(names)
    for item in found.details:
        assert planned(source, "mxfp4", item.keep) == {item.layer.name}


def test_components_are_named_where_there_are_several(tmp_path: Path) -> None:
    source = write_pipeline(tmp_path / "model", second=True)
    done = omni_convert.convert(source, tmp_path / "out", method="int8")
    found = report(done.out)
    keys = {(layer.component, layer.name): layer.group for layer in found.conversion.quantized}
    item = next(item for item in found.details if item.layer.component == "transformer_2")
    group = {place for place, name in keys.items() if (place[0], name) == (item.layer.component, item.layer.group)}
    plan = omni_convert.plan(source, method="int8", ignore=[shlex.split(item.keep)[1]])
    left = {(part.component.name, t.layer) for part in plan.components for t in part.tensors() if t.decision.format}
    assert keys.keys() - left == group


def test_weights_without_loss_have_a_page_too(tmp_path: Path) -> None:
    zeros = Tensor("BF16", to_bits(np.zeros((64, 64))).bits)
    source = write_weights(tmp_path / "model.safetensors", {"blocks.0.a.weight": zeros})
    done = omni_convert.convert(source, tmp_path / "out", method="int8", statistics=True)
    found = report(done.out, run=done)
    assert (found.details, len(found.curve), found.to_dict()["mean_sqnr_db"]) == ((), 1, None)
    assert "exact" in found.to_html() and "exact" in found.to_text()


def test_the_source_is_not_read_again(qwen_image: Path, tmp_path: Path) -> None:
    source = shutil.copytree(qwen_image, tmp_path / "model")
    done = omni_convert.convert(source, tmp_path / "out", method="int8", statistics=True)
    shutil.rmtree(source)
    found = report(done.out, run=done)
    assert all(item.statistics for item in found.details)


def test_what_an_earlier_run_did_not_measure_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_pipeline(tmp_path / "model"), tmp_path / "out"
    first = out / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors"

    def run_jobs(files: Iterator[Iterator[Job]], *_: object) -> None:
        for job in chain.from_iterable(files):
            job.run(Worker())
            if first.exists():
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "run_jobs", run_jobs)
        omni_convert.convert(source, out, method="int8")
    done = omni_convert.convert(source, out, method="int8", statistics=True)
    found: LayerReport = report(out, run=done)
    missing = len(found.conversion.quantized) - len(found.statistics)
    assert 0 < missing < len(found.conversion.quantized)
    assert f"except {missing} layers" in found.origin and found.origin in found.to_text()
    assert {item.statistics is None for item in found.details} == {True, False}
    assert "except" in found.to_html()


def test_another_source_is_refused(run: tuple[Path, Report], tmp_path: Path) -> None:
    with pytest.raises(OmniConvertError, match=r"is not in the source.* Name the model that was converted"):
        report(run[1].out, source=write_pipeline(tmp_path / "other"))
