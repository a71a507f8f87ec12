"""Every kind of format, from the converter to a running model, by every route of both libraries."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from kinds import CHOICES, KINDS
from loaded import assert_holds, assert_layers_run, assert_saves_same, layers_of, quantized_names, stored
from safetensors.torch import save_file

import omni_convert
from omni_convert import OmniConvertError

BF16 = torch.bfloat16


def converted(source: Path, out: Path, kind: str, **choices: Any) -> Path:
    if kind == "fp8 static":
        folders = [source, *(path for path in source.iterdir() if path.is_dir())]
        matrices = [name for folder in folders for name, value in stored(folder).items() if value.ndim == 2]
        choices["input_scales"] = {name.removesuffix(".weight"): 0.25 for name in matrices if name.endswith(".weight")}
    omni_convert.convert(source, out, target="omni-convert", **CHOICES[kind], **choices)
    return out


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture(scope="module")
def qwen_kind(kind: str, qwen_plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(qwen_plain, tmp_path_factory.mktemp("qwen") / "transformer", kind)


@pytest.fixture(scope="module")
def bert_kind(kind: str, bert_plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(bert_plain, tmp_path_factory.mktemp("bert") / "model", kind)


def from_diffusers(path: Path) -> Any:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel.from_pretrained(path, torch_dtype=BF16)


def from_transformers(path: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(path, dtype=BF16)


def check_model(model: Any, folder: Path, kind: str) -> None:
    assert_holds(model, folder)
    assert len(layers_of(model)) == len(quantized_names(folder)) > 3
    assert_layers_run(model, {KINDS[kind]})
    assert (model.dtype, model.training) == (BF16, False)


@pytest.mark.parametrize("load", [omni_convert.load, from_diffusers])
def test_diffusers_model(kind: str, qwen_kind: Path, qwen_inputs: dict[str, Any], load: Callable[[Path], Any]) -> None:
    model = load(qwen_kind)
    check_model(model, qwen_kind, kind)
    with torch.inference_mode():
        assert model(**qwen_inputs)[0].isfinite().all()


@pytest.mark.parametrize("load", [omni_convert.load, from_transformers])
def test_transformers_model(
    kind: str, bert_kind: Path, bert_inputs: dict[str, Any], load: Callable[[Path], Any]
) -> None:
    model = load(bert_kind)
    check_model(model, bert_kind, kind)
    with torch.inference_mode():
        assert model(**bert_inputs).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["qwen_kind", "bert_kind"])
def test_saving_gives_the_same_checkpoint(
    name: str, kind: str, shards: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source: Path = request.getfixturevalue(name)
    size = "40KB" if shards > 1 else "1GB"
    assert_saves_same(omni_convert.load(source), source, tmp_path / "saved", max_shard_size=size)
    assert (len(list((tmp_path / "saved").glob("*.safetensors"))) > 1) == (shards > 1)
    again = omni_convert.load(tmp_path / "saved")
    assert_holds(again, source)
    assert_saves_same(again, source, tmp_path / "again", max_shard_size=size)


@pytest.mark.parametrize("name", ["qwen_plain", "bert_plain"])
def test_saving_keeps_names_as_engines_spell_them(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A plain name would match parts of others there."""
    source = converted(request.getfixturevalue(name), tmp_path / "out", "fp8 channel")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["ignore"] += ["[p]roj_out", "img_in"]
    (source / "config.json").write_text(json.dumps(config))
    omni_convert.load(source).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["quantization_config"] == config["quantization_config"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_another_dtype_touches_only_what_is_not_quantized(
    qwen_kind: Path, qwen_inputs: dict[str, Any], dtype: torch.dtype
) -> None:
    model = omni_convert.load(qwen_kind, dtype=dtype)
    assert_holds(model, qwen_kind)
    assert model.dtype == model.transformer_blocks[0].attn.to_q.bias.dtype == dtype
    inputs = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in qwen_inputs.items()}
    with torch.inference_mode():
        assert model(**inputs)[0].dtype == dtype


@pytest.mark.parametrize("name", ["qwen_kind", "bert_kind"])
def test_missing_tensors_are_named(name: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source: Path = request.getfixturevalue(name)
    layer = min(quantized_names(source))
    for suffix in KINDS[kind].suffixes:
        folder, tensors = tmp_path / suffix, stored(source)
        del tensors[f"{layer}.{suffix}"]
        folder.mkdir()
        shutil.copy(source / "config.json", folder)
        stem = "diffusion_pytorch_model" if name == "qwen_kind" else "model"
        save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})
        with pytest.raises(OmniConvertError, match=rf"{layer}\.{suffix}"):
            omni_convert.load(folder)


@pytest.mark.parametrize("method", ["fp8 channel", "mxfp4"])
def test_pipeline(method: str, qwen_image: Path, tmp_path: Path) -> None:
    """Names of which Diffusers has one itself, and Transformers the other."""
    from diffusers import DiffusionPipeline

    components = ["transformer", "text_encoder"]
    folder = converted(qwen_image, tmp_path / "out", method, components=components)
    draw = {"prompt": "a cup of coffee", "height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
    images = []
    for pipe in (omni_convert.load(folder), DiffusionPipeline.from_pretrained(folder, torch_dtype=BF16)):
        assert {getattr(pipe, name).dtype for name in components} == {BF16}
        for name in components:
            assert len(layers_of(getattr(pipe, name))) == len(quantized_names(folder / name)) > 0
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe(**draw, generator=torch.Generator().manual_seed(0)).images)
    assert images[0].isfinite().all()
    assert torch.equal(images[0], images[1])


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if "transformer" in family.components])
def test_models_of_every_diffusion_family(name: str, tmp_path: Path) -> None:
    """None begins with a parameter that Diffusers would take for the dtype of the activations."""
    (tmp_path / "source").mkdir()
    source = FAMILIES[name].write(tmp_path / "source")
    folder = converted(source, tmp_path / "out", "mxfp8", components=["transformer"]) / "transformer"
    model = omni_convert.load(folder)
    check_model(model, folder, "mxfp8")
