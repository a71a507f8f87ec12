"""``load`` and ``from_pretrained``: every route to a model gives the same model, and nothing wrong gets through."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loaded import assert_holds, stored
from torch import nn

import omni_convert
from omni_convert import OmniConvertError
from omni_convert.runtime.linear import QuantizedLinear

BF16 = torch.bfloat16


def test_every_route_to_a_diffusers_model(qwen: Path, qwen_inputs: dict[str, Any]) -> None:
    from diffusers import AutoModel, QwenImageTransformer2DModel

    models = [
        omni_convert.load(qwen),
        omni_convert.load(str(qwen), device=torch.device("cpu"), dtype=BF16),
        QwenImageTransformer2DModel.from_pretrained(qwen, torch_dtype=BF16),
        AutoModel.from_pretrained(str(qwen), torch_dtype=BF16),
        QwenImageTransformer2DModel.from_pretrained(qwen.parent, subfolder=qwen.name, torch_dtype=BF16),
        QwenImageTransformer2DModel.from_pretrained(qwen, torch_dtype=BF16, device_map={"": "cpu"}),
    ]
    with torch.inference_mode():
        outputs = [model(**qwen_inputs)[0] for model in models]
    for model, output in zip(models, outputs, strict=True):
        assert_holds(model, qwen)
        assert (model.dtype, model.training) == (BF16, False)
        assert torch.equal(output, outputs[0])


def test_output_is_close_to_the_source(qwen: Path, qwen_plain: Path, qwen_inputs: dict[str, Any]) -> None:
    from diffusers import QwenImageTransformer2DModel

    plain = QwenImageTransformer2DModel.from_pretrained(qwen_plain, torch_dtype=BF16)
    with torch.inference_mode():
        expected = plain(**qwen_inputs)[0].float()
        found = omni_convert.load(qwen)(**qwen_inputs)[0].float()
    assert 0 < (found - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_another_dtype_touches_only_what_is_not_quantized(
    qwen: Path, bert: Path, qwen_inputs: dict[str, Any], dtype: torch.dtype
) -> None:
    model = omni_convert.load(qwen, dtype=dtype)
    assert_holds(model, qwen)
    assert model.dtype == model.transformer_blocks[0].attn.to_q.bias.dtype == dtype
    inputs = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in qwen_inputs.items()}
    with torch.inference_mode():
        assert model(**inputs)[0].dtype == dtype
    assert_holds(omni_convert.load(bert, dtype=dtype), bert)


def test_models_own_float32_modules_stay_float32(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import QwenImageTransformer2DModel

    keep = ["norm_out"]
    monkeypatch.setattr(QwenImageTransformer2DModel, "_keep_in_fp32_modules", keep)
    model = omni_convert.load(qwen)
    assert model.norm_out.linear.weight.dtype == torch.float32
    assert model.img_in.weight.dtype == BF16
    assert_holds(model, qwen)
    assert keep == ["norm_out"]


def test_z_image(zimage: Path) -> None:
    model = omni_convert.load(zimage)
    assert_holds(model, zimage)
    with torch.inference_mode():
        out = model([torch.randn(16, 1, 8, 8).to(BF16)], torch.tensor([0.5], dtype=BF16), [torch.randn(7, 48).to(BF16)])
    assert out[0][0].isfinite().all()


def test_every_route_to_a_transformers_model(bert: Path, bert_plain: Path, bert_inputs: dict[str, Any]) -> None:
    from transformers import AutoModel, BertModel

    models = [
        omni_convert.load(bert),
        AutoModel.from_pretrained(bert, dtype=BF16),
        AutoModel.from_pretrained(bert, dtype="auto"),
        BertModel.from_pretrained(bert, dtype=BF16, device_map="cpu"),
    ]
    with torch.inference_mode():
        outputs = [model(**bert_inputs).last_hidden_state for model in models]
        expected = BertModel.from_pretrained(bert_plain, dtype=BF16)(**bert_inputs).last_hidden_state.float()
    for model, output in zip(models, outputs, strict=True):
        assert_holds(model, bert)
        assert (model.dtype, model.training) == (BF16, False)
        assert torch.equal(output, outputs[0])
    assert 0 < (outputs[0].float() - expected).norm() / expected.norm() < 0.02


def test_transformers_prefix_is_added_and_removed(masked_bert: Path, bert: Path) -> None:
    from transformers import AutoModel, BertForMaskedLM

    model = omni_convert.load(masked_bert)
    assert isinstance(model, BertForMaskedLM)
    assert isinstance(model.cls.predictions.transform.dense, QuantizedLinear)
    assert_holds(model, masked_bert)
    assert_holds(AutoModel.from_pretrained(masked_bert, dtype=BF16), masked_bert, prefix="bert.")
    other = BertForMaskedLM.from_pretrained(bert, dtype=BF16)
    assert isinstance(other.bert.encoder.layer[1].output.dense, QuantizedLinear)


@pytest.mark.parametrize("name", ["qwen", "bert", "masked_bert"])
def test_saving_gives_the_same_checkpoint(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source: Path = request.getfixturevalue(name)
    omni_convert.load(source).save_pretrained(tmp_path, max_shard_size="100KB")
    before, after = stored(source), stored(tmp_path)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype, key
        assert torch.equal(value, after[key]), key
    configs = [json.loads((path / "config.json").read_text())["quantization_config"] for path in (source, tmp_path)]
    assert configs[0] == configs[1]
    assert_holds(omni_convert.load(tmp_path), source)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory, qwen_image: Path, quantize: Callable[..., Path]) -> Path:
    """A QwenImagePipeline with transformer and text encoder quantized."""
    folder = tmp_path_factory.mktemp("pipeline") / "out"
    skip = shutil.ignore_patterns("transformer", "text_encoder")
    shutil.copytree(qwen_image, folder, ignore=skip)
    quantize(qwen_image / "transformer", folder / "transformer")
    quantize(qwen_image / "text_encoder", folder / "text_encoder", keep="embed|norm|lm_head|conv")
    return folder


def draw(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image: torch.Tensor = pipe(
        prompt="a cup of coffee", height=32, width=32, num_inference_steps=2, output_type="pt", generator=generator
    ).images
    return image


def test_pipeline(pipeline: Path, qwen_image: Path) -> None:
    from diffusers import DiffusionPipeline

    pipe = omni_convert.load(pipeline)
    assert {pipe.transformer.dtype, pipe.text_encoder.dtype, pipe.vae.dtype} == {BF16}
    assert_holds(pipe.transformer, pipeline / "transformer")
    # Transformers renames the layers of this text encoder when it loads them.
    quantized = [name for name in stored(pipeline / "text_encoder") if name.endswith(".weight_scale")]
    assert sum(isinstance(module, QuantizedLinear) for module in pipe.text_encoder.modules()) == len(quantized) > 0
    image = draw(pipe)
    assert torch.equal(image, draw(DiffusionPipeline.from_pretrained(pipeline, torch_dtype=BF16)))
    plain = draw(DiffusionPipeline.from_pretrained(qwen_image, torch_dtype=BF16))
    assert (image.float() - plain.float()).abs().mean() < 0.05


def test_pipeline_errors_come_before_loading(pipeline: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pipeline, tmp_path / "out"))
    next((folder / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(OmniConvertError, match="is missing"):
        omni_convert.load(folder)
    shutil.rmtree(folder / "transformer")
    with pytest.raises(OmniConvertError, match="names component 'transformer'"):
        omni_convert.load(folder)


def test_what_is_not_a_quantized_checkpoint_is_refused(qwen_plain: Path, qwen_image: Path, tmp_path: Path) -> None:
    cases = {
        qwen_plain: "found no quantization_config",
        qwen_image: "found no quantization_config",
        min(qwen_plain.glob("*.safetensors")): "is a file, expected a folder",
        tmp_path / "absent": "does not exist",
        tmp_path: "found neither model_index.json nor config.json",
    }
    for path, message in cases.items():
        with pytest.raises(OmniConvertError, match=message):
            omni_convert.load(path)


@pytest.mark.parametrize("name", ["qwen", "bert"])
def test_codes_without_a_config_are_refused(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The library itself takes them for weights, and only warns."""
    folder = Path(shutil.copytree(request.getfixturevalue(name), tmp_path / name))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(OmniConvertError, match=r"no quantization_config, expected one because tensor .* is I8"):
        omni_convert.load(folder)


