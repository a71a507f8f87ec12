"""Triton's compiler gives kernels the instructions and the memory that GPUs of every generation have; needs none."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from omni_convert.runtime import cuda
from omni_convert.runtime.cuda import tile_for
from omni_convert.runtime.cuda_device import Capability

pytest.importorskip("triton", reason="there is no Triton for this machine")

KIB = 1024
SHARED = {(8, 0): 163 * KIB, (8, 9): 99 * KIB, (9, 0): 227 * KIB, (10, 0): 227 * KIB, (12, 0): 99 * KIB}
"""What one program may have. Source: CUDA C++ programming guide, technical specifications."""
INT8 = {
    (8, 0): r"mma\.sync\.aligned\.m16n8k32\.row\.col\.satfinite\.s32\.s8\.s8",
    (8, 9): r"mma\.sync\.aligned\.m16n8k32\.row\.col\.satfinite\.s32\.s8\.s8",
    (9, 0): r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8",
    (10, 0): r"tcgen05\.mma\.\S*kind::i8",
    (12, 0): r"mma\.sync\.aligned\.m16n8k32\.row\.col\.satfinite\.s32\.s8\.s8",
}
"""Products of large tiles."""


class Compiled(NamedTuple):
    ptx: str
    shared: int
    spilled: int
    """Bytes per thread that did not fit into registers."""


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_kernel(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: Capability, **options: Any
) -> Compiled:
    """As a launch would whose pointers and sizes are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget

    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    even = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name in types}
    source = triton.compiler.ASTSource(kernel, signature, constants, even)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    found = triton.compile(source, target=target, options={"enable_fp_fusion": False, **options})
    return Compiled(found.asm["ptx"], found.metadata.shared, stack_bytes(found.asm["cubin"]))


def stack_bytes(cubin: bytes) -> int:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.findall(r" STACK:(\d+)", printed)[0])


def compile_int8(rows: int, capability: Capability, dtype: str = "*bf16") -> Compiled:
    from omni_convert.runtime import triton_kernels

    types = {
        "codes": "*i8", "row_scale": "*fp32", "weight": "*i8", "channel_scale": "*fp32", "bias": dtype, "out": dtype,
        "rows": "i32", "channels": "i32", "columns": "i32", "weight_stride": "i32",
    }  # fmt: skip
    tile = tile_for(rows, capability)._asdict()
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"has_bias": True, "group_m": cuda.GROUP, **tile}
    return compile_kernel(triton_kernels.int8_linear, types, constants, capability, **options)


@pytest.mark.parametrize("capability", SHARED, ids=str)
@pytest.mark.parametrize("rows", [1, 64, 256, 4096])
def test_int8_products_use_tensor_cores(rows: int, capability: Capability) -> None:
    found = compile_int8(rows, capability)
    instruction = INT8[capability] if rows > 256 else r"s32\.s8\.s8|kind::i8"
    assert re.search(instruction, found.ptx), sorted(set(re.findall(r"\S*mma\S*", found.ptx)))
    assert found.shared <= SHARED[capability]
    assert found.spilled <= 64, "what does not fit into registers is slow"
    assert "cp.async" in found.ptx  # loads that overlap with products


def test_scales_and_bias_are_rounded_one_by_one() -> None:
    found = compile_int8(64, (9, 0), "*fp32").ptx
    assert "mul.rn.f32" in found or "mul.f32" in found
    assert not re.search(r"fma\S*\.f32", found)


@pytest.mark.parametrize("capability", SHARED, ids=str)
@pytest.mark.parametrize("code", ["*i8", "*fp8e4nv"])
def test_rows_are_quantized_exactly(code: str, capability: Capability) -> None:
    from omni_convert.runtime import triton_kernels

    if code == "*fp8e4nv" and capability < (8, 9):
        pytest.skip("fp8 activations are never asked for there")
    types = {"x": "*bf16", "codes": code, "scale": "*fp32", "columns": "i32", "row_stride": "i32"}
    constants = {"largest": 127.0, "smallest": 2.0**-100, "block": 4096}
    found = compile_kernel(triton_kernels.quantize_rows, types, constants, capability, num_warps=8).ptx
    assert_exact(found)
    assert "ld.global.v4.b32" in found  # 16 bytes at a time


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0)], ids=str)
def test_groups_are_quantized_exactly(capability: Capability) -> None:
    from omni_convert.runtime import triton_kernels

    types = {"x": "*bf16", "codes": "*fp8e4nv", "scale": "*fp32", "columns": "i32", "row_stride": "i32"}
    constants = {"largest": 448.0, "smallest": 2.0**-100, "size": 128, "block": 1024}
    kernel = triton_kernels.quantize_groups
    assert_exact(compile_kernel(kernel, types | {"scale_stride": "i32"}, constants, capability).ptx)
    types |= {"scale": "*u8", "rows": "i32"}
    found = compile_kernel(triton_kernels.quantize_mx, types, {"block": 1024}, capability).ptx
    assert "cvt.rn.satfinite.e4m3x2.f32" in found


def assert_exact(ptx: str) -> None:
    assert "div.rn.f32" in ptx
    assert not re.search(r"div\.(full|approx)|fma\S*\.f32|\.ftz", ptx)
