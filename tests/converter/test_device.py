"""Quantizing on a device: CPU tensors stand in for one, through all but its streams and pinned memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from choices import CHOICES, every
from click.testing import CliRunner
from hostile.small import QWEN_CONFIG, qwen_shards, random, snapshot, write_model, write_sharded

from omni_convert import OmniConvertError, UsageError, convert, plan
from omni_convert.cli import main
from omni_convert.converter import device, execute
from omni_convert.converter.convert import Means, device_need, refusal
from omni_convert.converter.jobs import Worker, run_jobs
from omni_convert.formats import make_format
from omni_convert.formats.base import Facts, Format
from omni_convert.formats.engine import Rows

WEIGHTS = {
    "a.weight": random(33, 192), "b.weight": random(5, 64, dtype="F16"), "c.weight": random(7, 576, dtype="F32"),
    "c.bias": random(7), "d.weight": random(130, 40), "e.weight": random(1, 1088, dtype="F32", seed=1),
}  # fmt: skip
CPU = torch.device("cpu")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--device cuda`` means CPU tensors, in small pieces."""
    monkeypatch.setattr(device, "open_device", lambda name: CPU)
    monkeypatch.setattr(device, "check_bytes", lambda opened, fmt: None)  # it takes a second
    monkeypatch.setattr(device, "free_bytes", lambda opened: 1 << 40)
    monkeypatch.setattr("omni_convert.converter.convert.DEVICE_PIECE_BYTES", 1024)


