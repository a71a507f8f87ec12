"""Folders in which the engine would not find what is quantized: one check says so, and where it looks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversions import Output, stored, weights
from hostile.small import Tensor, random, read_json, write_json, write_model, write_weights

from omni_convert.converter.contract import check_contract
from omni_convert.converter.convert import convert
from omni_convert.converter.verify import verify

Outputs = dict[tuple[str, str], Path]
CONFIG = "transformer/config.json"
LAYERS = [f"model.layers.{i}.mlp.{part}_proj" for i in range(2) for part in ("gate", "up", "down")]


def remove(name: str) -> Callable[[Output], object]:
    return lambda output: (output.folder / name).unlink()


def rename(name: str, other: str) -> Callable[[Output], object]:
    return lambda output: (output.folder / name).rename(output.folder / other)


def remove_tree(name: str) -> Callable[[Output], object]:
    return lambda output: shutil.rmtree(output.folder / name)


def quantize_beside(name: str, config: dict[str, Any] | None = None) -> Callable[[Output], None]:
    """A component of int8 weights; ``config``: its ``quantization_config``."""

    def change(output: Output) -> None:
        folder = output.folder / name
        folder.mkdir(exist_ok=True)
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        items = {}
        for layer in LAYERS:
            items[f"{layer}.weight"] = stored("I8", [[1] * 64] * 64)
            items[f"{layer}.weight_scale"] = stored("F32", [[0.5]] * 64)
        write_weights(folder / "model.safetensors", {key: as_tensor(item) for key, item in items.items()})
        data = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        write_json(folder / "config.json", data | ({"quantization_config": config} if config else {}))

    return change


def as_tensor(item: Any) -> Tensor:
    from conversions import array

    return Tensor(item.dtype, array(item))


INT8 = {"quant_method": "int8", "is_checkpoint_int8_serialized": True}
CASES: list[tuple[str, str, Callable[[Output], object], str]] = [
    ("Qwen-Image", "int8", remove(CONFIG), f"{CONFIG}: has no quantization_config at its top, where the engine looks"),
    ("Qwen-Image", "int8", remove("model_index.json"),
     "transformer/: holds quantized weights, but without model_index.json the engine reads config.json at the top"),
    ("Wan", "mxfp8", remove("model_index.json"), "transformer_2/: holds quantized weights, but without"),
    ("Wan", "mxfp8", remove("transformer_2/config.json"), "transformer_2/config.json: has no quantization_config"),
    ("Wan", "mxfp8", remove_tree("transformer_2"), "transformer_2/: is gone, but model_index.json lists it"),
    ("Qwen-Image", "int8", rename("transformer", "unet"), "transformer/: is gone, but model_index.json lists it"),
    ("Qwen-Image", "int8", remove_tree("transformer"), "transformer/: is gone, but model_index.json lists it"),
    ("BAGEL", "int8", remove("config.json"), "config.json: has no quantization_config at its top"),
    ("Qwen-Image", "int8", quantize_beside("text_encoder", INT8),
     "text_encoder/config.json: is of quantized weights, but the engine never reads it"),
    ("Qwen-Image", "int8", quantize_beside("vae"), "this pipeline loads vae without vLLM-Omni's quantization"),
    ("FLUX.2-klein", "int8", quantize_beside("text_encoder", INT8), "the engine never reads it: this pipeline loads"),
    ("FLUX.2-klein", "mxfp8", rename("model_index.json", "index.json"), "without model_index.json"),
    ("Z-Image", "mxfp8", quantize_beside("text_encoder", INT8),
     f"text_encoder/: holds quantized weights of int8, but the engine builds it with {CONFIG}, which has mxfp8"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "kind", "change", "said"), CASES, ids=[f"{c[0]}: {c[3]}" for c in CASES])
def test_what_the_engine_does_not_find(
    outputs: Outputs, tmp_path: Path, family: str, kind: str, change: Callable[[Output], object], said: str
) -> None:
    output = Output(outputs[family, kind], tmp_path)
    if (family, kind) == ("Z-Image", "mxfp8"):
        output.config(unlist)
    change(output)
    failed = output.failed()
    assert said in failed.get("config place", str(failed))
    assert failed.keys() == {"config place"}
    assert verify(output.folder).ok is False


def unlist(config: dict[str, Any]) -> None:
    config["ignored_layers"] = [name for name in config["ignored_layers"] if name not in LAYERS]


def test_an_encoder_may_have_the_method_of_the_transformer(outputs: Outputs, tmp_path: Path) -> None:
    output = Output(outputs["Z-Image", "int8"], tmp_path)
    output.config(unlist)
    for config in (INT8, None):
        quantize_beside("text_encoder", config)(output)
        assert output.failed() == {}
    items = weights(output.folder / "text_encoder")
    del items[f"{LAYERS[0]}.weight_scale"]
    write_weights(output.folder / "text_encoder/model.safetensors", {key: as_tensor(i) for key, i in items.items()})
    assert output.failed().keys() == {"scales"}


def test_an_encoder_without_a_quantized_transformer(sources: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(sources["Z-Image"], tmp_path / "out")
    output = Output(tmp_path / "out", tmp_path)
    quantize_beside("text_encoder", INT8)(output)
    assert output.failed().keys() == {"config place"}
    assert f"builds it with {CONFIG}, which has no method" in output.failed()["config place"]


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    ],
    ids=lambda config: config["quant_method"],
)
def test_an_encoder_in_a_format_of_transformers_is_let_be(
    outputs: Outputs, tmp_path: Path, config: dict[str, Any]
) -> None:
    output = Output(outputs["Qwen-Image", "int8"], tmp_path)
    quantize_beside("text_encoder", config)(output)
    assert output.failed() == {}
    config["is_checkpoint_fp8_serialized"] = True
    quantize_beside("text_encoder", config)(output)
    assert output.failed().keys() == ({"config place"} if config["quant_method"] == "fp8" else set())


def test_a_pipeline_that_the_tables_do_not_know(tmp_path: Path) -> None:
    source = tmp_path / "model"
    for name in ("unet", "text_encoder"):
        write_model(source / name, {"_class_name": "Some"}, {"a.weight": random(64, 64)})
    write_json(source / "model_index.json", {name: ["diffusers", "Some"] for name in ("unet", "text_encoder")})
    out = convert(source, tmp_path / "out", method="int8", components=["unet", "text_encoder"]).out
    assert all(check.ok for check in check_contract(out))
    for name in ("unet", "text_encoder"):
        config = read_json(out / name / "config.json")
        del config["quantization_config"]
        write_json(out / name / "config.json", config)
    failed = {check.name: check.problems for check in check_contract(out) if not check.ok}
    assert failed.keys() == {"vllm-omni config place"}
    assert "unet/: holds quantized weights, but the engine reads" in "".join(failed["vllm-omni config place"])


def test_nothing_quantized_anywhere(tmp_path: Path) -> None:
    write_model(tmp_path / "model", {}, {"a.weight": random(4, 4)})
    (check,) = check_contract(tmp_path / "model")
    assert check.name == "vllm-omni config place"
    assert "the engine looks there, and there is nothing quantized" in check.problems[0]


def test_experts_need_not_be_in_every_block(outputs: Outputs, tmp_path: Path) -> None:
    output = Output(outputs["Qwen3-Omni", "fp8 tensor"], tmp_path)
    parts = ("thinker.model.layers.0.mlp.experts.", "thinker.model.layers.0.mlp.gate.")
    output.tensors(lambda found: [found.pop(name) for name in [*found] if name.startswith(parts)])
    assert output.failed() == {}


def test_families_of_shards_that_the_loader_does_not_compare(outputs: Outputs, tmp_path: Path) -> None:
    """Without an index it looks at each name's own totals, and opens every file."""
    output = Output(outputs["Qwen-Image", "mxfp8"], tmp_path)
    output.tensors(lambda found: None)
    write_weights(output.main / "other-00001-of-00009.safetensors", {"x.weight": random(4)})
    assert output.failed() == {}
    write_weights(output.main / "other-00001-of-00008.safetensors", {"y.weight": random(4)})
    assert output.failed().keys() == {"weight files"}