def test_a_component_without_a_config_is_refused(pipeline: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pipeline, tmp_path / "out"))
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "quantization_config"}))
    with pytest.raises(OmniConvertError, match=r"text_encoder.*: found no quantization_config"):
        omni_convert.load(folder)


def test_a_plain_model_refuses_a_quantized_state(qwen: Path, qwen_plain: Path) -> None:
    """PyTorch does, because of the scales; without ``strict`` nobody would. The reverse is ours."""
    from diffusers import QwenImageTransformer2DModel

    plain = QwenImageTransformer2DModel.from_pretrained(qwen_plain, torch_dtype=BF16)
    quantized = omni_convert.load(qwen)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_scale"):
        plain.load_state_dict(quantized.state_dict())
    with pytest.raises(RuntimeError, match="quantize the checkpoint first"):
        quantized.load_state_dict(stored(qwen_plain), strict=False)


def test_unfinished_conversion_is_refused(qwen: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen, tmp_path / "transformer"))
    (tmp_path / ".omni_convert.partial").touch()
    with pytest.raises(OmniConvertError, match="has not finished"):
        omni_convert.load(folder)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("toaster", "'toaster' is not known"),
        ("cuda:99", "CUDA devices"),
        ("xpu:0", "'xpu:0' was asked for, but PyTorch .* cannot use it here"),
        ("mps", "'mps' was asked for, but PyTorch .* cannot use it here"),
    ],
)
def test_devices_that_cannot_run_it(qwen: Path, device: str, message: str) -> None:
    with pytest.raises(OmniConvertError, match=message):
        omni_convert.load(qwen, device=device)


