"""Convert BF16 checkpoints once into quantized checkpoints, and run them.

    import omni_convert

    omni_convert.convert("model/", "out/", method="int8", ignore=["img_mlp"])
    pipe = omni_convert.load("out/")
    pipe = omni_convert.load("model/", quantization="int8")

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
    from torch import nn
    from typing_extensions import Unpack

    from omni_convert.comparing import compare
    from omni_convert.converter.analyze import analyze
    from omni_convert.converter.convert import convert, plan
    from omni_convert.converter.inspect import inspect
    from omni_convert.converter.recipe import Choices
    from omni_convert.converter.verify import verify
    from omni_convert.formats.quant_config import Spec, build_quant_config
    from omni_convert.hub.push import push
    from omni_convert.hub.transfer import convert_to_hub
    from omni_convert.quality.report import report
    from omni_convert.runtime.describe import Description

__all__ = [
    "OmniConvertError",
    "UsageError",
    "__version__",
    "analyze",
    "build_quant_config",
    "compare",
    "convert",
    "convert_to_hub",
    "describe",
    "inspect",
    "load",
    "plan",
    "push",
    "quantize_",
    "report",
    "verify",
]

__version__ = "0.1.0"

_LAZY = {
    "analyze": "omni_convert.converter.analyze",
    "build_quant_config": "omni_convert.formats.quant_config",
    "compare": "omni_convert.comparing",
    "convert": "omni_convert.converter.convert",
    "plan": "omni_convert.converter.convert",
    "convert_to_hub": "omni_convert.hub.transfer",
    "push": "omni_convert.hub.push",
    "inspect": "omni_convert.converter.inspect",
    "report": "omni_convert.quality.report",
    "verify": "omni_convert.converter.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantization: Spec = None,
    tp_rank: int | None = None,
    tp_size: int | None = None,
    **choices: Unpack[Choices],
) -> Any:
    """Load a converted checkpoint, or a plain one that is quantized while it loads, to the same bits: a Diffusers
    pipeline or model, or a Transformers model, in eval mode.

    Args:
        path: folder with ``model_index.json`` (pipeline) or ``config.json`` (one model), or a repository on the Hub,
            ``org/name[@revision]``, of which what the model needs is downloaded into the Hub cache.
        device: where the model runs.
        dtype: of everything that is not quantized, and so of the activations. None keeps each component in the
            dtype that most of its unquantized weights have on disk.
        quantization: of a plain checkpoint, as ``convert`` takes it. None: what its ``quantization_config`` asks for,
            without the flag that says its weights are quantized already. ``mxfp4_dualscale`` leaves the leading blocks
            unquantized, as vLLM-Omni does online: ``num_bf16_fallback_layers``, by default 5.
        tp_rank, tp_size: which of how many processes this is, that run a model together (tensor parallelism); each
            reads and holds its part of what the model's plan splits. None: one process.
        choices: in place of ``quantization`` or beside it, as ``convert`` takes them.

    Raises:
        OmniConvertError: the folder is not a whole checkpoint, or it cannot run here. Says what was found, what was
            expected and what to do, before any weight is read; what the libraries load without complaint but should
            not (a tensor that the model lacks or does not know), before the model is returned.
    """
    from omni_convert.converter.hub_source import local_folder
    from omni_convert.runtime.load import asked_online
    from omni_convert.runtime.load import load as load_folder
    from omni_convert.runtime.parallel import parse_rank

    rank = parse_rank(tp_rank, tp_size)
    path = local_folder(path)
    asks = quantization is None and not {"method", "recipe", "components"} & choices.keys()
    if asks:
        quantization = asked_online(path)
    if quantization is not None or choices:
        from omni_convert.online import load_online

        try:
            return load_online(path, quantization, device=device, dtype=dtype, rank=rank, **choices)
        except UsageError as error:
            if not asks or quantization is None:
                raise
            raise UsageError(f"{path}: its quantization_config asks for what cannot be done. {error}") from error
    return load_folder(path, device=device, dtype=dtype, rank=rank)


def quantize_(model: nn.Module, quantization: Spec = None, **choices: Unpack[Choices]) -> nn.Module:
    """Quantize the linears of a model in memory, in place and layer by layer; returns the model.

    The tensors are those that a conversion of its checkpoint writes, if its modules have the checkpoint's names.

    Args:
        model: of plain weights in bf16, fp16 or fp32, on any device.
        quantization: as ``convert`` takes it.
        choices: in place of ``quantization`` or beside it, as ``convert`` takes them.

    Raises:
        OmniConvertError: nothing to quantize, a layer that is quantized already, NaN or Inf in a weight. Found before
            any layer is replaced.
    """
    from omni_convert.online import quantize_ as quantize_model

    return quantize_model(model, quantization, **choices)


def describe(model: Any) -> Description:
    """What runs in a loaded model or pipeline: every quantized layer's format, kernel, why, and bytes.

    ``print`` shows a table; ``to_dict()`` is for scripts.

    Raises:
        OmniConvertError: neither a model nor a pipeline, or a layer on a device that cannot run it.
    """
    from omni_convert.runtime.describe import describe as describe_model

    return describe_model(model)


register_plugins()
