"""What kernels make of a layer's tensors before its first call: packed weights, swizzled scales.

Such a tensor may be opaque: it can then be neither copied, pickled, moved nor traced. It therefore never touches a
module. It lives in a table here, behind an operator that is given a number (``new_handle``). It is made at the first
call, and again whenever a tensor that it was made from is replaced or overwritten.
"""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class _Source(NamedTuple):
    """Which tensor it was, and in what state."""

    storage: StorageWeakRef  # keeps the address of the storage from being reused, not the storage alive
    address: int
    version: int


class _Prepared(NamedTuple):
    sources: Sequence[_Source]
    value: Any


_TABLE: dict[int, _Prepared] = {}
_LOCKS: defaultdict[int, Lock] = defaultdict(Lock)
_NUMBERS = itertools.count()
_ORIGINAL = "_omni_convert_original"


def new_handle(owner: object) -> Tensor:
    """A number for what is prepared for ``owner``, and is freed with it. 0-d int64 on the CPU.

    A tensor and not an int: ``torch.compile`` would specialize on an int and compile every layer anew.
    """
    number = next(_NUMBERS)
    for table in (_TABLE, _LOCKS):
        weakref.finalize(owner, table.pop, number, None).atexit = False
    with torch.inference_mode(False):
        return torch.tensor(number, dtype=torch.int64, device="cpu")


def release(handle: Tensor) -> None:
    """Free what is prepared for ``handle``; the next call makes it again."""
    _TABLE.pop(int(handle), None)


def prepared(handle: Tensor, sources: Sequence[Tensor], make: Callable[[], Any]) -> Any:
    """``make()``, once for these ``sources`` in this state, however many threads ask."""
    number = int(handle)
    wanted = [_source(tensor) for tensor in sources]
    found = _TABLE.get(number)
    if found is None or found.sources != wanted:
        with _LOCKS[number]:
            found = _TABLE.get(number)
            if found is None or found.sources != wanted:
                _drop_orphans()
                found = _TABLE[number] = _Prepared(wanted, make())
    return found.value


def _drop_orphans() -> None:
    """Free what was made of tensors that are gone: offloading takes them from a layer without telling it."""
    for number, entry in list(_TABLE.items()):
        if any(source.storage.expired() for source in entry.sources):  # type: ignore[no-untyped-call]
            _TABLE.pop(number, None)


def reinterpreted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in a dtype of the same size, and still the same source to ``prepared``.

    Inside operators, and in inference mode, a view is not told what is written into its tensor.
    """
    view = tensor.view(dtype)
    setattr(view, _ORIGINAL, tensor)
    return view


def prepared_bytes(handle: Tensor) -> int:
    """Memory that a layer takes now beside its own tensors; of opaque tensors what the plain ones would."""
    found = _TABLE.get(int(handle))
    if found is None:
        return 0
    parts = found.value if isinstance(found.value, tuple) else (found.value,)
    return sum(part.numel() * part.element_size() for part in parts if isinstance(part, Tensor))


def _source(tensor: Tensor) -> _Source:
    tensor = getattr(tensor, _ORIGINAL, tensor)
    return _Source(
        storage=StorageWeakRef(tensor.untyped_storage()),  # type: ignore[no-untyped-call]
        address=tensor.data_ptr(),
        # Tensors made in inference mode have no version; overwriting those in place goes unnoticed, as does what is
        # written past the version of any tensor (``weight.data.zero_()``).
        version=-1 if tensor.is_inference() else tensor._version,
    )
