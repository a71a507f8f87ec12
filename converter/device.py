"""Workers that quantize on a GPU or NPU, by the torch references, and whether there is one that can.

Every thread has a stream of its own, and reads and writes pinned memory: while the rows of one are under way, those of
another are computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from omni_convert.converter.jobs import Worker
from omni_convert.formats import format_label
from omni_convert.formats.base import Facts, Format, NonFinite
from omni_convert.formats.bits import OUTPUT_DTYPE
from omni_convert.formats.engine import reference_rows, row_maxima
from omni_convert.formats.errors import OmniConvertError, UsageError, printable

if TYPE_CHECKING:
    import torch

CPU = "cpu"
DEVICE_PIECE_BYTES = 15 << 20
"""Large enough to hide the calls; below a power of two, to which pinned memory is rounded up."""
_WORK_BYTES, _SEARCH_BYTES = 48, 128
"""What the references hold per weight, temporary values included; a test counts."""
INSTEAD = "Leave out --device to convert on the CPU, to the same bytes."


class DeviceWorker(Worker):
    """A thread that computes on a device: it has a stream there, and its buffers are in pinned memory."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._module: Any = torch.get_device_module(device)
        self._stream = self._module.Stream(device) if device.type != CPU else None
        super().__init__()

    def empty(self, size: int) -> NDArray[np.uint8]:
        import torch

        pinned = self._device.type != CPU
        with _failures(self._device, f"hold {size} bytes in memory that it can reach"):
            buffer: NDArray[np.uint8] = torch.empty(size, dtype=torch.uint8, device=CPU, pin_memory=pinned).numpy()
        return buffer

    def quantize_rows(
        self,
        fmt: Format,
        bits: NDArray[Any],
        dtype: str,
        out: Mapping[str, NDArray[Any]],
        power: NDArray[np.float64] | None,
        facts: Facts,
    ) -> NonFinite | None:
        """``fmt.quantize_rows`` on the device; done when it returns.

        Raises:
            OmniConvertError: the device has no memory left, lacks an operation, or failed.
        """
        doing = f"quantize {bits.shape[0]} x {bits.shape[1]} weights to {format_label(fmt)}"
        with _failures(self._device, doing), self._own_stream():
            return reference_rows(fmt, bits, dtype, out, power, facts, self._device)

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """What is asked of the device within goes to this thread's stream, and is done in the end."""
        if self._stream is None:
            yield
            return
        with self._module.stream(self._stream):
            yield
            self._stream.synchronize()


def check_name(name: str) -> None:
    """Whether ``name`` is that of a device, there or not.

    Raises:
        UsageError: it is not.
    """
    if not re.fullmatch(r"cpu|(cuda|npu)(:\d+)?", name):
        raise UsageError(f"--device {printable(name)}: expected cpu, cuda, cuda:N, npu or npu:N.")


def workers(name: str) -> Callable[[], Worker]:
    """Makes the workers that compute on the device of that name. Only ``cpu`` needs no torch."""
    return Worker if name == CPU else partial(DeviceWorker, open_device(name))


def open_device(name: str) -> torch.device:
    """The GPU or NPU of that name, ``kind`` or ``kind:number``; without a number, the current one.

    Raises:
        OmniConvertError: it is not there.
    """
    kind, _, number = name.partition(":")
    module = _npu_module(name) if kind == "npu" else _cuda_module(name)
    import torch

    with _failures(name, "begin"):
        place, count = int(number) if number else module.current_device(), module.device_count()
    if place >= count:
        raise OmniConvertError(f"--device {name}: found {count} devices, numbered from 0. Choose one of those.")
    return torch.device(kind, place)


def _cuda_module(name: str) -> Any:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        found = f", built for CUDA or ROCm {built}, finds no GPU" if built else " is built for CPUs alone"
        remedy = "Check the driver (nvidia-smi)" if built else "Install PyTorch's build for this GPU (pytorch.org)"
        raise OmniConvertError(f"--device {name}: PyTorch {torch.__version__}{found}. {remedy}. {INSTEAD}")
    return torch.cuda


