"""Check the calls of ``runtime/npu.py`` against the real operators of torch-npu, on a machine without NPU and CANN.

    pip install --target npu-wheel --no-deps torch-npu==2.13.0
    PYTHONPATH=src python scripts/check_torch_npu.py npu-wheel

In a folder of its own: where torch-npu is installed and CANN is not, ``import torch`` fails. It starts here with a
library that has every symbol of CANN that it misses, each a function that returns 0. Nothing can be computed then, but
schemas and shape functions are the real ones. Every kernel runs on them with every kind of format, on tensors without
data (device ``meta``). Two operators have no shape function; theirs is written here, so of those calls only the schema
is checked.

Needs ``cc`` and ``ldd``. Prints a table, and exits 1 if anything differs from what is expected.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent / "tests"
SHAPES = ((256, 1024), (48, 96))
"""N and K; the second with an odd number of groups of 32, which some formats refuse."""
ROWS = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="folder into which torch-npu was installed with --target")
    wheel: Path = parser.parse_args().wheel.resolve()
    if "CHECK_TORCH_NPU" in os.environ:
        return check()
    with tempfile.TemporaryDirectory() as folder:
        environment = stubbed(wheel, Path(folder))
        return subprocess.run([sys.executable, __file__, str(wheel)], env=environment).returncode


def stubbed(wheel: Path, folder: Path) -> dict[str, str]:
    """An environment in which ``import torch_npu`` succeeds; ``folder`` receives the stand-in for CANN."""
    torch_folder = Path(importlib.util.find_spec("torch").origin or "").parent  # type: ignore[union-attr]
    libraries = sorted((wheel / "torch_npu").rglob("*.so"))
    if not libraries:
        sys.exit(f"{wheel}: found no torch_npu/**/*.so, expected torch-npu. See the top of {__file__}.")
    paths = [folder, torch_folder / "lib", *{library.parent for library in libraries}]
    environment = os.environ | {
        "CHECK_TORCH_NPU": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, paths)),
        "PYTHONPATH": os.pathsep.join([str(wheel), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    missing = {line.split()[0] for line in linked(libraries, environment) if line.endswith("=> not found")}
    build(folder, missing, [])
    lines = [line for line in linked(libraries, environment) if line.startswith("undefined symbol: ")]
    symbols = sorted({name for line in lines if not (name := line.split()[2]).startswith(("_Z", "Py", "_Py"))})
    build(folder, missing, symbols)
    print(f"stand-in for CANN: {len(symbols)} functions in {len(missing)} libraries\n", flush=True)
    return environment


def linked(libraries: Sequence[Path], environment: dict[str, str]) -> Iterator[str]:
    """What the dynamic linker says of them."""
    for library in libraries:
        found = subprocess.run(["ldd", "-r", str(library)], env=environment, capture_output=True, text=True)
        yield from (line.strip().split("\t")[0] for line in (found.stdout + found.stderr).splitlines())


def build(folder: Path, names: set[str], symbols: Sequence[str]) -> None:
    source = folder / "cann.c"
    source.write_text("".join(f"long {symbol}(void) {{ return 0; }}\n" for symbol in symbols))
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", str(folder / "cann.so"), str(source)], check=True)
    for name in names:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("cann.so")


def check() -> int:
    """In the process that has the stand-in."""
    import torch
    import torch_npu

    sys.path.insert(0, str(TESTS))
    import npu_operators
    from kinds import KINDS

    from omni_convert.formats import make_format
    from omni_convert.formats.config import parse_config

    print(f"torch-npu {torch_npu.__version__}, torch {torch.__version__}\n")
    plain = parse_config({"quant_method": "mxfp4", "is_checkpoint_mxfp4_serialized": True}).format
    kinds = KINDS | {"fp8 block": make_format("fp8", granularity="block"), "mxfp4 floor": plain}
    wrong = [*schemas(npu_operators.SCHEMAS), *constants(), *quantized(npu_operators)]
    add_shape_functions()
    look_at_no_data()
    rows = [row for kind, fmt in kinds.items() for row in kernel_rows(kind, fmt)]
    wrong += [f"{what}: accepted, expected an error" for what, call in MUST_FAIL.items() if not fails(call)]
    print("| format | N, K | operators | bf16, fp16, fp32, each without and with bias |\n|---|---|---|---|")
    for row, results in itertools.groupby(rows, lambda row: row[:3]):
        print(f"| {' | '.join(row)} | {', '.join(dict.fromkeys(result for *_, result in results))} |")
    wrong += dict.fromkeys(f"{', '.join(row)}: {result}" for *row, result in rows if result != "ok")
    print(f"\n{len(rows)} calls, {len(MUST_FAIL)} wrong ones that must fail, {len(npu_operators.SCHEMAS)} schemas")
    print("\n".join(["", *wrong]) if wrong else "all as expected")
    return int(bool(wrong))


def schemas(expected: Sequence[str]) -> Iterator[str]:
    """Where the stand-ins of the tests are declared otherwise than the operators."""
    import torch

    for text in expected:
        stand_in = torch._C.parse_schema(f"npu::{text}")
        real = getattr(torch.ops.npu, text.partition("(")[0]).default._schema
        parts = [
            (str(schema).rpartition("->")[0], [str(value.type) for value in schema.returns])  # their names differ
            for schema in (stand_in, real)
        ]
        if parts[0] != parts[1]:
            yield f"schema of the stand-in: {stand_in}\n  is really: {real}"


def quantized(stand_ins: Any) -> Iterator[str]:
    """Where the stand-ins give other shapes or dtypes than the operators that quantize activations."""
    import torch

    calls: Sequence[tuple[str, dict[str, Any]]] = (
        ("npu_dynamic_quant", {}),
        ("npu_dynamic_quant", {"dst_type": stand_ins.E4M3}),
        ("npu_dynamic_block_quant", {"dst_type": stand_ins.E4M3}),
        ("npu_dynamic_mx_quant", {"dst_type": stand_ins.E4M3}),
        ("npu_dynamic_mx_quant", {"dst_type": stand_ins.E2M1, "scale_alg": 2, "dst_type_max": 7.25}),
        ("npu_dynamic_dual_level_mx_quant", {"smooth_scale": torch.ones(1088, dtype=torch.bfloat16)}),
    )
    x = torch.ones(ROWS, 1088, dtype=torch.bfloat16)
    for name, others in calls:
        on_meta = {key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in others.items()}
        found = getattr(stand_ins, name)(x, **others), getattr(torch.ops.npu, name)(x.to("meta"), **on_meta)
        stand_in, real = [[(part.shape, part.dtype) for part in parts] for parts in found]
        if stand_in != real:
            yield f"{name}({others}): the stand-in gives {stand_in}, really {real}"


def constants() -> Iterator[str]:
    """Where torch-npu calls something otherwise than the runtime does."""
    import torch_npu

    from omni_convert.runtime import npu

    names = {"float8_e4m3fn": npu.E4M3FN, "float8_e8m0fnu": npu.E8M0FNU, "float4_e2m1fn_x2": npu.E2M1FN_X2}
    for name, value in names.items():
        if (found := getattr(torch_npu, name)) != value:
            yield f"torch_npu.{name} is {found}, expected {value}"
    if int(torch_npu.Format.FRACTAL_NZ) != npu.FRACTAL_NZ:
        yield f"torch_npu.Format.FRACTAL_NZ is {torch_npu.Format.FRACTAL_NZ}, expected {npu.FRACTAL_NZ}"
    for name in ("is_available", "device_count", "get_soc_version"):
        if not callable(getattr(torch_npu.npu, name, None)):
            yield f"torch_npu.npu.{name} is not there"


def add_shape_functions() -> None:
    """Of the two operators that have none."""
    import torch

    library = torch.library.Library("npu", "IMPL", "Meta")
    library.impl("npu_format_cast", lambda input, acl_format, **dtypes: torch.empty_like(input))
    library.impl(
        "npu_dual_level_quant_matmul",
        lambda x1, x2, *scales, bias=None, output_dtype=15: x1.new_empty(len(x1), len(x2), dtype=torch.bfloat16),
    )
    globals()["_library"] = library  # the functions go with it


def look_at_no_data() -> None:
    """What kernels prepare, they make anew, and packing looks at no values."""
    import torch

    from omni_convert.runtime import npu

    npu.prepared = lambda handle, sources, make: make()
    npu.packed_e2m1 = lambda weight: weight.new_empty(len(weight), weight.shape[1] // 2, dtype=torch.uint8)


def kernel_rows(kind: str, fmt: Any) -> Iterator[tuple[str, ...]]:
    import torch

    from omni_convert.runtime import npu
    from omni_convert.runtime.operator import stored_tensors

    for shape in SHAPES:
        if fmt.refusal(shape) is not None:
            continue
        stored = stored_tensors(fmt, shape)
        tensors = {suffix: torch.empty(size, dtype=dtype, device="meta") for suffix, (dtype, size) in stored.items()}
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = torch.empty(ROWS, shape[1], dtype=dtype, device="meta")
            for bias in (None, torch.empty(shape[0], dtype=dtype, device="meta")):
                calls: list[str] = []
                with recorded(calls):
                    result = outcome(partial(npu.LINEARS[fmt.name], fmt, x, tensors, bias, None), dtype, shape[0])
                yield kind, f"{shape[0]}, {shape[1]}", ", ".join(calls), result


def outcome(run: Callable[[], Any], dtype: Any, outputs: int) -> str:
    try:
        y = run()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    expected, found = ((ROWS, outputs), dtype), (tuple(y.shape), y.dtype)
    return "ok" if found == expected else f"{found}, expected {expected}"


@contextmanager
def recorded(calls: list[str]) -> Iterator[None]:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "npu":
                calls.append(func._opname)
            return func(*args, **(kwargs or {}))

    with Recorder():
        yield


def fails(call: Callable[[], Any]) -> bool:
    try:
        call()
    except Exception:
        return True
    return False


def _quant_matmul(codes: Any, weight: Any, scale: Any, pertoken: Any, **others: Any) -> Any:
    """``codes``, ``weight``: (dtype, shape), or made already; ``scale``, ``pertoken``: shapes."""
    import torch

    def tensor(given: Any, dtype: Any = None) -> Any:
        return given if isinstance(given, torch.Tensor) else torch.empty(given, dtype=dtype, device="meta")

    scales = others.pop("scales", torch.float32)
    return torch.ops.npu.npu_quant_matmul(
        tensor(codes[1], codes[0]), tensor(weight[1], weight[0]), tensor(scale, scales),
        pertoken_scale=tensor(pertoken, scales), output_dtype=others.pop("output_dtype", torch.bfloat16), **others,
    )  # fmt: skip


def _mx(**others: Any) -> Any:
    """A good call with packed weights, except for ``others``."""
    import torch

    weight = others.pop("weight", torch.empty(256, 64, dtype=torch.uint8, device="meta").t())
    good: dict[str, Any] = {
        "scale_dtype": 293, "pertoken_scale_dtype": 293, "x1_dtype": 296, "x2_dtype": 296, "group_sizes": [1, 1, 32],
    }  # fmt: skip
    given = {name: value for name, value in (good | others).items() if value is not None}
    return _quant_matmul((torch.uint8, (5, 64)), (None, weight), (2, 256, 2), (5, 2, 2), scales=torch.uint8, **given)


def _int8(scale: Any = (256,), pertoken: Any = (5,), **others: Any) -> Any:
    import torch

    return _quant_matmul((torch.int8, (5, 128)), (torch.int8, (128, 256)), scale, pertoken, **others)


def _contiguous() -> Any:
    import torch

    return torch.empty(256, 64, dtype=torch.uint8, device="meta").t().contiguous()


MUST_FAIL: dict[str, Callable[[], Any]] = {
    "int8, scale (N, 1)": lambda: _int8(scale=(256, 1)),
    "int8, scale per token (M, 1)": lambda: _int8(pertoken=(5, 1)),
    "mxfp4, packed weight contiguous": lambda: _mx(weight=_contiguous()),
    "mxfp4, without scale_dtype": lambda: _mx(scale_dtype=None),
}
"""Mistakes that the shape functions are known to notice; if they did not, the table would mean nothing."""


if __name__ == "__main__":
    sys.exit(main())
