"""Which Ascend NPU there is, and which formats have operators on it.

| product                                  | SoC version of torch-npu | formats |
|------------------------------------------|--------------------------|---------|
| Ascend 910 (first), 310P, 310B           | up to 219, 240 to 249    | none    |
| Ascend 910B (Atlas A2), 910C (Atlas A3)  | 220 to 239, 250 to 259   | int8    |
| Ascend 950                               | 260 and above            | all     |

Source: the tables "product support" of the operators' documentation (CANN 9, torch-npu 2.13), and the enumeration
``SocVersion`` of torch-npu. INT8 needs a scale per token, which the first row does not have.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch

from omni_convert.formats import FORMATS
from omni_convert.formats.base import Format
from omni_convert.formats.errors import OmniConvertError, printable


class _Generation(NamedTuple):
    """Products that run the same formats. ``first``: their lowest SoC version; they end where the next begin."""

    first: int
    name: str
    formats: tuple[str, ...]


_GENERATIONS = (
    _Generation(0, "Ascend 910 or 310P", ()),
    _Generation(220, "Ascend 910B (Atlas A2)", ("int8",)),
    _Generation(240, "Ascend 310B", ()),
    _Generation(250, "Ascend 910C (Atlas A3)", ("int8",)),
    _Generation(260, "Ascend 950", tuple(FORMATS)),
)


def open_device(name: str) -> torch.device:
    """The NPU of that name, ``npu`` (the current one) or ``npu:number``. Imports torch-npu.

    Raises:
        OmniConvertError: torch-npu is not installed or cannot start, or that NPU is not there.
    """
    npu = _npu_module(name)
    if not re.fullmatch(r"npu(:\d+)?", name):
        raise OmniConvertError(f"device {name!r} is not known to PyTorch, expected 'npu', 'npu:1' or the like.")
    count = npu.device_count() if npu.is_available() else 0
    if int(name.partition(":")[2] or 0) >= count:
        raise OmniConvertError(
            f"device {name!r} was asked for, but torch-npu sees {count} NPUs. Check the driver (npu-smi info), or use "
            "device='cpu'."
        )
    return torch.device(name)


def soc_version() -> int:
    """What torch-npu calls the NPUs of this machine; see the table above. Negative: it does not know them."""
    return int(_npu_module("npu").get_soc_version())


def refuse_format(fmt: Format, soc: int | None) -> str | None:
    """Why an NPU has no operators for ``fmt``, and what to do; None if it has, or if nobody knows the NPU."""
    if soc is None or soc < 0:
        return None
    generation = [generation for generation in _GENERATIONS if generation.first <= soc][-1]
    if fmt.name in generation.formats:
        return None
    remedy = "load it with device='cpu'."
    if generation.formats:
        remedy = f"convert the model with --method {generation.formats[0]}, or {remedy}"
    having = " or ".join(other.name for other in _GENERATIONS if fmt.name in other.formats)
    found = f"found an {fmt.name} layer on an {generation.name}"
    return f"{found}, expected an {having}, which has operators for it: {remedy}"


def _npu_module(name: str) -> Any:
    try:
        import torch_npu
    except (ImportError, RuntimeError, OSError) as error:  # the latter two without CANN
        first_line = printable(f"{type(error).__name__}: {error}".partition("\n")[0], 300)
        raise OmniConvertError(
            f"device {name!r} was asked for, but torch_npu cannot be imported ({first_line}). "
            "Run: pip install 'omni-convert[npu]', and install CANN, whose set_env.sh must have run."
        ) from error
    return torch_npu.npu
