"""Tracing layers: each one's own output error on real activations, whatever came before it."""

from __future__ import annotations

import copy
import json
import math
import shlex
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile.small import random, write_weights
from loaded import layers_of
from models import add_outliers, load_bf16, write_qwen_image
from safetensors.torch import save_file

import omni_convert
from omni_convert import OmniConvertError
from omni_convert.formats.text import mean_db
from omni_convert.quality.fused import Unit
from omni_convert.quality.request import HIDDEN, Answer, Request
from omni_convert.quality.trace import LayerTrace, by_kind, keeping_lines, quantized_layers
from omni_convert.quality.trace import trace as trace_layers

SIZE: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2}
BROKEN = "transformer_blocks.0.img_mlp.net.2"


def trace(reference: Path, candidate: Path) -> Any:
    return omni_convert.compare(
        reference, candidate, task="t2i", prompt="a cup of coffee", trace_layers=True, **SIZE
    ).to_dict()["trace"]


@pytest.fixture
def converted(qwen_image: Path, tmp_path: Path) -> Path:
    omni_convert.convert(qwen_image, tmp_path / "out", method="int8")
    return tmp_path / "out"


def test_finds_the_layer_that_is_broken(qwen_image: Path, converted: Path) -> None:
    """It is in the first block: all that follows sees its error, and yet is not blamed."""
    before = trace(qwen_image, converted)
    path = next(path for path in (converted / "transformer").glob("*.safetensors") if has(path, BROKEN))
    tensors = tensors_of(path)
    tensors[f"{BROKEN}.weight_scale"] *= 1.5
    save_file(tensors, path)
    after = trace(qwen_image, converted)
    assert after[0]["layer"] == f"transformer.{BROKEN}"
    assert after[0]["relative_l2"] == pytest.approx(0.5, abs=0.02)
    rest = [{entry["layer"]: entry for entry in found if BROKEN not in entry["layer"]} for found in (before, after)]
    assert rest[0] == rest[1]


def has(path: Path, layer: str) -> bool:
    return f"{layer}.weight" in tensors_of(path)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_errors_are_those_of_single_layers(qwen_image: Path, converted: Path) -> None:
    """Against inputs and outputs of the library's own model, recorded and put through the layer afterwards."""
    layers = layers_of(omni_convert.load(converted).transformer)
    pipe = load_bf16(qwen_image)
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    pipe.transformer.get_submodule(BROKEN).register_forward_hook(
        lambda _, x, y: calls.append((x[0].clone(), y.clone()))
    )
    pipe("a cup of coffee", generator=torch.Generator().manual_seed(42), **SIZE)
    with torch.inference_mode():
        noise = sum(float((layers[BROKEN](x).double() - y.double()).square().sum()) for x, y in calls)
    signal = sum(float(y.double().square().sum()) for _, y in calls)
    traced = {entry["layer"]: entry for entry in trace(qwen_image, converted)}
    assert traced.keys() == {f"transformer.{name}" for name in layers}
    found = traced[f"transformer.{BROKEN}"]
    assert (found["calls"], found["format"]) == (len(calls), "int8")
    assert found["relative_l2"] == pytest.approx(math.sqrt(noise / signal), rel=1e-4)
    assert found["sqnr_db"] == pytest.approx(10 * math.log10(signal / noise), rel=1e-4)


def test_worst_first_and_in_the_text(qwen_image: Path, converted: Path) -> None:
    result = omni_convert.compare(
        qwen_image, converted, task="t2i", prompt="a", trace_layers=True, gate="smoke", **SIZE
    )
    assert result.trace is not None
    errors = [layer.relative_l2 for layer in result.trace]
    assert errors == sorted(errors, reverse=True)
    kinds = by_kind(result.trace)
    assert [count for _, count in kinds] == [3] * 12
    assert sum(kind.noise for kind, _ in kinds) == pytest.approx(sum(layer.noise for layer in result.trace))
    planned = omni_convert.plan(qwen_image, method="int8", ignore=[kinds[0][0].layer], ignore_whole_group=True)
    kept = {f"transformer.{tensor.layer}" for tensor in planned.tensors() if not tensor.decision.format}
    assert {layer.layer for layer in result.trace if fnmatch(layer.layer, kinds[0][0].layer)} <= kept
    assert f"{kinds[0][0].layer} " in result.to_text()
    assert "and 2 kinds that lose less" in result.to_text()
    assert f"worst layer: {result.trace[0].layer}, " in result.to_text()
    json.dumps(result.to_dict(), allow_nan=False)


