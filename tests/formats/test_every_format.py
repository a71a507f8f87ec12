"""What holds for every format: options, stacks of experts, weights that none can hold, a machine without numba."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from choices import CHOICES, FACTS, MADE, every
from hostile.small import Tensor, random, write_model
from quantized import DTYPES, as_bytes, run_kernel

from omni_convert.formats import FORMATS, engine, format_label, format_options, make_format
from omni_convert.formats.base import Format
from omni_convert.formats.errors import OmniConvertError, UsageError


@every
def test_a_stack_of_experts_is_quantized_expert_by_expert(fmt: Format) -> None:
    weight = torch.randn(3, 5, 128, dtype=torch.bfloat16) * torch.tensor([1.0, 8.0, 0.1]).view(3, 1, 1)
    found = fmt.quantize(weight, FACTS)
    experts = [fmt.quantize(expert, FACTS) for expert in weight]
    for suffix, tensor in found.items():
        assert torch.equal(as_bytes(tensor), torch.stack([as_bytes(expert[suffix]) for expert in experts])), suffix
    values = fmt.dequantize(found)
    assert torch.equal(values, torch.stack([fmt.dequantize(expert) for expert in experts]))
    assert torch.nn.functional.cosine_similarity(values.flatten(), weight.float().flatten(), dim=0) > 0.99


@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 4, 64), (64,), (2, 2, 4, 64)], ids=str)
@every
def test_weights_that_no_format_holds(fmt: Format, shape: tuple[int, ...]) -> None:
    with pytest.raises(OmniConvertError, match="expected \\(N, K\\)"):
        fmt.quantize(torch.ones(shape), FACTS)
    assert fmt.refusal(shape) is not None


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@every
def test_the_reference_names_what_is_not_finite(fmt: Format, value: float) -> None:
    weight = torch.ones(4, 128, dtype=torch.float16)
    weight[2, 65] = value
    with pytest.raises(OmniConvertError, match=r"\(2, 65\)"):
        fmt.quantize(weight, FACTS)


@pytest.mark.parametrize("dtype", DTYPES)
@every
def test_without_numba_the_bytes_are_the_same(fmt: Format, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(6, 192, dtype=dtype)
    expected = run_kernel(fmt, weight)
    monkeypatch.setattr(engine, "_problems", ["numba is away"])
    for name in ("compiled_rows", "compiled_values"):
        monkeypatch.delattr(type(fmt), name)  # so that nothing but the reference can answer
    found = run_kernel(fmt, weight)
    for name, array in found.tensors.items():
        assert array.tobytes() == expected.tensors[name].tobytes(), name
    assert found.power == pytest.approx(expected.power, rel=1e-4)
    values = fmt.dequantize_rows(found.tensors)
    weight.bits[3, 7] = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}[dtype]
    assert run_kernel(fmt, weight).bad == (3, 7)
    monkeypatch.undo()
    assert values.tobytes() == fmt.dequantize_rows(found.tensors).tobytes()


NO_NUMBA = """
import sys
sys.modules["numba"] = None
import numpy as np
from omni_convert.formats import FORMATS
out = {"weight": np.empty((1, 2), np.int8), "weight_scale": np.empty((1, 1), np.float32)}
for _ in range(2):
    assert FORMATS["int8"].quantize_rows(np.array([[0x4000, 0xbf80]], np.uint16), "BF16", out, None) is None
print(out["weight"].tolist())
"""


BROKEN_KERNEL = """
import numpy as np
from omni_convert.formats import FORMATS, mx_kernels
def broken(*args):
    raise NotImplementedError("no such vector here")
mx_kernels.mx_rows = broken
out = {"weight": np.empty((1, 32), np.uint8), "weight_scale": np.empty((1, 1), np.uint8)}
for _ in range(2):
    assert FORMATS["mxfp8"].quantize_rows(np.full((1, 32), 0x4000, np.uint16), "BF16", out, None) is None
