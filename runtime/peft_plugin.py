"""Tells PEFT what the weight of a quantized layer is, and that nothing can be merged into it; see ``register``.

PEFT attaches to a quantized layer as to any ``nn.Linear``, but then takes the codes for a weight in two places: when it
merges an adapter (``safe_merge`` rounds what it adds to whole codes, without an error) and where it computes with the
weight (DoRA). It has no registration call; each of these places goes through one of its functions, which is replaced.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from peft.tuners import tuners_utils
from peft.utils import integrations
from torch import Tensor

from omni_convert.formats.errors import OmniConvertError
from omni_convert.runtime.linear import QuantizedLinear


def _refuse_merge(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Of the function that every adapter layer calls first when it merges."""

    @functools.wraps(theirs)
    def check_adapters_to_merge(module: Any, *args: Any, **kwargs: Any) -> Any:
        base = module.get_base_layer()
        if isinstance(base, QuantizedLinear):
            raise OmniConvertError(
                f"an adapter was to be merged into an {base.format.name} layer, whose weight is held as codes, "
                "expected a plain one. Keep the adapter beside it, or merge it into the BF16 model and convert that."
            )
        return theirs(module, *args, **kwargs)

    return check_adapters_to_merge


def _decode(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Of the function that gives adapters the weight of a quantized layer."""

    @functools.wraps(theirs)
    def dequantize_module_weight(module: Any) -> Any:
        if isinstance(module, QuantizedLinear):
            weight: Tensor = module.format.dequantize(module.tensors())
            return weight
        return theirs(module)

    return dequantize_module_weight


def _replace(home: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Wherever PEFT has imported it already; modules that it imports later find the new one at ``home``."""
    theirs = getattr(home, name)
    ours = wrap(theirs)
    for module in [module for key, module in sys.modules.items() if key.partition(".")[0] == "peft"]:
        if vars(module).get(name) is theirs:
            setattr(module, name, ours)


_replace(tuners_utils, "check_adapters_to_merge", _refuse_merge)
_replace(integrations, "dequantize_module_weight", _decode)
