"""The names of our formats in the two mappings by which Diffusers and Transformers find quantizers.

Some names are theirs too (``fp8`` and ``mxfp4`` in Transformers, ``modelopt`` in Diffusers), for other tensors. There
a config decides: one that we wrote goes to our quantizer, any other to the library's own, as before. A name that a
library does not have is ours alone there: of configs that we did not write, ``parse_config`` says so.
"""

from __future__ import annotations

import functools
from typing import Any

from omni_convert.formats.config import METHODS, MIXED, is_ours
from omni_convert.runtime.online import QUANTIZING


def register_names(library: Any, quantizer: type, config: type) -> None:
    """Enter the mappings of a library's module ``quantizers.auto``. ``quantizer``, ``config``: ours."""
    quantizers, configs = library.AUTO_QUANTIZER_MAPPING, library.AUTO_QUANTIZATION_CONFIG_MAPPING
    quantizers[MIXED], configs[MIXED] = quantizer, config
    for method in METHODS:
        theirs = configs.get(method)
        if theirs is config:
            continue
        if theirs is None:
            quantizers.setdefault(method, quantizer)
            configs[method] = config
        else:
            configs[method] = _either(config, theirs)


def _either(ours: Any, theirs: Any) -> type:
    """The library's own config class, except that it reads our configs as ``ours``."""

    @functools.wraps(theirs, updated=())
    class Either(theirs):  # type: ignore[misc]
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return theirs(*args, **kwargs)

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            chosen = ours if QUANTIZING.get() or is_ours(config_dict) else theirs
            return chosen.from_dict(config_dict, *args, **kwargs)

    return Either
