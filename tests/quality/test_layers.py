"""What a conversion's manifest and headers say of every layer."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile.small import read_json, write_json

import omni_convert
from omni_convert.converter.inspect import inspect
from omni_convert.formats.errors import OmniConvertError
from omni_convert.quality.layers import block_kinds, read_conversion

QUERY = "transformer_blocks.0.attn.to_q.weight"


@pytest.fixture(scope="module")
def out(qwen_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layers") / "out"
    omni_convert.convert(qwen_image, folder, method="int8", ignore=["img_mlp"])
    return folder


def test_conversion_is_what_was_planned(qwen_image: Path, out: Path) -> None:
    found = read_conversion(out)
    plan = omni_convert.plan(qwen_image, method="int8", ignore=["img_mlp"])
    assert (found.bytes_before, found.bytes_after) == (plan.bytes_before, plan.bytes_after)
    assert found.bits_per_weight == pytest.approx(plan.bits_per_weight)
    assert found.recipe == plan.recipe
    assert found.classes == {"transformer": "QwenImageTransformer2DModel"}
    planned = {tensor.layer: tensor for tensor in plan.tensors()}
    assert len(found.layers) == sum(len(tensor.source.spec.shape) > 1 for tensor in planned.values())
    assert len(found.layers) + found.others == len(planned)
    for layer in found.layers:
        tensor = planned[layer.name]
        assert (layer.dtype, layer.shape) == (tensor.source.spec.dtype, tensor.source.spec.shape)
        assert (layer.bytes_before, layer.bytes_after) == (tensor.source.spec.nbytes, tensor.bytes_after)
        assert (layer.reason, layer.group) == (tensor.decision.reason, tensor.group or tensor.layer)
        assert (layer.format is None) == (tensor.decision.format is None) == (layer.sqnr_db is None)
    (summary,) = [item for item in inspect(out).components if item.name == "transformer"]
    assert len(found.quantized) == summary.quantized_layers


def test_layer(out: Path) -> None:
    layers = {layer.name: layer for layer in read_conversion(out).layers}
    query = layers["transformer_blocks.1.attn.to_q"]
    assert (query.kind, query.block) == ("transformer_blocks.*.attn.to_q", 1)
    assert (query.group, query.format) == ("transformer_blocks.1.attn.to_qkv", "int8")
    assert query.full_name == "transformer.transformer_blocks.1.attn.to_q"
    assert query.sqnr_db and query.error == pytest.approx(10 ** (-query.sqnr_db / 10))
    assert query.shared_scale_db and 3 < query.shared_scale_db < 9
    kept = layers["transformer_blocks.0.img_mlp.net.2"]
    assert (kept.format, kept.error, kept.reason) == (None, 0.0, "--ignore img_mlp")


def test_worst_are_those_of_the_report(qwen_image: Path, tmp_path: Path) -> None:
    report = omni_convert.convert(qwen_image, tmp_path / "out", method="mxfp4", target="omni-convert")
    worst = read_conversion(tmp_path / "out").worst
    assert [round(layer.sqnr_db or 0, 2) for layer in worst] == sorted(round(db, 2) for db in report.sqnr_db.values())


def changed(out: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of ``out`` in which the transformer's tensors are changed in the manifest."""
    copy = shutil.copytree(out, folder / "out")
    manifest = read_json(copy / "omni_convert.json")
    change(manifest["components"]["transformer"]["tensors"])
    write_json(copy / "omni_convert.json", manifest)
    return copy


def test_exact_layers_lost_nothing(out: Path, tmp_path: Path) -> None:
    copy = changed(out, tmp_path, lambda tensors: tensors[QUERY].update(sqnr_db=None))
    conversion = read_conversion(copy)
    (layer,) = [layer for layer in conversion.layers if f"{layer.name}.weight" == QUERY]
    assert (layer.sqnr_db, layer.error) == (math.inf, 0.0)
    assert layer not in conversion.worst and len(conversion.worst) == len(conversion.quantized) - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.update(ghost={"action": "keep", "why": ""}), "lacks ghost"),
        (lambda tensors: tensors[QUERY].pop("dtype"), "was None, expected BF16"),
        (lambda tensors: tensors.clear(), "components.transformer.tensors is {}, expected an object that is not empty"),
        (lambda tensors: tensors.pop(QUERY), f"holds {QUERY}.*does not name"),
        (lambda tensors: tensors[QUERY].update(action="keep"), f"holds {QUERY}_scale.*does not name"),
        *(
            (
                lambda tensors, value=value: tensors[QUERY].update(sqnr_db=value),
                rf"transformer\.tensors\['{QUERY}'\]\.sqnr_db is .*, expected a number of dB or null",
            )
            for value in (math.nan, math.inf, -1e6, 1e300, "x", True, [])
        ),
        (
            lambda tensors: tensors[QUERY].update(shared_scale_db="x"),
            rf"\['{QUERY}'\]\.shared_scale_db is 'x', expected a number of dB",
        ),
    ],
)
def test_manifest_that_does_not_fit(
    out: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(OmniConvertError, match=message):
        read_conversion(changed(out, tmp_path, change))


def test_folders_that_are_no_conversion(qwen_image: Path, tmp_path: Path) -> None:
    for path in (qwen_image, tmp_path / "nothing"):
        with pytest.raises(OmniConvertError, match=r"found no omni_convert\.json"):
            read_conversion(path)


def test_block_kinds() -> None:
    names = [
        "blocks.0.attn.to_out.0",
        "blocks.11.attn.to_out.0",
        "proj_out",
        "blocks.0.net.2",
        "e.3.experts.0",
        "e.3.experts.1",
    ]
    assert block_kinds(names) == {
        "blocks.0.attn.to_out.0": ("blocks.*.attn.to_out.0", 0),
        "blocks.11.attn.to_out.0": ("blocks.*.attn.to_out.0", 11),
        "proj_out": ("proj_out", None),
        "blocks.0.net.2": ("blocks.*.net.2", 0),
        "e.3.experts.0": ("e.*.experts.*", 3),
        "e.3.experts.1": ("e.*.experts.*", 3),
    }
