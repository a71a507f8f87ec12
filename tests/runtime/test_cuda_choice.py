"""Which CUDA kernel runs what, and why not another one. Devices are arguments: none is needed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kinds import KINDS

from omni_convert.formats import make_format
from omni_convert.formats.base import Format
from omni_convert.runtime import cuda, cuda_device, cuda_mx, kernels
from omni_convert.runtime.kernels import Device, choose

BLOCKS = make_format("fp8", granularity="block")
AMPERE, ADA, HOPPER, B200, B300, RTX50 = (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)
SHAPE = (256, 384)


@pytest.fixture(autouse=True)
def triton_is_there(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever is installed here."""
    choose.cache_clear()
    for module in (cuda, cuda_mx):
        monkeypatch.setattr(module, "missing_triton", lambda: None)
    yield
    choose.cache_clear()


def name_and_reasons(fmt: Format, shape: tuple[int, int], capability: tuple[int, int]) -> tuple[str, list[str]]:
    choice = choose(fmt, shape, Device("cuda", capability))
    return choice.kernel.name, [f"{name}: {reason}" for name, reason in choice.rejected.items()]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("int8", "triton triton triton triton decode triton"),
        ("fp8 tensor", "decode scaled_mm scaled_mm scaled_mm scaled_mm unscaled_mm"),
        ("fp8 static", "decode scaled_mm scaled_mm scaled_mm scaled_mm unscaled_mm"),
        ("fp8 channel", "decode scaled_mm scaled_mm scaled_mm scaled_mm unscaled_mm"),
        ("fp8 block", "decode decode decode decode decode decode"),
        ("fp8 128x128", "decode decode scaled_mm decode decode decode"),
        ("mxfp8", "decode decode decode mx_scaled_mm mx_scaled_mm mx_scaled_mm"),
        ("mxfp4", "decode decode decode mx_scaled_mm mx_scaled_mm mx_scaled_mm"),
        ("mxfp4_dualscale", "decode decode decode decode decode decode"),
    ],
)
def test_every_format_on_every_generation(kind: str, expected: str) -> None:
    fmt = BLOCKS if kind == "fp8 128x128" else KINDS[kind]
    found = [name_and_reasons(fmt, SHAPE, device)[0] for device in (AMPERE, ADA, HOPPER, B200, B300, RTX50)]
    assert " ".join(found) == expected


@pytest.mark.parametrize(
    ("fmt", "shape", "capability", "reasons"),
    [
        (KINDS["int8"], SHAPE, (7, 0), ["triton: compute capability 7.0: Triton needs 8.0",
                                        "cuda_int_mm: compute capability 7.0: its tensor cores have no int8"]),
        (KINDS["int8"], SHAPE, B300, ["triton: compute capability 10.3: its tensor cores are slow with int8",
                                      "cuda_int_mm: compute capability 10.3: its tensor cores are slow with int8"]),
        (KINDS["int8"], (64, 2**17), HOPPER, ["triton: K is 131072: the int32 accumulator is safe up to 131071",
                                              "cuda_int_mm: K is 131072: the int32 accumulator is safe up to 131071"]),
        (KINDS["fp8 tensor"], SHAPE, AMPERE, ["scaled_mm: compute capability 8.0: fp8 products need 8.9",
                                              "unscaled_mm: compute capability 8.0: fp8 products need 8.9"]),
        (KINDS["fp8 channel"], (24, 64), ADA, ["scaled_mm: N, K are 24, 64: cuBLASLt needs multiples of 16",
                                               "unscaled_mm: N, K are 24, 64: cuBLASLt needs multiples of 16"]),
        (KINDS["fp8 tensor"], SHAPE, RTX50, ["scaled_mm: compute capability 12.0: row scales are refused there"]),
        (KINDS["fp8 block"], SHAPE, HOPPER, ["scaled_mm: blocks of 16x32: cuBLASLt knows 128x128",
                                             "unscaled_mm: its scales are per block"]),
        (BLOCKS, SHAPE, B200, ["scaled_mm: compute capability 10.0: products of blocks need 9.x",
                               "unscaled_mm: its scales are per block"]),
        (BLOCKS, (192, 256), HOPPER, ["scaled_mm: N, K are 192, 256: blocks need multiples of 128",
                                      "unscaled_mm: its scales are per block"]),
        (KINDS["mxfp8"], SHAPE, HOPPER, ["mx_scaled_mm: compute capability 9.0: MX products need 10.x or 12.x"]),
        (KINDS["mxfp4"], (24, 64), B200, ["mx_scaled_mm: N is 24: cuBLASLt needs a multiple of 16"]),
    ],
)  # fmt: skip
def test_rejected_kernels_say_why(
    fmt: Format, shape: tuple[int, int], capability: tuple[int, int], reasons: list[str]
) -> None:
    assert name_and_reasons(fmt, shape, capability)[1] == reasons


