"""Teaches Transformers to load quantized checkpoints; registers itself once the library is imported."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from omni_convert.formats.base import Format
from omni_convert.formats.config import METHODS, MIXED, parse_config
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.header import TensorSpec
from omni_convert.runtime.component import check_flag, quantized_layers, read_tensors
from omni_convert.runtime.linear import QuantizedLinear
from omni_convert.runtime.names import register_names
from omni_convert.runtime.online import QUANTIZING, Online
from omni_convert.runtime.parallel import LOADING, Rank, Split, local_tensors
from omni_convert.runtime.replace import check_converted, check_loaded, check_names, check_shapes, replace_linears
from omni_convert.runtime.transformers_parallel import TakePart, part_conversions, split_model


class OmniConvertConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of ``config.json``, in the shape that Transformers wants.

    Of plain weights that ``load`` quantizes, what they become, whatever the file asks for.
    """

    def __init__(self, **data: Any) -> None:
        online = QUANTIZING.get()
        data = online.config.to_dict() if online else data
        self.quantization = parse_config(data)
        self.quant_method = MIXED  # chooses the quantizer; see ``names``
        self._data = data

    def to_dict(self) -> dict[str, Any]:
        """As it was read: engines spell names in ways that we do not."""
        return copy.deepcopy(self._data)


class OmniConvertQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces linears before the weights are streamed in; Transformers then casts to what the modules declare."""

    requires_calibration = False
    is_trainable = True  # adapters on top: gradients flow through the activations
    is_compileable = True

    def __init__(self, quantization_config: OmniConvertConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._online = QUANTIZING.get()
        self.pre_quantized: bool = self._online is None and kwargs.get("pre_quantized", True)
        self._replaced: dict[str, str] = {}
        self._rank, self._splits = LOADING.get(), dict[str, Split]()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise OmniConvertError(
                "device_map places layers on disk, expected CPU or GPU: Transformers cannot offload integer weights "
                "there. Use more memory, or a device_map of CPU and GPU."
            )
        check_converted(self.pre_quantized, self._online)

    def is_serializable(self) -> bool:
        return not self._splits  # a part is no model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """What a tensor is cast to while it is read: codes to nothing, also where the model keeps a layer in fp32.
        A cast reads all of it, so parts are cast when they have been cut."""
        kept = None if param.get_dtype() == "F8_E4M3" else super().get_new_dtype(converter, param, dtype)
        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, TakePart):
                operation.dtype, kept = kept, None
        return kept

    def update_weight_conversions(self, weight_conversions: Sequence[Any], model: nn.Module) -> list[Any]:
        rules = super().update_weight_conversions(weight_conversions, model)
        if not self._rank or not self._splits:
            return list(rules)
        made = {f"{layer}.weight" for layer in self._replaced} if self._online else set()
        stored = {name: split for name, split in self._splits.items() if name not in made}
        return part_conversions(rules, stored, self._rank)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
        """What ``save_pretrained`` writes: codes in the dtype that they have on disk."""
        from accelerate.utils import align_module_device

        state = model.state_dict()
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                # Transformers fetches what is offloaded only when it writes, too late to say what the bytes are.
                with align_module_device(module, torch.device("cpu") if module.weight.is_meta else None):
                    state[f"{name}.weight"] = module.tensors()["weight"]
        return state, {}

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        files = [Path(file) for file in checkpoint_files or ()]
        if not files or any(file.suffix != ".safetensors" for file in files):
            names = ", ".join(file.name for file in files) or "a state dict"
            raise OmniConvertError(
                f"{type(model).__name__}: the weights come from {names}, expected safetensors files. "
                "Convert the checkpoint again and load its folder."
            )
        config = self.quantization_config.quantization
        tensors = read_tensors(files)
        layers = self._online.layers if self._online else quantized_layers(tensors, config, type(model).__name__)
        self._replaced = replace_linears(model, tensors, config, _module_names(model, layers), self._online)
        if self._rank:
            self._split(model, tensors, self._rank)
        if _is_of_checkpoint(model):
            _refuse_names(model, self._online is None)

    def _split(self, model: nn.Module, tensors: Mapping[str, TensorSpec], rank: Rank) -> None:
        names = _renamed(model, tensors)
        check_shapes(model, {name: tensors[stored].shape for stored, (name, rule) in names.items() if not rule})
        self._splits = split_model(model, rank, {name: rule for name, rule in names.values() if rule})

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        layer, _, suffix = param_name.rpartition(".")
        return self._online is not None and suffix == "weight" and layer in self._replaced

    def get_quantize_ops(self) -> ConversionOps:
        assert self._online is not None
        return _Quantize(self._online, self._replaced, self._part)

    def _part(self, layer: str, fmt: Format, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What a rank holds of the tensors of a quantized layer."""
        split = self._splits.get(f"{layer}.weight")
        return local_tensors(fmt, tensors, split, self._rank) if self._rank and split else tensors

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        check_loaded(model, self._replaced)
        self._online = None


