"""Any tensors in any layout: each arrives once, in the shard it was in, unchanged or quantized with all its scales."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from hostile.small import (
    Tensor,
    as_stored,
    random,
    read_folder,
    read_json,
    read_weights,
    write_json,
    write_sharded,
    write_weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import omni_convert

# The companions of a quantized weight.
COMPANIONS = {
    "int8": {"weight_scale"},
    "fp8": {"weight_scale"},
    "mxfp8": {"weight_scale"},
    "mxfp4": {"weight_scale"},
    "mxfp4_dualscale": {"weight_scale", "weight_dual_scale", "mul_scale"},
}
CODES = {"I8", "F8_E4M3"}
UNKNOWN = {"_class_name": "ClassOfTomorrow"}
WORDS = ["blocks", "layers", "0", "1", "attn", "to_q", "mlp", "experts", "gate", "embed", "norm", "mtp", "proj"]
LETTERS = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="."), min_size=1, max_size=4)
layer_names = st.lists(st.sampled_from(WORDS) | LETTERS, min_size=1, max_size=4).map(".".join)
shapes = st.one_of(
    st.tuples(st.integers(1, 40), st.sampled_from([1, 7, 32, 64, 96])),
    st.lists(st.integers(0, 6), max_size=4).map(tuple),
    st.tuples(st.integers(1, 3), st.just(32), st.just(64)),
)


@st.composite
def tensors_of_any_kind(draw: st.DrawFn) -> dict[str, Tensor]:
    tensors = {"blocks.7.linear.weight": random(32, 64)}
    for place, layer in enumerate(draw(st.lists(layer_names, unique=True, max_size=8))):
        suffix = draw(st.sampled_from([".weight", ".weight", ".bias", ""]))
        dtype = draw(st.sampled_from(["BF16", "BF16", "F16", "F32", "F64", "I64", "BOOL"]))
        shape = draw(shapes)
        whole = {"I64": Tensor("I64", np.full(shape, place, "<i8")), "BOOL": Tensor("BOOL", np.ones(shape, "u1"))}
        tensors[layer + suffix] = whole[dtype] if dtype in whole else random(*shape, dtype=dtype, seed=place)
    return tensors


@settings(max_examples=80, deadline=None)
@given(
    tensors=tensors_of_any_kind(),
    homes=st.lists(st.integers(0, 3), min_size=9, max_size=9),
    stem=st.sampled_from(["model", "diffusion_pytorch_model"]),
    single=st.booleans(),
    method=st.sampled_from(sorted(COMPANIONS)),
)
def test_nothing_is_lost_doubled_or_renamed(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor], homes: list[int], stem: str, single: bool,
    method: str,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("any")
    source, out = folder / "model", folder / "out"
    parts = [{name: tensors[name] for name, home in zip(tensors, homes, strict=False) if home == n} for n in range(4)]
    if single:
        write_weights(source / f"{stem}.safetensors", tensors)
        write_json(source / "config.json", UNKNOWN)
    else:
        write_sharded(source, [part for part in parts if part], UNKNOWN, stem=stem)
    report = omni_convert.convert(source, out, method=method)  # type: ignore[arg-type]
    files = [path.name for path in source.iterdir()]
    assert sorted(path.name for path in out.iterdir()) == sorted([*files, "omni_convert.json"])
    quantized, names = set(), []
    for path in source.glob("*.safetensors"):
        before, after = read_weights(path), read_weights(out / path.name)
        layers = {name.removesuffix(".weight") for name in before if after[name].dtype in CODES}
        quantized |= layers
        assert after.keys() == before.keys() | {f"{layer}.{name}" for layer in layers for name in COMPANIONS[method]}
        same = before.keys() - {f"{layer}.weight" for layer in layers}
        assert {name: after[name] for name in same} == {name: as_stored(tensors[name]) for name in same}
        names += after
    assert len(names) == len(set(names))
    assert report.layers == len(quantized) > 0
    matrices = {
        name.removesuffix(".weight") for name, tensor in tensors.items()
        if name.endswith(".weight") and len(tensor.bits.shape) == 2
    }  # fmt: skip
    ignored = set(read_json(out / "config.json")["quantization_config"]["ignored_layers"])
    assert quantized <= matrices
    assert ignored & matrices == matrices - quantized
    if not single:
        index = read_json(out / f"{stem}.safetensors.index.json")
        assert index["weight_map"] == {name: p.name for p in out.glob("*.safetensors") for name in read_weights(p)}
        assert index["metadata"]["total_size"] == sum(len(item.data) for item in read_folder(out).values())
    assert omni_convert.verify(out, source=source).ok
    shutil.rmtree(folder)
