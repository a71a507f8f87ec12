"""Every model class that vLLM-Omni loads, converted with every method it loads there: the right layers, all named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conversions import METHODS, choices, matrices, weights
from families import FAMILIES, Family
from hostile.small import read_json, snapshot

import omni_convert
from omni_convert.formats.target import TARGETS

VLLM_OMNI = TARGETS["vllm-omni"]
# By name and kind of format: what no engine of this version loads.
TRANSFORMERS_ONLY = ("int8", "mxfp8", "mxfp4", "mxfp4_dualscale")
REFUSED: dict[str, tuple[str, ...]] = {
    "Wan": ("fp8 channel",),
    "Wan VACE": ("fp8 channel",),
    "Wan TI2V-5B": ("fp8 channel", "mxfp4", "mxfp4_dualscale"),
    "HunyuanImage-3.0": ("fp8 channel", "fp8 block", "mxfp4_dualscale"),
    "Qwen3-Omni": (*TRANSFORMERS_ONLY, "fp8 channel"),
    "Qwen3-TTS": TRANSFORMERS_ONLY,
    "Qwen2.5-Omni": (*TRANSFORMERS_ONLY, "fp8 tensor", "fp8 static", "fp8 block"),
}
CASES = [(name, kind) for name in FAMILIES for kind in METHODS if kind not in REFUSED.get(name, ())]
RULES = (
    "weight files", "config place", "config keys", "method", "ignored layers", "other layers", "scales",
    "unknown tensors", "all layers", "shapes", "scale values",
)  # fmt: skip
FURTHER_RULES = {
    "Z-Image": ("text encoder",),
    "FLUX.2-dev": ("text encoder",),
    "FLUX.1": ("unquantizable layers",),
}
BLOCK_0 = r"re:(blocks|layers)\.0\."


def kept_by_default(family: str, kind: str, layer: str) -> bool:
    if family == "Qwen-Image":
        return kind.startswith("fp8") and "img_mlp" in layer
    first = layer.startswith(tuple(f"blocks.{number}." for number in range(5)))
    return family in ("Wan", "Wan VACE") and kind == "mxfp4_dualscale" and first


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_conversion_is_what_the_contract_says(sources: dict[str, Path], name: str, kind: str, tmp_path: Path) -> None:
    family, source, out = FAMILIES[name], sources[name], tmp_path / "out"
    report = omni_convert.convert(source, out, **choices(kind, source, family))
    method = METHODS[kind]["method"]
    layers = 0
    for part in family.components:
        before, after = weights(source / part), weights(out / part)
        expected = {
            layer for layer in matrices(before)
            if family.ignored_name(layer, method) and not kept_by_default(name, kind, layer)
        }  # fmt: skip
        quantized = {layer for layer in matrices(before) if after[f"{layer}.weight"].dtype != "BF16"}
        assert quantized == expected
        layers += len(expected)
        config = read_json(out / part / "config.json")
        if "Omni" in name:  # vLLM reads the one at the top, vLLM-Omni's stages theirs first
            assert config["thinker_config"]["text_config"]["quantization_config"] == config["quantization_config"]
        config = config["quantization_config"]
        ignored = config["ignore" if kind == "fp8 channel" else "ignored_layers"]
        kept = [layer for layer in matrices(before) if layer not in expected]
        names = family.expected_ignored(kept)
        if kind == "fp8 channel":  # the engine looks for plain names as parts of names
            engine = {family.runtime(family.ignored_name(layer, method) or "") for layer in expected} | expected
            names = {f"[{n[0]}]{n[1:]}" if any(n in other for other in engine) else n for n in names}
            names |= {"talker*"} if name == "Qwen2.5-Omni" else set()
        assert sorted(ignored) == sorted(names)
        changed = {f"{layer}.weight" for layer in expected}
        assert {tensor: after[tensor] for tensor in before.keys() - changed} == {
            tensor: before[tensor] for tensor in before.keys() - changed
        }
        assert {tensor.rpartition(".")[0] for tensor in after.keys() - before.keys()} <= expected
    assert report.layers == layers > 0
    assert report.warnings == () or name == "HunyuanImage-3.0"
    _check_other_files(source, out, family)
    result = omni_convert.verify(out, source=source)
    assert result.ok, result.to_text()
    _check_contract(result, name, kind)


def _check_contract(result: Any, name: str, kind: str) -> None:
    """Every rule of the engine's contract that applies is among the checks."""
    rules = {check.name.removeprefix("vllm-omni ") for check in result.checks if check.name.startswith("vllm-omni ")}
    expected = {*RULES, *FURTHER_RULES.get(name, ())}
    expected |= {"serialized flag"} if kind != "fp8 channel" and name not in ("Qwen3-Omni", "Qwen3-TTS") else set()
    expected |= {"codes"} if kind != "int8" else set()
    expected |= {"fused factors"} if kind == "mxfp4_dualscale" and name != "HunyuanImage-3.0" else set()
    expected |= {"fused layers"} if name != "HunyuanImage-3.0" or kind.startswith("fp8") else set()
    single = name == "HunyuanImage-3.0" and kind != "int8"
    expected |= {"fused scales"} if kind in ("int8", "fp8 tensor", "fp8 static") and not single else set()
    assert rules == expected


def _check_other_files(source: Path, out: Path, family: Family) -> None:
    before, after = snapshot(source), snapshot(out)
    folders = [f"{part}/" if part else "" for part in family.components]
    written = {name for name in before for folder in folders if name.rpartition("/")[0] == folder.rstrip("/")}
    written -= {"model_index.json"}
    assert {name: before[name] for name in before.keys() - written} == {
        name: after[name] for name in before.keys() - written
    }
    assert after.keys() - before.keys() == {"omni_convert.json"}


@pytest.mark.parametrize("name", FAMILIES)
def test_ignored_layers_have_all_their_names(sources: dict[str, Path], name: str) -> None:
    family = FAMILIES[name]
    kind = "fp8 channel" if name == "Qwen2.5-Omni" else "fp8 tensor"
    planned = omni_convert.plan(sources[name], **METHODS[kind], ignore=[BLOCK_0], default_ignore=False)
    for part in planned.components:
        found = matrices(weights(part.component.folder))
        kept = [layer for layer in found if _in_block_0(layer) or not family.ignored_name(layer, "fp8")]
        others = {"talker*"} if name == "Qwen2.5-Omni" else set()
        assert set(part.ignored_layers) == family.expected_ignored(kept) | others
        assert any(map(_in_block_0, kept))


def _in_block_0(layer: str) -> bool:
    return "blocks.0." in layer or "layers.0." in layer


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", METHODS)
def test_what_cannot_be_loaded_is_refused_with_what_can(sources: dict[str, Path], name: str, kind: str) -> None:
    if kind not in REFUSED.get(name, ()):
        assert VLLM_OMNI.refusal(name, kind) is None
        return
    source = sources[name]
    with pytest.raises(omni_convert.UsageError) as caught:
        omni_convert.plan(source, **choices(kind, source, FAMILIES[name]))
    message = str(caught.value)
    assert f"vLLM-Omni cannot load it for {name}" in message
    assert ("Use --method fp8 --granularity channel." if name == "Qwen2.5-Omni" else "Use --method ") in message