def check_same_output(source: Path, folder: Path, **choices: Any) -> None:
    """Every file, weights and manifest alike."""
    convert(source, folder / "cpu", **choices)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(Rows, "quantize_rows")  # so that nothing but the reference can answer
        convert(source, folder / "device", **choices, device="cuda", threads=3)
    assert snapshot(folder / "device") == snapshot(folder / "cpu")


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(("method", "options"), CHOICES, ids=str)
def test_a_device_writes_the_same_bytes(tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    source = write_model(tmp_path / "model", {}, WEIGHTS)
    options = {"target": "omni-convert", **options}
    if options.get("activation_scheme") == "static":
        options["input_scales"] = dict.fromkeys("abcde", 0.5)
    check_same_output(source, tmp_path, method=method, **options)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("choices", [{"method": "int8"}, {"method": "int8", "quality": "balanced"}, {"method": "fp8"}])
def test_scales_that_layers_share(tmp_path: Path, choices: dict[str, Any]) -> None:
    source = write_sharded(tmp_path / "model", qwen_shards(width=64), QWEN_CONFIG)
    check_same_output(source, tmp_path, **choices)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("method", ["int8", "fp8", "mxfp4"])
def test_nan_is_named_as_on_the_cpu(tmp_path: Path, method: str) -> None:
    bad = random(50, 64)
    bad.bits[31, 7] = bad.bits[40, 0] = 0x7FC0
    source = write_model(tmp_path / "model", {}, {"a.weight": bad})
    said = []
    for name in ("cpu", "cuda"):
        with pytest.raises(OmniConvertError, match="row 31, column 7") as caught:
            convert(source, tmp_path / "out", method=method, target="omni-convert", device=name, threads=1)
        said.append(str(caught.value))
    assert said[0] == said[1]


@every
def test_the_trial_before_a_run_passes_on_the_cpu(fmt: Format) -> None:
    device.check_bytes(CPU, fmt)


@pytest.mark.parametrize("method", ["int8", "fp8", "mxfp4_dualscale"])
def test_the_trial_finds_division_by_a_reciprocal(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "__truediv__", lambda self, other: self * other.reciprocal())
    options = {"granularity": "channel"} if method == "fp8" else {}
    with pytest.raises(OmniConvertError, match=r"--device cpu: computes otherwise than the CPU: .* bytes of weight"):
        device.check_bytes(CPU, make_format(method, **options))


def test_what_fails_on_a_device_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(device, "reference_rows", no_memory)
    with pytest.raises(OmniConvertError, match=r"cannot quantize 510 x 128 .* Tried to allocate 2 GiB\.\).*--threads"):
        device.check_bytes(CPU, make_format("int8"))


def test_a_worker_that_cannot_be_made_stops_the_run() -> None:
    def fail() -> Worker:
        raise RuntimeError("no stream left")

    with pytest.raises(RuntimeError, match="no stream left"):
        run_jobs(iter([]), 2, print, fail)


@pytest.mark.usefixtures("stand_in")
def test_threads_are_as_many_as_the_memory_of_the_device_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(write_model(tmp_path / "model", {}, WEIGHTS), method="int8")
    settings = Means(device="cuda", threads=8).settings(planned)
    need = execute.device_bytes(planned, settings)
    assert need == 8 * execute.device_bytes(planned, replace(settings, threads=1)) > 0
    for free, threads in ((need, 8), (need - 1, 7), (need // 8, 1)):
        monkeypatch.setattr(device, "free_bytes", lambda opened, free=free: free)
        assert execute.on_device(planned, settings).threads == threads
    monkeypatch.setattr(device, "free_bytes", lambda opened: need // 8 - 1)
    with pytest.raises(OmniConvertError, match=f"one thread takes {need // 8}"):
        execute.on_device(planned, settings)


def test_a_search_needs_more_of_the_device(tmp_path: Path) -> None:
    source, means = write_model(tmp_path / "model", {}, WEIGHTS), Means(device="npu:1", threads=2)
    fast, balanced = (device_need(plan(source, method="int8", quality=q), means) for q in ("fast", "balanced"))
    assert 0 == device_need(plan(source, method="int8"), Means()) < fast < balanced


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "CUDA", "cuda:1:2", "cpu:0", "", "npu\n"])
def test_names_that_are_no_devices(name: str) -> None:
    with pytest.raises(UsageError, match="expected cpu, cuda, cuda:N, npu or npu:N"):
        Means(device=name)


def test_a_device_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_cuda_module", lambda name: torch.cpu)  # of which there is one
    with pytest.raises(OmniConvertError, match="--device cuda:1: found 1 devices, numbered from 0"):
        device.open_device("cuda:1")


@no_gpu
@pytest.mark.parametrize(("name", "said"), [("cuda", "PyTorch .*(built|finds)"), ("npu:1", "omni-convert\\[npu\\]")])
def test_without_a_device_nothing_is_written(tmp_path: Path, name: str, said: str) -> None:
    source = write_model(tmp_path / "model")
    with pytest.raises(OmniConvertError, match=f"--device {name}: .*{said}.*Leave out --device"):
        convert(source, tmp_path / "out", method="int8", device=name)
    assert not (tmp_path / "out").exists()
    assert "--device" in str(refusal(plan(source, method="int8"), tmp_path / "out", Means(device=name)))


@no_gpu
def test_the_plan_tells_what_the_device_needs(tmp_path: Path) -> None:
    arguments = ["--method", "int8", "--dry-run", "--device", "cuda", str(write_model(tmp_path / "model")), "out"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0
    assert "device memory" in result.stdout
    assert "would be refused now. --device cuda" in result.stderr
    assert json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)["device_memory"] > 0
    assert CliRunner().invoke(main, ["--device", "gpu", *arguments[:2], *arguments[-2:]]).exit_code == 2


NO_NPU = """
import sys, types
module = types.ModuleType("torch_npu")
module.npu = types.SimpleNamespace(is_available=lambda: False)
sys.modules["torch_npu"] = module
from omni_convert.converter.device import open_device
try:
    open_device("npu")
except Exception as error:
    print(error)
"""


def test_torch_npu_without_an_npu() -> None:
    result = subprocess.run([sys.executable, "-c", NO_NPU], capture_output=True, text=True, check=True)
    assert "--device npu: torch_npu finds no NPU" in result.stdout


def test_rows_that_torch_may_not_write_to() -> None:
    bits = np.full((4, 64), 0x3F80, np.uint16)
    bits.flags.writeable = False
    fmt = make_format("int8")
    out = {"weight": np.zeros((4, 64), np.int8), "weight_scale": np.zeros((4, 1), np.float32)}
    power = np.zeros((4, 2))
    device.DeviceWorker(CPU).quantize_rows(fmt, bits, "BF16", out, power, Facts())
    assert (out["weight"] == 127).all()
    assert power.tolist() == [[64.0, 0.0]] * 4