@pytest.mark.parametrize("package", ["diffusers", "accelerate"])
def test_missing_package_is_named(qwen: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OmniConvertError, match=rf"{package} is not installed.*omni-convert\[diffusers\]"):
        omni_convert.load(qwen)


def test_unknown_class_is_named(qwen: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen, tmp_path / "transformer"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "FutureTransformer"}))
    with pytest.raises(OmniConvertError, match="_class_name is 'FutureTransformer'"):
        omni_convert.load(folder)


def test_from_pretrained_validates_too(qwen: Path, bert: Path, tmp_path: Path) -> None:
    from diffusers import QwenImageTransformer2DModel
    from transformers import BertModel

    for source, model_class, layer in (
        (qwen, QwenImageTransformer2DModel, "transformer_blocks.0.attn.to_q"),
        (bert, BertModel, "encoder.layer.0.output.dense"),
    ):
        folder = Path(shutil.copytree(source, tmp_path / source.name))
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["ignored_layers"].append(layer)
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(OmniConvertError, match=f"layer {layer} is in ignored_layers"):
            model_class.from_pretrained(folder)


def test_plain_weights_with_our_config_are_refused(qwen_plain: Path, bert_plain: Path) -> None:
    from diffusers import QwenImageTransformer2DModel
    from transformers import BertModel

    from omni_convert.formats.int8 import Int8
    from omni_convert.runtime import diffusers_plugin, transformers_plugin

    config = Int8().config([])
    with pytest.raises(OmniConvertError, match="plain weights"):
        QwenImageTransformer2DModel.from_pretrained(
            qwen_plain, quantization_config=diffusers_plugin.OmniConvertConfig(**config)
        )
    with pytest.raises(OmniConvertError, match="plain weights"):
        BertModel.from_pretrained(bert_plain, quantization_config=transformers_plugin.OmniConvertConfig(**config))
    assert "is_checkpoint_int8_serialized" in repr(diffusers_plugin.OmniConvertConfig(**config))


def test_disk_offload_is_refused_by_the_diffusers_plugin(qwen: Path, tmp_path: Path) -> None:
    from diffusers import QwenImageTransformer2DModel

    with pytest.raises(OmniConvertError, match="on disk"):
        QwenImageTransformer2DModel.from_pretrained(
            qwen, device_map={"transformer_blocks": "disk", "": "cpu"}, offload_folder=tmp_path
        )


def test_weights_that_are_not_safetensors_are_refused(bert: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig.from_pretrained(bert)
    with pytest.raises(OmniConvertError, match="the weights come from a state dict"):
        BertModel.from_pretrained(None, config=config, state_dict=stored(bert))


def test_a_tied_weight_is_caught_after_loading(qwen: Path) -> None:
    from omni_convert.runtime.replace import check_loaded

    model = omni_convert.load(qwen)
    name = "transformer_blocks.0.attn.to_q"
    check_loaded(model, [name])
    model.get_submodule(name).weight = nn.Parameter(torch.zeros(64, 64))
    with pytest.raises(OmniConvertError, match=f"{name}.weight is torch.float32 after loading"):
        check_loaded(model, [name])
