"""From Hub to Hub, what vLLM-Omni would not load as it is meant is refused: before the first byte, or the last."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hostile.small import Tensor, write_json, write_pipeline, write_weights
from hub_server import HubServer
from publishing import command, published

from omni_convert import OmniConvertError
from omni_convert.converter import file_writer
from omni_convert.formats.base import Facts
from omni_convert.hub.transfer import convert_to_hub

REPO = "me/model"
REFUSED = r"nothing was published, since vLLM-Omni would not load the result as it is meant\. vllm-omni "


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_pipeline(tmp_path / "model")
    (folder / "README.md").unlink()  # not text, which no repository of the Hub has
    return folder


def quantize_encoder(source: Path) -> None:
    """Codes of int8 beside the transformer, where the engine never looks for them."""
    folder = source / "text_encoder"
    for path in folder.glob("model*"):
        path.unlink()
    layer = "model.layers.0.mlp.up_proj"
    codes, scales = Tensor("I8", np.ones((64, 64), "i1")), Tensor("F32", np.full((64, 1), 0.5, "<f4"))
    write_weights(folder / "model.safetensors", {f"{layer}.weight": codes, f"{layer}.weight_scale": scales})
    config = json.loads((folder / "config.json").read_text())
    quantized = {"quant_method": "int8", "is_checkpoint_int8_serialized": True}
    write_json(folder / "config.json", config | {"quantization_config": quantized})


@pytest.mark.parametrize("from_hub", [False, True])
def test_what_headers_tell_is_refused_first(hub: HubServer, source: Path, tmp_path: Path, from_hub: bool) -> None:
    quantize_encoder(source)
    hub.store.add_folder("org/base", source)
    status, _, err = command(hub, tmp_path, "--method", "int8", "org/base" if from_hub else source, f"hub:{REPO}")
    assert status == 1
    assert "config place: text_encoder/config.json: is of quantized weights, but the engine never reads it" in err
    assert REPO not in hub.store.repos
    assert not (tmp_path / "omni-convert").exists()
    command(hub, tmp_path, "--method", "int8", source, f"hub:{REPO}", "--target", "omni-convert")
    assert "text_encoder/model.safetensors" in published(hub, REPO)


def test_scales_are_compared_when_their_shards_are_gone(
    here: HubServer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that the engine fuses get scales of their own, by a fault of the writer; all hashes are right."""
    numbers = count(1)
    with monkeypatch.context() as patch:
        patch.setattr(
            file_writer,
            "Facts",
            lambda amax, input_scale: Facts(amax=amax and amax * next(numbers), input_scale=input_scale),
        )
        with pytest.raises(OmniConvertError, match=REFUSED + r"fused scales: transformer_blocks.*expected one"):
            convert_to_hub(source, REPO, method="int8", work=tmp_path / "work")
    assert set(published(here, REPO)) == {".gitattributes"}
    assert not list((tmp_path / "work").rglob("out/**/*.safetensors"))
    with pytest.raises(OmniConvertError, match=REFUSED):  # what is uploaded is known to the next run
        convert_to_hub(source, REPO, method="int8", work=tmp_path / "work")
    convert_to_hub(source, REPO, method="int8", work=tmp_path / "work", overwrite=True)
    assert "transformer/config.json" in published(here, REPO)
