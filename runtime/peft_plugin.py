"""Tells PEFT what the weight of a quantized layer is, and that nothing can be merged into it; see ``register``.

PEFT attaches to a quantized layer as to any ``nn.Linear``, but then takes the codes for a weight: when it merges an
adapter (``safe_merge`` rounds what it adds to whole codes, without an error), where it computes with the weight (DoRA),
and in methods that multiply it (OFT, BOFT, HRA), which are refused. It has no registration call; each of these places
goes through one of its functions, which is replaced.
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
from omni_convert.runtime.parallel import is_part

METHODS = ("LORA", "ADALORA", "IA3")
"""Adapters that are tested here; others may read the weight."""


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


def _refuse_methods(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Of the method that puts adapters into a model."""

    @functools.wraps(theirs)
    def inject_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        create = self._create_and_replace

        def check_and_create(config: Any, name: str, target: Any, *more: Any, **options: Any) -> Any:
            _check_method(config, target.get_base_layer() if hasattr(target, "get_base_layer") else target)
            return create(config, name, target, *more, **options)

        self._create_and_replace = check_and_create
        try:
            return theirs(self, *args, **kwargs)
        finally:
            del self._create_and_replace

    return inject_adapter


def _check_method(config: Any, base: object) -> None:
    """Raises:
    OmniConvertError: ``base`` is a quantized layer, or one process' part of a layer, to which this does not apply.
    """
    if is_part(base):
        raise OmniConvertError(
            "an adapter was to be attached to a layer of which this process holds a part (tp_size), expected a whole "
            "one: the results of the parts would not be added up. Load the model on one device."
        )
    method = str(getattr(config.peft_type, "value", config.peft_type))
    if isinstance(base, QuantizedLinear) and method not in METHODS:
        raise OmniConvertError(
            f"a {method} adapter was to be attached to an {base.format.name} layer, whose weight is held as codes, "
            f"expected one of {', '.join(METHODS)}, which leave the weight alone. Use one of these, or a BF16 model."
        )


def _replace(home: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Wherever PEFT has imported it already; modules that it imports later find the new one at ``home``."""
    theirs = getattr(home, name)
    ours = wrap(theirs)
    for module in [module for key, module in sys.modules.items() if key.partition(".")[0] == "peft"]:
        if vars(module).get(name) is theirs:
            setattr(module, name, ours)


_replace(tuners_utils, "check_adapters_to_merge", _refuse_merge)
_replace(integrations, "dequantize_module_weight", _decode)
tuners_utils.BaseTuner.inject_adapter = _refuse_methods(tuners_utils.BaseTuner.inject_adapter)