class _Quantize(ConversionOps):  # type: ignore[misc]
    """Puts the tensors of a quantized layer in the place of its plain weight, which Transformers may have cast."""

    def __init__(self, online: Online, layers: Mapping[str, str], part: Callable[..., Mapping[str, Tensor]]) -> None:
        self._online = online
        self._layers = layers
        self._part = part

    def convert(
        self, input_dict: Mapping[str, Any], *args: Any, full_layer_name: str, missing_keys: set[str], **kwargs: Any
    ) -> dict[str, Any]:
        layer = full_layer_name.removesuffix(".weight")
        weight = next(iter(input_dict.values()))
        device = (weight[0] if isinstance(weight, list) else weight).device
        stored = self._layers[layer]
        found = self._part(layer, self._online.layers[stored].format, self._online.tensors(stored))
        return {f"{layer}.{suffix}": tensor.to(device) for suffix, tensor in found.items()}


def _module_names(model: Any, layers: Collection[str]) -> dict[str, str | None]:
    """Checkpoint layer -> module name, by the renaming rules that Transformers will apply when it loads.

    None for a layer that the model leaves out by design: a head of the checkpoint when the base model is loaded.
    """
    state = dict(model.named_parameters(remove_duplicate=False))
    names: dict[str, str | None] = {}
    for weight, (renamed, rule) in _renamed(model, [f"{layer}.weight" for layer in layers]).items():
        layer = weight.removesuffix(".weight")
        if rule is not None:
            raise OmniConvertError(
                f"{type(model).__name__}: Transformers merges or splits {weight} when it loads "
                f"({rule.source_patterns[0]}), expected a weight that is loaded as it is. Convert again with "
                f"--ignore {layer}, or a pattern for all like it."
            )
        skipped = renamed not in state and _is_left_out(model, layer)
        names[layer] = None if skipped else renamed.removesuffix(".weight")
    return names


def _renamed(model: Any, stored: Iterable[str]) -> dict[str, tuple[str, Any]]:
    """Tensor of the checkpoint -> its name in the model, by the rules that Transformers will apply when it loads, and
    the one that merges or splits it, or None."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix, state = model.base_model_prefix, model.state_dict()
    names: dict[str, tuple[str, Any]] = {}
    for name in stored:
        renamed, merged = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, merged = rename_source_key(name, [], [], prefix, state)
        names[name] = renamed, by_pattern.get(merged)
    return names


def _is_left_out(model: Any, layer: str) -> bool:
    """Another class than the checkpoint's may lack some of its layers; Transformers lists them when it loads."""
    if any(re.search(pattern, f"{layer}.weight") for pattern in model._keys_to_ignore_on_load_unexpected or ()):
        return True
    return not _is_of_checkpoint(model)


def _is_of_checkpoint(model: Any) -> bool:
    """Whether the checkpoint is of this class, and not of one with other heads."""
    architectures = model.config.architectures or ()
    return not architectures or type(model).__name__ in architectures


def _refuse_names(model: Any, is_converted: bool) -> None:
    """Have ``check_names`` see what Transformers would only report. It tells no quantizer, but asks the model which of
    those names are fine. ``is_converted``: what is unexpected in a plain checkpoint is the library's business."""
    theirs = model._adjust_missing_and_unexpected_keys

    def adjust_and_check(info: Any) -> None:
        del model._adjust_missing_and_unexpected_keys
        theirs(info)
        where, shapes = type(model).__name__, {name: found for name, found, _ in info.mismatched_keys}
        info.mismatched_keys = set()  # its own error, which comes after, names none
        check_shapes(model, shapes)
        check_names(where, info.missing_keys, info.unexpected_keys if is_converted else ())

    model._adjust_missing_and_unexpected_keys = adjust_and_check


def announce(model: Any, config: Mapping[str, Any]) -> None:
    """Tell a model that it was quantized in memory, so that it saves ``config`` too and refuses casts."""
    model.hf_quantizer = OmniConvertQuantizer(OmniConvertConfig(**config))
    model.is_quantized, model.quantization_method = True, MIXED
    model.config.quantization_config = model.hf_quantizer.quantization_config


def _refusing_codes(theirs: Any) -> type:
    """A quantizer of Transformers, which gets configs without our flag, except that it refuses codes of ours."""

    @functools.wraps(theirs, updated=())
    class Refusing(theirs):  # type: ignore[misc]
        def preprocess_model(self, model: Any, **kwargs: Any) -> None:
            files = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
            check_flag([file for file in files if file.suffix == ".safetensors"])
            super().preprocess_model(model, **kwargs)

    return Refusing


register_names(auto, OmniConvertQuantizer, OmniConvertConfig)
for method, quantizer in auto.AUTO_QUANTIZER_MAPPING.items():
    if method in METHODS and quantizer is not OmniConvertQuantizer:
        auto.AUTO_QUANTIZER_MAPPING[method] = _refusing_codes(quantizer)
