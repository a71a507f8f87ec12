"""Engines as data: what each loads, and that everything it says names something that exists."""

from __future__ import annotations

import re

import pytest

from omni_convert.formats import FORMATS, make_format
from omni_convert.formats.base import Format
from omni_convert.formats.errors import UsageError
from omni_convert.formats.tables_omni import OWN_TABLES
from omni_convert.formats.target import (
    DEFAULT_TARGET,
    TARGETS,
    Rule,
    Target,
    find_target,
    format_kind,
    kind_flags,
    names_of_encoder,
)

VLLM_OMNI, OMNI_CONVERT = TARGETS["vllm-omni"], TARGETS["omni-convert"]
KINDS = [
    (make_format("int8"), "int8", "--method int8"),
    (make_format("int8", quality="balanced"), "int8", "--method int8"),
    (make_format("fp8"), "fp8 tensor", "--method fp8"),
    (make_format("fp8", activation_scheme="static"), "fp8 static", "--method fp8 --activation-scheme static"),
    (make_format("fp8", granularity="channel"), "fp8 channel", "--method fp8 --granularity channel"),
    (make_format("fp8", block_size=(64, 32)), "fp8 block", "--method fp8 --granularity block"),
    (make_format("mxfp8", scale_rule="floor"), "mxfp8", "--method mxfp8"),
    (make_format("mxfp4"), "mxfp4", "--method mxfp4"),
    (make_format("mxfp4_dualscale"), "mxfp4_dualscale", "--method mxfp4_dualscale"),
]


def test_the_default_is_the_first() -> None:
    assert next(iter(TARGETS)) == DEFAULT_TARGET == "vllm-omni"
    assert find_target(DEFAULT_TARGET) is VLLM_OMNI
    with pytest.raises(UsageError, match="'vllm', expected one of vllm-omni, omni-convert"):
        find_target("vllm")


@pytest.mark.parametrize(("fmt", "kind", "flags"), KINDS, ids=[flags for _, _, flags in KINDS])
def test_kinds_of_formats(fmt: Format, kind: str, flags: str) -> None:
    assert (format_kind(fmt), kind_flags(kind)) == (kind, flags)


def test_every_kind_has_hardware() -> None:
    assert VLLM_OMNI.formats.keys() == {kind for _, kind, _ in KINDS}
    assert {kind.split()[0] for kind in VLLM_OMNI.formats} == FORMATS.keys()
    on_npu = {kind for kind, hardware in VLLM_OMNI.formats.items() if "Ascend NPU" in hardware}
    on_cuda = {kind for kind, hardware in VLLM_OMNI.formats.items() if "CUDA" in hardware}
    assert on_npu == {"int8", "mxfp8", "mxfp4", "mxfp4_dualscale"}
    assert on_cuda == {"int8", "fp8 tensor", "fp8 static", "fp8 channel", "fp8 block"}


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_rules_name_what_exists(target: Target) -> None:
    names = {table.name for table in (*(target.architectures or ()), *OWN_TABLES)}
    kinds = {*VLLM_OMNI.formats, *FORMATS}
    for rule in (*target.refused, *target.kept, *target.cautions):
        assert names.issuperset(rule.architectures)
        assert kinds.issuperset(rule.methods)
        assert rule.reason[0].islower()
        assert not rule.reason.endswith(".")
    assert all(rule.layers for rule in target.kept)


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_kept_layers_are_quantizable(target: Target) -> None:
    """A rule for layers that no table has would never be seen to be wrong."""
    tables = {table.name: table for table in (*(target.architectures or ()), *OWN_TABLES)}
    for rule in target.kept:
        for name in rule.architectures:
            table = tables[name]
            layers = [
                f"{prefix}.{member}".replace("N", "0")
                for block in table.blocks for prefix in block.prefixes for member in block.members
            ]  # fmt: skip
            assert any(re.search(rule.layers, layer) for layer in layers)
            assert rule in target.kept_rules(name, rule.methods[0])


@pytest.mark.parametrize(
    ("methods", "kind", "holds"),
    [
        ((), "int8", True),
        (("fp8",), "fp8 block", True),
        (("fp8 block",), "fp8 block", True),
        (("fp8 block",), "fp8 tensor", False),
        (("mxfp4",), "mxfp4_dualscale", False),
        (("int8",), "fp8 static", False),
    ],
)
def test_rules_hold_for_methods(methods: tuple[str, ...], kind: str, holds: bool) -> None:
    assert Rule(reason="because", methods=methods).holds("BERT", kind) is holds
    assert not Rule(reason="because", methods=methods, architectures=("Wan",)).holds("BERT", kind)
    assert not Rule(reason="because", methods=methods, architectures=("Wan",)).holds(None, kind)


@pytest.mark.parametrize("kind", VLLM_OMNI.formats)
def test_nothing_works_for_a_class_without_quantized_layers(kind: str) -> None:
    assert VLLM_OMNI.refusal("SD3.5", kind)
    assert VLLM_OMNI.working("SD3.5") == []


def test_our_own_runtime_takes_any_class_in_the_formats_it_runs() -> None:
    assert OMNI_CONVERT.formats.keys() == {kind for _, kind, _ in KINDS}
    assert {kind.split()[0] for kind in OMNI_CONVERT.formats} == FORMATS.keys()
    assert (OMNI_CONVERT.mixes, VLLM_OMNI.mixes) == (True, False)
    assert OMNI_CONVERT.refusal(None, "int8") is None
    assert OMNI_CONVERT.refusal("SD3.5", "int8") is None
    assert OMNI_CONVERT.refusal(None, "nvfp4") == "it loads no nvfp4 weights"
    assert OMNI_CONVERT.find({"_class_name": "QwenImageTransformer2DModel"}, []) is None
    assert OMNI_CONVERT.knows(None)
    assert not VLLM_OMNI.knows(None)
    assert not VLLM_OMNI.knows(VLLM_OMNI.find({"model_type": "bert"}, []))


def test_layers_of_text_encoders_are_counted_by_their_config() -> None:
    z_image = VLLM_OMNI.find({"_class_name": "ZImageTransformer2DModel"}, [])
    klein = VLLM_OMNI.find({"_class_name": "Flux2Transformer2DModel"}, [], "Flux2KleinPipeline")
    assert z_image is not None
    assert klein is not None
    assert len(list(names_of_encoder(z_image, {"num_hidden_layers": 36}))) == 36 * 7 + 1
    assert list(names_of_encoder(klein, {})) == []
    for config in ({}, {"num_hidden_layers": "36"}, {"text_config": {"num_hidden_layers": 36}}):
        with pytest.raises(KeyError, match="num_hidden_layers"):
            list(names_of_encoder(z_image, config))