print(out["weight"][0, 0], out["weight_scale"][0, 0])
"""


@pytest.mark.parametrize(
    ("code", "printed"), [(NO_NUMBA, "[[127, -64]]\n"), (BROKEN_KERNEL, "120 120\n")], ids=["missing", "broken"]
)
def test_a_numba_that_does_not_work_is_said_once(code: str, printed: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == printed
    (line,) = result.stderr.splitlines()
    assert line.startswith("omni-convert: numba does not work here (")
    assert "torch takes over" in line


@pytest.mark.parametrize(("method", "options"), CHOICES, ids=str)
def test_options_make_the_format_again(method: str, options: dict[str, Any]) -> None:
    fmt = make_format(method, **options)
    stored = format_options(fmt)
    again = {name: tuple(value) if name == "block_size" else value for name, value in stored.items()}
    assert make_format(method, **again) == fmt
    assert again.items() >= options.items()
    assert make_format(method) == FORMATS[method]


def test_labels() -> None:
    assert [format_label(fmt) for fmt in MADE] == [
        "int8", "int8 (balanced)", "int8 (fused per-channel)", "fp8", "fp8 (static)", "fp8 (channel)",
        "fp8 (channel balanced)",
        "fp8 (block 2x64)", "fp8 (block 2x64 balanced)", "mxfp8", "mxfp8 (rule floor)", "mxfp4", "mxfp4 (balanced)",
        "mxfp4_dualscale", "mxfp4_dualscale (balanced)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("int9", {}, "'int9', expected one of int8, fp8"),
        ("int8", {"granularity": "block"}, "'block', int8 knows only channel"),
        ("int8", {"activation_scheme": "static"}, "'static', int8 knows only dynamic"),
        ("int8", {"block_size": (128, 128)}, "--block-size: int8 has no such choice"),
        ("int8", {"scale_rule": "even"}, "--scale-rule: int8 has no such choice"),
        ("fp8", {"scale_rule": "even"}, "--scale-rule: fp8 has no such choice"),
        ("fp8", {"granularity": "row"}, "'row', fp8 knows only tensor, channel, block"),
        ("fp8", {"granularity": "channel", "block_size": (8, 8)}, "--block-size needs --granularity block"),
        ("mxfp8", {"granularity": "tensor"}, "--granularity: mxfp8 has no such choice"),
        ("mxfp8", {"scale_rule": "ceil"}, "'ceil', mxfp8 knows only floor, even, rceil"),
        ("mxfp4_dualscale", {"scale_rule": "floor"}, "'floor', mxfp4_dualscale knows only even"),
        ("mxfp4", {"quality": "high"}, "'high', mxfp4 knows only fast, balanced"),
    ],
)
def test_choices_that_a_format_does_not_have(method: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_format(method, **options)
    assert said in str(caught.value)


@every
def test_valid_codes_are_those_that_quantization_makes(fmt: Format) -> None:
    valid = fmt.valid_codes
    codes = run_kernel(fmt, Tensor("BF16", np.arange(0x7F80, dtype="<u2").reshape(-1, 64))).codes
    assert valid[codes.view(np.uint8)].all()
    if fmt.name == "int8":
        assert np.flatnonzero(~valid).tolist() == ([] if fmt.is_searched else [0x80])
    elif "mxfp4" in fmt.name:
        assert np.flatnonzero(valid).tolist() == [
            0, 0x30, 0x38, 0x3C, 0x40, 0x44, 0x48, 0x4C, 0xB0, 0xB8, 0xBC, 0xC0, 0xC4, 0xC8, 0xCC,
        ]  # fmt: skip
    else:
        assert np.flatnonzero(~valid).tolist() == [0x7F, 0x80, 0xFF]


def test_several_threads_say_it_once(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", {}, {f"{name}.weight": random(64, 64) for name in range(40)})
    command = "import sys; sys.modules['numba'] = None; from omni_convert.cli import main; main(sys.argv[1:])"
    arguments = ["--method", "int8", "--target", "omni-convert", "--threads", "4", str(source), str(tmp_path / "out")]
    result = subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True, text=True, check=True)
    assert result.stderr.count("numba does not work here (ModuleNotFoundError") == result.stderr.count("\n") == 1