def _npu_module(name: str) -> Any:
    try:
        import torch
        import torch_npu
    except (ImportError, RuntimeError, OSError) as error:  # the latter two without CANN
        raise OmniConvertError(
            f"--device {name}: torch_npu cannot be imported ({_first_line(error)}). Install it "
            f"(pip install 'omni-convert[npu]') and CANN, whose set_env.sh must have run. {INSTEAD}"
        ) from error
    if not torch_npu.npu.is_available():
        raise OmniConvertError(f"--device {name}: torch_npu finds no NPU. Check the driver (npu-smi info). {INSTEAD}")
    return torch.get_device_module("npu")


@contextmanager
def _failures(device: torch.device | str, doing: str) -> Iterator[None]:
    """Whatever torch says of a device becomes an error that the user can act on."""
    try:
        yield
    except RuntimeError as error:
        raise OmniConvertError(
            f"--device {device}: cannot {doing} ({_first_line(error)}). If memory is short, give fewer --threads. "
            f"{INSTEAD}"
        ) from error


def _first_line(error: BaseException) -> str:
    return printable(f"{type(error).__name__}: {error}".partition("\n")[0], 300)


def free_bytes(device: torch.device) -> int:
    """Memory of the device that is free now."""
    import torch

    return int(torch.get_device_module(device).mem_get_info(device)[0])


def work_bytes(fmt: Format, weights: int) -> int:
    """Memory of a device that quantizes so many weights at once."""
    return weights * (_SEARCH_BYTES if fmt.is_searched else _WORK_BYTES)


def check_bytes(device: torch.device, fmt: Format) -> None:
    """Whether the device gives the bytes of the CPU, on weights where a careless operation would show.

    Raises:
        OmniConvertError: it does not, or it cannot quantize to this format.
    """
    for dtype, bits in (("BF16", _every_bfloat16()), ("F32", _close_to_ties())):
        expected, found = (_tensors(worker, fmt, bits, dtype) for worker in (Worker(), DeviceWorker(device)))
        for suffix, array in expected.items():
            if wrong := np.count_nonzero(array.view(np.uint8) != found[suffix].view(np.uint8)):
                raise OmniConvertError(
                    f"--device {device}: computes otherwise than the CPU: in a trial of {format_label(fmt)} "
                    f"{wrong} of {array.nbytes} bytes of {suffix} differ, and so would the result. {INSTEAD}"
                )


def _tensors(worker: Worker, fmt: Format, bits: NDArray[Any], dtype: str) -> dict[str, NDArray[Any]]:
    """What a worker makes of a weight, without what is known before."""
    specs = {suffix: spec for suffix, spec in fmt.tensors(bits.shape).items() if suffix not in fmt.whole_suffixes}
    out = {suffix: np.zeros(spec.shape, OUTPUT_DTYPE[spec.dtype]) for suffix, spec in specs.items()}
    facts = Facts(amax=float(row_maxima(bits, dtype).max()), input_scale=1.0)
    worker.quantize_rows(fmt, bits, dtype, out, None, facts)
    worker.close()
    return out


def _every_bfloat16() -> NDArray[np.uint16]:
    """(510, 128): all finite patterns, every row of like magnitudes."""
    patterns = np.arange(0x7F80, dtype=np.uint16)
    return np.concatenate([patterns, patterns | np.uint16(0x8000)]).reshape(-1, 128)


def _close_to_ties() -> NDArray[np.uint32]:
    """(256, 704) float32: int8 and e4m3 round them up or down for one unit in the last place of a quotient."""
    fractions = np.concatenate([np.arange(255) / 254, np.arange(449) / 448]).astype(np.float32)
    largest = np.random.default_rng(0).uniform(0.125, 8, (256, 1)).astype(np.float32)
    return (largest * fractions).view(np.uint32)
