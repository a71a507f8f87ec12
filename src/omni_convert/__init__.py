"""Convert BF16 checkpoints once into quantized checkpoints, and run them.

    import omni_convert

    omni_convert.convert("model/", "out/", method="int8", ignore=["img_mlp"])
    pipe = omni_convert.load("out/")

``from_pretrained`` of Diffusers and Transformers loads the same folders once this package is imported. Importing it
imports neither of them, nor PyTorch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from omni_convert.formats.errors import OmniConvertError, UsageError
from omni_convert.runtime.register import register_plugins

if TYPE_CHECKING:
    import torch

    from omni_convert.converter.convert import convert, plan
    from omni_convert.converter.inspect import inspect
    from omni_convert.converter.verify import verify
    from omni_convert.formats.quant_config import build_quant_config

__all__ = [
    "OmniConvertError",
    "UsageError",
    "__version__",
    "build_quant_config",
    "convert",
    "inspect",
    "load",
    "plan",
    "verify",
]

__version__ = "0.1.0"

_LAZY = {
    "build_quant_config": "omni_convert.formats.quant_config",
    "convert": "omni_convert.converter.convert",
    "plan": "omni_convert.converter.convert",
    "inspect": "omni_convert.converter.inspect",
    "verify": "omni_convert.converter.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def load(path: str | os.PathLike[str], *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Any:
    """Load a converted checkpoint: a Diffusers pipeline or model, or a Transformers model, in eval mode.

    Args:
        path: folder with ``model_index.json`` (pipeline) or ``config.json`` (one model).
        device: where the model runs.
        dtype: of everything that is not quantized, and so of the activations. None keeps each component in the
            dtype that most of its unquantized weights have on disk.

    Raises:
        OmniConvertError: the folder is not a whole quantized checkpoint, or it cannot run here. Says what was found,
            what was expected and what to do, before any model is built.
    """
    from omni_convert.runtime.load import load as load_folder

    return load_folder(path, device=device, dtype=dtype)


register_plugins()
