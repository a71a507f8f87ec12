"""Keeps the libraries from saving codes without a config that fits: a part of a model can be quantized in memory, and
the whole does not know."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from omni_convert.formats.errors import OmniConvertError
from omni_convert.runtime.linear import QuantizedLinear

_OWNERS = {"diffusers.models.modeling_utils": "ModelMixin", "transformers.modeling_utils": "PreTrainedModel"}
_guarded: set[str] = set()


def guard_saving() -> None:
    """Have ``save_pretrained`` of libraries that are imported check first. Calling it again changes nothing."""
    for module, name in _OWNERS.items():
        if module in sys.modules and module not in _guarded:
            owner: Any = getattr(sys.modules[module], name)
            owner.save_pretrained = _check_first(owner.save_pretrained)
            _guarded.add(module)


def _check_first(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        _check_announced(self)
        return theirs(self, *args, **kwargs)

    return save_pretrained


def _check_announced(model: Any) -> None:
    """Raises:
    OmniConvertError: a layer has a format that the model's config does not announce.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    config = getattr(getattr(quantizer, "quantization_config", None), "quantization", None)
    announced = [fmt.config(()) for fmt in config.formats] if config else []
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear) and layer.format.config(()) not in announced:
            raise OmniConvertError(
                f"{type(model).__name__}: layer {name} is {layer.format.name}, which the model's config does not "
                "announce, expected quantize_ to have been given the whole model: nobody could read what is saved. "
                "Quantize the whole, and name what is to stay (ignored_layers)."
            )
