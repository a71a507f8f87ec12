"""``build_quant_config``: names, dicts, components, finished configs."""

from __future__ import annotations

from typing import Any

import pytest

from omni_convert import OmniConvertError, UsageError, build_quant_config
from omni_convert.formats import FORMATS, make_format
from omni_convert.formats.config import LayerRule, QuantizationConfig, parse_config
from omni_convert.formats.quant_config import config_spec, parse_layer_rule


@pytest.mark.parametrize("method", FORMATS)
def test_a_name_is_a_method_with_its_defaults(method: str) -> None:
    expected = QuantizationConfig(format=FORMATS[method])
    assert build_quant_config(method) == build_quant_config({"method": method}) == expected
    flag = FORMATS[method].serialized_flag
    assert build_quant_config({"quant_method": method, flag: False}) == expected


def test_nothing_is_nothing() -> None:
    assert build_quant_config(None) is None
    assert build_quant_config("none") is None
    assert build_quant_config({"method": None}) is None


@pytest.mark.parametrize(
    ("spec", "config"),
    [
        (
            {"method": "fp8", "activation_scheme": "static", "ignored_layers": ["img_mlp"]},
            QuantizationConfig(
                format=make_format("fp8", activation_scheme="static"), ignored_layers=("img_mlp",)
            ),
        ),
        (
            {"method": "fp8", "weight_block_size": [64, 128]},
            QuantizationConfig(format=make_format("fp8", block_size=(64, 128))),
        ),
        ({"method": "fp8", "weight_block_size": None}, QuantizationConfig(format=make_format("fp8"))),
        (
            {"method": "int8", "quality": "balanced", "layers": [{"txt_mlp": "fp8"}, {"img_mlp": None, "b": "none"}]},
            QuantizationConfig(
                format=make_format("int8", quality="balanced"),
                layers=(LayerRule("txt_mlp", FORMATS["fp8"]), LayerRule("img_mlp", None), LayerRule("b", None)),
            ),
        ),
    ],
)  # fmt: skip
def test_a_dict_has_the_parameters(spec: dict[str, Any], config: QuantizationConfig) -> None:
    assert build_quant_config(spec) == config
    assert build_quant_config(config_spec(config)) == config
    method, options = spec.pop("method"), spec
    assert build_quant_config(method, **options) == config
    assert build_quant_config(config) is config


def test_components_are_built_one_by_one() -> None:
    built = build_quant_config({"transformer": {"method": "fp8"}, "text_encoder": "int8", "vae": None})
    assert built == {
        "transformer": QuantizationConfig(format=FORMATS["fp8"]),
        "text_encoder": QuantizationConfig(format=FORMATS["int8"]),
        "vae": None,
    }


def test_a_serialized_config_is_read_as_engines_read_it() -> None:
    stored = FORMATS["int8"].config(["img_in", "blocks.0.attn.to_qkv"])
    built = build_quant_config(stored)
    assert built == parse_config(stored)
    assert isinstance(built, QuantizationConfig)
    assert built.is_serialized
    assert built.to_dict() == stored


def test_several_formats_survive_the_disk() -> None:
    config = QuantizationConfig(
        format=FORMATS["int8"],
        ignored_layers=("img_in",),
        layers=(LayerRule("a", FORMATS["mxfp8"]), LayerRule("b", make_format("fp8", granularity="channel"))),
        is_serialized=True,
    )
    stored = config.to_dict()
    assert stored["quant_method"] == "omni_convert"
    assert [entry["quant_method"] for entry in stored["formats"]] == ["int8", "mxfp8", "modelopt"]
    assert [entry.get("layers") for entry in stored["formats"]] == [None, ["a"], ["b"]]
    assert parse_config(stored) == build_quant_config(stored) == config
    assert [config.format_on_disk(name).name for name in ("a", "b", "c")] == ["mxfp8", "fp8", "int8"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"formats": []}, "at least two"),
        ({"formats": "int8"}, "expected a list"),
        ({"extra": 1}, "found extra, expected no such key"),
        ({"ignored_layers": ["a"]}, "names layer a twice"),
        ({"ignored_layers": "a"}, "expected a list of layer names"),
    ],
)
def test_a_damaged_mix_is_refused(change: dict[str, Any], message: str) -> None:
    config = QuantizationConfig(format=FORMATS["int8"], layers=(LayerRule("a", FORMATS["mxfp8"]),), is_serialized=True)
    with pytest.raises(OmniConvertError, match=message):
        parse_config({**config.to_dict(), **change})


