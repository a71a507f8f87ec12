"""What ``load`` says of NPUs: not there, not ready, or without operators for the format. torch-npu is a stand-in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import omni_convert
from omni_convert import OmniConvertError
from omni_convert.formats import FORMATS
from omni_convert.runtime import kernels, npu_device

READY = """
class npu:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 2)
    get_soc_version = staticmethod(lambda: 220)
"""


@pytest.fixture
def torch_npu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The source of a package ``torch_npu``, to be filled."""
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "torch_npu.py"


@pytest.mark.parametrize("device", ["npu", "npu:1"])
def test_without_torch_npu(qwen: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(OmniConvertError, match=rf"'{device}' was asked for.*pip install 'omni-convert\[npu\]'.*CANN"):
        omni_convert.load(qwen, device=device)


def test_without_cann(qwen: Path, torch_npu: Path) -> None:
    torch_npu.write_text("raise ImportError('libhccl.so: cannot open shared object file')")
    with pytest.raises(OmniConvertError, match=r"libhccl.so: cannot open.*set_env.sh"):
        omni_convert.load(qwen, device="npu")


@pytest.mark.parametrize(
    ("source", "device", "message"),
    [
        (READY.replace("True", "False"), "npu", "torch-npu sees 0 NPUs.*npu-smi"),
        (READY, "npu:2", "torch-npu sees 2 NPUs"),
        (READY, "npu:one", "'npu:one' is not known"),
    ],
)
def test_without_the_npu(qwen: Path, torch_npu: Path, source: str, device: str, message: str) -> None:
    torch_npu.write_text(source)
    with pytest.raises(OmniConvertError, match=message):
        omni_convert.load(qwen, device=device)


def test_generation_is_that_of_torch_npu(torch_npu: Path) -> None:
    torch_npu.write_text(READY)
    assert npu_device.soc_version() == 220
    assert kernels.device_of(torch.device("cpu")).soc is None


LOAD = """
import sys, torch
torch.utils.rename_privateuse1_backend("npu")
sys.modules["transformers"] = sys.modules["diffusers"] = None
import omni_convert
for folder in sys.argv[1:]:
    try:
        omni_convert.load(folder, device="npu:1")
    except omni_convert.OmniConvertError as error:
        print(error)
"""


def test_formats_are_refused_before_a_model_is_built(
    qwen: Path, bert_plain: Path, quantize: Callable[..., Path], tmp_path: Path, torch_npu: Path
) -> None:
    """On an Atlas A2. Without either library the next thing to fail is the model."""
    torch_npu.write_text(READY)
    mxfp8 = quantize(bert_plain, tmp_path / "bert-mxfp8", fmt=FORMATS["mxfp8"])
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{LOAD}"
    result = subprocess.run(
        [sys.executable, "-c", code, str(mxfp8), str(qwen)], capture_output=True, text=True, check=True
    )
    refused, accepted = result.stdout.splitlines()
    assert "found an mxfp8 layer on an Ascend 910B (Atlas A2), expected an Ascend 950" in refused
    assert "--method int8" in refused
    assert "package diffusers is not installed" in accepted