def test_outliers_among_activations_are_seen_where_weights_tell_nothing(qwen_image: Path, tmp_path: Path) -> None:
    plain, model = qwen_image, add_outliers(shutil.copytree(qwen_image, tmp_path / "model"))
    kinds = [f"transformer.transformer_blocks.*.{name}.net.2" for name in ("img_mlp", "txt_mlp")]
    weights, outputs = [], []
    for number, source in enumerate((plain, model)):
        done = omni_convert.convert(source, tmp_path / f"out{number}", method="int8", target="omni-convert")
        traced = {entry["layer"]: entry["sqnr_db"] for entry in trace(source, tmp_path / f"out{number}")}
        lost = {f"transformer.{layer}": sqnr for layer, sqnr in done.sqnr_db.items()}
        weights.append([mean_of(lost, kind) for kind in kinds])
        outputs.append([mean_of(traced, kind) for kind in kinds])
    assert weights[1] == pytest.approx(weights[0][:1] * 2, abs=0.3)  # one as good as the other, with outliers too
    assert outputs[0][0] == pytest.approx(outputs[0][1], abs=2)
    assert outputs[1][0] < outputs[1][1] - 10
    assert set(list(traced)[:3]) == {layer for layer in traced if fnmatch(layer, kinds[0])}


def mean_of(sqnr: dict[str, float], kind: str) -> float:
    return mean_db(value for layer, value in sqnr.items() if fnmatch(layer, kind))


def kept_by(line: str, model: Path) -> set[str]:
    """What an option alone keeps of what is quantized without it."""
    option, pattern = shlex.split(line)
    assert option == "--ignore"
    before, after = (
        {
            tensor.layer
            for tensor in omni_convert.plan(model, method="int8", ignore=ignore).tensors()
            if tensor.decision.format
        }
        for ignore in ([], [pattern])
    )
    return before - after


def test_a_line_keeps_a_kind_with_what_it_is_fused_with(qwen_image: Path, converted: Path) -> None:
    for candidate in ({"candidate": converted}, {"quantization": "int8"}):
        result = omni_convert.compare(qwen_image, **candidate, task="t2i", prompt="a", trace_layers=True, **SIZE)
        assert result.trace is not None
        lines = keeping_lines(result.trace, 99)
        kept = [kept_by(line, qwen_image) for line in lines]
        assert len(lines) == 12 - 2 * 2  # q, k, v in one line, and likewise those of the text
        assert sum(map(len, kept)) == len(set().union(*kept)) == len(result.trace)
        worst = result.trace[0].layer.removeprefix("transformer.")
        assert worst in kept[0] and keeping_lines(result.trace, 2) == lines[:2]


@pytest.mark.parametrize("component", ["", "part"])
def test_lines_for_names_within_names(component: str, tmp_path: Path) -> None:
    names = ["q", "blocks.0.q", "blocks.1.q", "x[1].0.k", "x[1].2.k", "x[1].k"]
    layers = [
        LayerTrace(
            layer=".".join(filter(None, (component, name))),
            unit=Unit(component, name),
            format="int8",
            signal=1,
            noise=1,
        )
        for name in names
    ]
    source = write_weights(tmp_path / "model.safetensors", {f"{name}.weight": random(64, 64) for name in names})
    lines = keeping_lines(layers, 99)
    kept = [kept_by(line.replace(f"{component}.", "") if component else line, source) for line in lines]
    assert sorted(map(sorted, kept)) == [["blocks.0.q", "blocks.1.q"], ["q"], ["x[1].0.k", "x[1].2.k"], ["x[1].k"]]


def test_another_model_is_named(converted: Path, tmp_path: Path) -> None:
    fewer = write_qwen_image(tmp_path / "fewer", layers=2)
    with pytest.raises(OmniConvertError, match=r"quantized layer transformer\.\S+, but the reference has no module"):
        trace(fewer, converted)


def test_a_layer_that_is_called_by_keyword() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(64, 32, dtype=torch.bfloat16)

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return self.linear(input=values)  # type: ignore[no-any-return]

    def ask(model: Any, _prompt: str, _counts: bool) -> Answer:
        return Answer(output=model(values).float().numpy(), kind=HIDDEN)

    values, model = torch.randn(4, 64, dtype=torch.bfloat16), Model()
    layers = quantized_layers(omni_convert.quantize_(copy.deepcopy(model), "int8"))
    units, request = {"linear": Unit("", "linear")}, Request(task="text", prompts=("a",))
    (found,) = trace_layers(lambda: model, layers, units, ask, request, torch.device("cpu"))
    with torch.inference_mode():
        error = (layers["linear"].linear(values) - model(values)).float()
    assert found.calls == 1
    assert found.noise == pytest.approx(float(error.square().sum()))


def test_a_language_model(language_model: Path) -> None:
    result = omni_convert.compare(
        language_model, quantization="fp8", target="omni-convert", task="text", prompt="a", trace_layers=True
    )
    assert result.trace is not None
    assert len({layer.layer for layer in result.trace}) == len(result.trace) == 14
    assert all(layer.calls == 1 and 0.01 < layer.relative_l2 < 0.1 for layer in result.trace)
