"""Which engine quantizes rows: on a CPU the compiled kernels, the torch reference where numba does not work and on
devices."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar, cast

from omni_convert.formats.base import NO_FACTS, Facts, Format, NonFinite
from omni_convert.formats.errors import OmniConvertError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from typing_extensions import Self

T = TypeVar("T")

_WITHOUT_FLOAT64 = ("npu",)
"""Devices that leave the error sums, which are of float64, to the host."""

_lock = Lock()
_problems: list[str] = []


def first_working(kernel: Callable[[], T], reference: Callable[[], T]) -> T:
    """The result of a compiled kernel, or of the reference where numba does not work; then says so once, in one line.

    numba may be missing, built for another NumPy, without a folder for its cache, or unable to compile a kernel. The
    first call decides for all that follow.
    """
    if not _problems:
        try:
            with _lock:  # one thread imports and compiles; the others find it done
                _import_kernels()
            return kernel()
        except (OmniConvertError, MemoryError):
            raise
        except Exception as error:  # whatever it is, the reference does not need numba
            _give_up(error)
    return reference()


@cache
def _import_kernels() -> None:
    from omni_convert.formats import dual_kernels, fp8_kernels, kernels, mx_kernels  # noqa: F401


def _give_up(error: Exception) -> None:
    with _lock:
        if _problems:
            return
        _problems.append(f"{type(error).__name__}: {error}".splitlines()[0])
        sys.stderr.write(
            f"omni-convert: numba does not work here ({_problems[0]}); torch takes over, with the same bytes at a "
            "tenth of the speed or less.\n"
        )


def reference_values(
    fmt: Format, tensors: Mapping[str, NDArray[Any]], out: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """``Format.dequantize_rows`` by ``Format.dequantize``."""
    import numpy as np
    import torch

    views = {suffix: torch.from_numpy(np.ascontiguousarray(array)) for suffix, array in tensors.items()}
    if views["weight"].dtype == torch.uint8:
        views["weight"] = views["weight"].view(torch.float8_e4m3fn)
    values: NDArray[np.float32] = fmt.dequantize(views).numpy()
    if out is None:
        return values
    out[...] = values
    return out


def reference_rows(
    fmt: Format,
    bits: NDArray[Any],
    dtype: str,
    out: Mapping[str, NDArray[Any]],
    power: NDArray[np.float64] | None,
    facts: Facts = NO_FACTS,
    device: torch.device | str = "cpu",
) -> NonFinite | None:
    """``Format.quantize_rows`` by ``Format.quantize`` on a device.

    Copies to and from pinned memory may still be under way: wait for the current stream before using the arrays.
    """
    import torch

    from omni_convert.formats.bits import nonfinite_place, to_torch

    stored = to_torch(bits, dtype)
    weight = stored.to(device, non_blocking=True)
    try:
        tensors = fmt.quantize(weight, facts)
    except OmniConvertError:
        if (place := nonfinite_place(bits, dtype)) is None:
            raise
        return NonFinite(*place)
    for suffix, array in out.items():
        tensor = tensors[suffix]
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = tensor.view(torch.uint8)
        torch.from_numpy(array).copy_(tensor.view(array.shape), non_blocking=True)
    if power is not None:
        if weight.device.type in _WITHOUT_FLOAT64:
            weight, tensors = stored, {suffix: tensor.cpu() for suffix, tensor in tensors.items()}
        torch.from_numpy(power).copy_(_error_sums(fmt, weight, tensors))
    return None


def _error_sums(fmt: Format, weight: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(N, 2) float64: per row the sum of squares of the weight and of the quantization error."""
    import torch

    exact = weight.to(torch.float64)
    error = exact - fmt.dequantize(tensors)
    return torch.stack([(exact * exact).sum(dim=1), (error * error).sum(dim=1)], dim=1)


class Rows:
    """``quantize_rows`` and ``dequantize_rows`` of a format: by its kernels, or by its reference where they fail."""

    @property
    def is_fused(self) -> bool:
        """See ``Format``; most formats are no different."""
        return False

    def fused(self) -> Self:
        """See ``Format``; most formats are no different."""
        return self

    def own_noise(self, maxima: NDArray[np.float32], columns: int) -> float | None:
        """See ``Format``; most formats lose nothing worth telling."""
        return None

    def compiled_rows(
        self,
        bits: NDArray[Any],
        dtype: str,
        out: Mapping[str, NDArray[Any]],
        power: NDArray[np.float64] | None,
        facts: Facts,
    ) -> NonFinite | None:
        """``Format.quantize_rows`` by compiled kernels."""
        raise NotImplementedError

    def compiled_values(self, tensors: Mapping[str, NDArray[Any]], out: NDArray[Any] | None) -> NDArray[Any]:
        """See ``Format``."""
        raise NotImplementedError

    def quantize_rows(
        self,
        bits: NDArray[Any],
        dtype: str,
        out: Mapping[str, NDArray[Any]],
        power: NDArray[np.float64] | None,
        facts: Facts = NO_FACTS,
    ) -> NonFinite | None:
        """See ``Format``."""
        return first_working(
            lambda: self.compiled_rows(bits, dtype, out, power, facts),
            lambda: reference_rows(cast("Format", self), bits, dtype, out, power, facts),
        )

    def dequantize_rows(
        self, tensors: Mapping[str, NDArray[Any]], out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """See ``Format``."""
        return first_working(
            lambda: self.compiled_values(tensors, out),
            lambda: reference_values(cast("Format", self), tensors, out),
        )


def row_maxima(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Largest magnitude of every row of stored bits (n, K), not empty; NaN or Inf if one of them is."""
    from omni_convert.formats import bits as stored

    def kernel() -> NDArray[np.float32]:
        from omni_convert.formats import fp8_kernels

        return fp8_kernels.row_maxima(stored.kernel_bits(bits, dtype))

    return first_working(kernel, lambda: stored.row_maxima(bits, dtype))
