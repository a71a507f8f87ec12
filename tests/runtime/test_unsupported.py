"""Formats that are converted and verified but have no modules yet: every way of loading says so, by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import omni_convert
from omni_convert import OmniConvertError
from omni_convert.converter.convert import convert
from omni_convert.formats import FORMATS
from omni_convert.runtime.replace import MODULES

UNSUPPORTED = [name for name in FORMATS if name not in MODULES]


@pytest.fixture(scope="module", params=UNSUPPORTED)
def folder(request: pytest.FixtureRequest, qwen_plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unsupported") / request.param
    convert(qwen_plain, out, method=request.param)
    return out


def test_all_but_int8_are_unsupported() -> None:
    assert UNSUPPORTED == ["fp8", "mxfp8", "mxfp4", "mxfp4_dualscale"]


def test_load_names_the_format(folder: Path) -> None:
    with pytest.raises(OmniConvertError) as caught:
        omni_convert.load(folder)
    for part in (str(folder), f"holds {folder.name} weights", "expected int8", "engine"):
        assert part in str(caught.value)


def test_from_pretrained_names_the_format(folder: Path) -> None:
    from diffusers import QwenImageTransformer2DModel

    with pytest.raises(ValueError, match=rf"got {folder.name} .*'int8'"):  # by Diffusers
        QwenImageTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)


@pytest.mark.parametrize("method", UNSUPPORTED)
def test_transformers_does_not_take_codes_for_weights(tmp_path: Path, method: str) -> None:
    from transformers import AutoModel, BertConfig, BertModel

    config = BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
        architectures=["BertModel"],
    )  # fmt: skip
    BertModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "out", method=method)
    with pytest.raises((OmniConvertError, ValueError), match=method):
        AutoModel.from_pretrained(tmp_path / "out")


def test_damaged_weights_are_named_first(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / folder.name))
    path = next(copy.glob("*.safetensors"))
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(".weight_scale"))
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    with pytest.raises(OmniConvertError, match="weight_scale"):
        omni_convert.load(copy)
