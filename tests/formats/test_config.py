"""``quantization_config``: parsing and writing are inverse, and nothing else is accepted."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_convert.formats import FORMATS, format_label, make_format
from omni_convert.formats.base import Format
from omni_convert.formats.config import QuantizationConfig, parse_config, stored_config
from omni_convert.formats.errors import OmniConvertError

GOOD: dict[str, Any] = {
    "quant_method": "int8",
    "is_checkpoint_int8_serialized": True,
    "activation_scheme": "dynamic",
    "ignored_layers": ["proj_out"],
}


@given(st.sampled_from(sorted(FORMATS)), st.lists(st.text()))
def test_parse_is_the_inverse_of_to_dict(name: str, ignored: list[str]) -> None:
    config = QuantizationConfig(format=FORMATS[name], ignored_layers=tuple(ignored), is_serialized=True)
    assert parse_config(config.to_dict()) == config
    assert parse_config(config.to_dict()).to_dict() == config.to_dict()


def test_int8_has_exactly_four_keys() -> None:
    config = QuantizationConfig(format=FORMATS["int8"], ignored_layers=("proj_out",))
    assert config.to_dict() == GOOD


def test_formats_are_listed_by_their_own_name() -> None:
    assert all(fmt.name == name for name, fmt in FORMATS.items())


def test_key_of_online_quantization_means_nothing_on_disk() -> None:
    config = QuantizationConfig(format=FORMATS["mxfp4_dualscale"], is_serialized=True)
    assert parse_config(config.to_dict() | {"num_bf16_fallback_layers": 5}) == config
    with pytest.raises(OmniConvertError, match="num_bf16_fallback_layers"):
        parse_config(GOOD | {"num_bf16_fallback_layers": 5})


@pytest.mark.parametrize("ignored", [None, []])
def test_no_ignored_layers(ignored: object) -> None:
    assert parse_config(GOOD | {"ignored_layers": ignored}).ignored_layers == ()
    without = {key: value for key, value in GOOD.items() if key != "ignored_layers"}
    assert parse_config(without).ignored_layers == ()


def test_older_name_of_the_method_key() -> None:
    older = {("method" if key == "quant_method" else key): value for key, value in GOOD.items()}
    assert parse_config(older) == parse_config(GOOD)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"quant_method": "int9"}, "'int9'"),
        ({"quant_method": None}, "None"),
        ({"is_checkpoint_int8_serialized": False}, "False"),
        ({"is_checkpoint_int8_serialized": "true"}, "'true'"),
        ({"is_checkpoint_int8_serialized": 1}, "1"),
        ({"activation_scheme": "static"}, "'static'"),
        ({"ignored_layers": "proj_out"}, "'proj_out'"),
        ({"ignored_layers": ["a", 1]}, "['a', 1]"),
        ({"ignored_layers": {"a": 1}}, "{'a': 1}"),
        ({"producer": "me"}, "producer='me'"),
        ({"weight_block_size": None}, "weight_block_size=None"),
    ],
    ids=str,
)
def test_rejections_say_where_and_what(change: dict[str, Any], found: str) -> None:
    with pytest.raises(OmniConvertError) as caught:
        parse_config(GOOD | change, "here")
    message = str(caught.value)
    assert message.startswith("here: ")
    assert found in message
    assert next(iter(change)) in message
    assert "expected" in message


@pytest.mark.parametrize("key", ["quant_method", "is_checkpoint_int8_serialized"])
def test_mandatory_keys(key: str) -> None:
    with pytest.raises(OmniConvertError, match=key):
        parse_config({name: value for name, value in GOOD.items() if name != key})


@pytest.mark.parametrize("method", [["int8"], {"int8": 1}], ids=str)
def test_method_that_is_no_text(method: object) -> None:
    with pytest.raises(OmniConvertError, match="quant_method"):
        parse_config(GOOD | {"quant_method": method})


FP8 = {"quant_method": "fp8", "is_checkpoint_fp8_serialized": True, "activation_scheme": "dynamic"}


@pytest.mark.parametrize(
    "fmt",
    [
        make_format("fp8"),
        make_format("fp8", activation_scheme="static"),
        make_format("fp8", granularity="channel"),
        make_format("fp8", block_size=(64, 32)),
    ],
    ids=format_label,
)
def test_every_spelling_of_fp8(fmt: Format) -> None:
    config = QuantizationConfig(format=fmt, ignored_layers=("a", "b"), is_serialized=True)
    assert parse_config(config.to_dict()) == config


def test_the_other_activation_scales_of_mxfp4() -> None:
    data = {"quant_method": "mxfp4", "is_checkpoint_mxfp4_serialized": True, "ignored_layers": []}
    for config in (data, data | {"mxfp4_scale_alg": 0}, data | {"mxfp4_scale_alg": 2}):
        assert parse_config(config).to_dict() == config
    with pytest.raises(OmniConvertError, match="mxfp4_scale_alg=1"):
        parse_config(data | {"mxfp4_scale_alg": 1})


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (FP8 | {"weight_block_size": [128]}, "weight_block_size is [128]"),
        (FP8 | {"weight_block_size": 128}, "weight_block_size is 128"),
        (FP8 | {"weight_block_size": [128, 0]}, "weight_block_size is [128, 0]"),
        (FP8 | {"weight_block_size": [128, 128], "activation_scheme": "static"}, "static"),
        (FP8 | {"activation_scheme": "per-token"}, "per-token"),
        (FP8 | {"fmt": "e4m3"}, "fmt='e4m3'"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "is_checkpoint_fp8_serialized is None"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "modelopt"),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "ignore": "a"}, "ignore is 'a'"),
    ],
    ids=str,
)
def test_fp8_rejections(data: dict[str, Any], found: str) -> None:
    with pytest.raises(OmniConvertError) as caught:
        parse_config(data, "here")
    assert str(caught.value).startswith("here: ")
    assert found in str(caught.value)


def test_config_of_a_part_is_found() -> None:
    ours = {"quant_method": "int8"}
    assert stored_config({"quantization_config": ours}) is ours
    assert (
        stored_config({"a_config": {"b": {}}, "thinker_config": {"text_config": {"quantization_config": ours}}}) is ours
    )
    assert stored_config({"quantization_config": [], "thinker_config": 3}) == []
    assert stored_config({"other": {"quantization_config": ours}}) is None
    assert stored_config(None) is None
    deep: dict[str, Any] = {"quantization_config": ours}
    for _ in range(5000):
        deep = {"x_config": deep}
    assert stored_config(deep) is ours