def test_missing_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cuda, cuda_mx):
        monkeypatch.setattr(module, "missing_triton", lambda: "Triton is not installed")
    assert name_and_reasons(KINDS["int8"], SHAPE, HOPPER) == ("cuda_int_mm", ["triton: Triton is not installed"])
    assert name_and_reasons(KINDS["mxfp8"], SHAPE, B200) == ("decode", ["mx_scaled_mm: Triton is not installed"])
    assert name_and_reasons(KINDS["fp8 tensor"], SHAPE, HOPPER) == ("scaled_mm", [])


@pytest.mark.parametrize(
    ("missing", "expected"),
    [("module", "Triton is not installed"), ("compiler", "Triton needs a C compiler: gcc, clang or what CC names"),
     ("CC", None), ("nothing", None)],
)  # fmt: skip
def test_what_triton_needs(missing: str, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if missing == "module" else object())
    monkeypatch.setattr("shutil.which", lambda name: None if missing in ("compiler", "CC") else name)
    monkeypatch.delenv("CC", raising=False)
    if missing == "CC":
        monkeypatch.setenv("CC", "cc")
    assert cuda_device.missing_triton.__wrapped__() == expected


@pytest.mark.parametrize(
    ("built", "blocks", "mx"), [("12.8", "decode", "decode"), ("12.9", "scaled_mm", "decode"),
                                ("13.0", "scaled_mm", "mx_scaled_mm"), (None, "scaled_mm", "mx_scaled_mm")]
)  # fmt: skip
def test_cuda_that_pytorch_was_built_with(
    built: str | None, blocks: str, mx: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", built)
    assert name_and_reasons(BLOCKS, SHAPE, HOPPER)[0] == blocks
    assert name_and_reasons(KINDS["mxfp8"], SHAPE, RTX50)[0] == mx
    assert name_and_reasons(KINDS["mxfp8"], SHAPE, B200)[0] == "mx_scaled_mm"


@pytest.mark.parametrize("kind", ["fp8 tensor", "mxfp8"])
def test_pytorch_of_before_scaled_mm(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.functional, "scaled_mm")
    name, (reason, *_) = name_and_reasons(KINDS[kind], SHAPE, B200)
    assert name == {"fp8 tensor": "unscaled_mm", "mxfp8": "decode"}[kind]
    assert reason.endswith(f"PyTorch {torch.__version__} has no torch.nn.functional.scaled_mm")


def test_windows_has_no_row_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    name, (reason,) = name_and_reasons(KINDS["fp8 channel"], SHAPE, ADA)
    assert (name, reason) == ("unscaled_mm", "scaled_mm: this PyTorch has no row scales on Windows")


def test_rocm_is_not_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    device = kernels.device_of.__wrapped__(torch.device("cuda"))
    assert choose(KINDS["int8"], SHAPE, device).kernel.name == "decode"


def test_measured_or_not_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        choose(KINDS["fp8 channel"], SHAPE, Device("cuda", HOPPER))
    assert "runs on kernel 'scaled_mm' (not measured on a device yet)" in caplog.text