def test_a_mix_names_the_layers_of_all_but_the_first_format() -> None:
    entries = [FORMATS[name].config(()) for name in ("int8", "mxfp8")]
    for entry in entries:
        del entry["ignored_layers"]
    for layers in ([["a"], ["b"]], [[], []], [[], ["a", "a"]]):
        formats = [{**entry, "layers": names} for entry, names in zip(entries, layers, strict=True)]
        with pytest.raises(OmniConvertError, match=r"formats|twice"):
            parse_config({"quant_method": "omni_convert", "formats": formats})
    with pytest.raises(OmniConvertError, match="a format twice"):
        parse_config({"quant_method": "omni_convert", "formats": [entries[0], {**entries[0], "layers": ["a"]}]})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("int9", "expected one of int8"),
        ({"method": "int9"}, "expected one of int8"),
        ({"method": 8}, "expected one of int8"),
        ({"method": ["int8"]}, "expected one of int8"),
        ({"method": "int8", "ignore": ["a"]}, "Did you mean ignored_layers"),
        ({"method": "int8", "bits": 4}, "found the key bits"),
        ({"method": "int8", "ignored_layers": "img_mlp"}, "expected a list"),
        ({"method": "int8", "ignored_layers": [1]}, "expected a pattern"),
        ({"method": "int8", "ignored_layers": [""]}, "empty pattern"),
        ({"method": "int8", "ignored_layers": ["re:("]}, "not a regular expression"),
        ({"method": "int8", "layers": {"a": "fp8"}}, "expected a list"),
        ({"method": "int8", "layers": ["a"]}, "expected a pattern and its method"),
        ({"method": "int8", "layers": [{"a": {"b": "fp8"}}]}, "expected a method, or a dict with a method"),
        ({"method": "int8", "layers": [{"a": {"method": "fp8", "ignored_layers": ["b"]}}]}, "layers of its own"),
        ({"method": "int8", "weight_block_size": [128, 128]}, "--block-size: int8 has no such choice"),
        ({"method": "int8", "activation_scheme": "static"}, "knows only dynamic"),
        ({"method": "fp8", "weight_block_size": 128}, "expected a list"),
        ({"method": "int8", "is_checkpoint_int8_serialized": "yes"}, "expected true or false"),
        ({"method": "int8", "layers": [{"a": {"method": "int8", "fused_scale": "shared"}}]}, "a: fused_scale is one"),
        ({"method": "int8", "layers": [{"a": {"method": "int9"}}]}, "layers: a: the method is 'int9'"),
        ({"method": "int8", "layers": [{"a": False}]}, "layers: a: found False .no and yes in YAML"),
        ({"method": "int8", "layers": [{"a": FORMATS["int8"].config([])}]}, "or is serialized"),
        ({"method": "int8", "quant_method": "fp8"}, "found method int8 and quant_method fp8"),
        ({"transformer": {"unet": "int8"}}, "transformer: found"),
        (8, "expected a method, a dict"),
        (["int8"], "expected a method, a dict"),
    ],
    ids=str,
)
def test_what_cannot_be_built(spec: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_quant_config(spec)


def test_what_engines_call_by_other_names_is_read_as_they_do() -> None:
    stored = make_format("fp8", granularity="channel").config(["img_in"])
    assert build_quant_config(stored) == parse_config(stored)


@pytest.mark.parametrize("choice", ["shared", "per-channel"])
def test_rules_have_the_components_choice_of_fused_scales(choice: str) -> None:
    built = build_quant_config({"method": "int8", "fused_scale": choice, "layers": [{"attn.to_q": "int8"}]})
    assert isinstance(built, QuantizationConfig)
    assert built.layers[0].format == make_format("int8", fused_scale=choice)
    assert build_quant_config(config_spec(built)) == built


def test_a_config_that_holds_itself() -> None:
    spec: dict[str, Any] = {}
    spec["transformer"] = spec
    with pytest.raises(UsageError, match="transformer: found"):
        build_quant_config(spec)


def test_options_belong_into_a_dict() -> None:
    with pytest.raises(UsageError, match="found the key quality beside a finished config"):
        build_quant_config(QuantizationConfig(format=FORMATS["int8"]), quality="balanced")
    with pytest.raises(UsageError, match="found the key quality"):
        build_quant_config({"transformer": "int8"}, quality="balanced")


def test_layer_rules_as_typed() -> None:
    assert parse_layer_rule("img_mlp=none") == LayerRule("img_mlp", None)
    assert parse_layer_rule(r"re:a=b\.=fp8") == LayerRule(r"re:a=b\.", FORMATS["fp8"])
    for text in ("img_mlp", "=fp8", ""):
        with pytest.raises(UsageError, match="PATTERN=METHOD"):
            parse_layer_rule(text)
