"""What runs in a quantized model: every layer's format, kernel, the reasons for it, and memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from omni_convert.formats import format_label
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.text import format_bytes, format_table, layer_patterns
from omni_convert.runtime.kernels import choose, device_of
from omni_convert.runtime.linear import QuantizedLinear
from omni_convert.runtime.prepared import prepared_bytes


@dataclass(frozen=True, kw_only=True)
class LayerDescription:
    """One quantized layer. ``shape``: (N, K). ``kernel``: None on a device that runs nothing, such as meta.

    ``why``: what to know of the kernel. ``rejected``: kernels that would be preferred -> why they cannot run.
    ``stored_bytes``: of its tensors. ``prepared_bytes``: what its kernel holds beside them since the first call.
    """

    name: str
    format: str
    shape: tuple[int, int]
    device: str
    kernel: str | None
    why: str
    rejected: Mapping[str, str]
    stored_bytes: int
    prepared_bytes: int


@dataclass(frozen=True, kw_only=True)
class Description:
    """``str`` is a table for people, ``to_dict`` is for scripts. ``other_bytes``: of all that is not quantized."""

    layers: tuple[LayerDescription, ...]
    other_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {"layers": [asdict(layer) for layer in self.layers], "other_bytes": self.other_bytes}

    def __str__(self) -> str:
        if not self.layers:
            return "no quantized layers"
        quantized = sum(layer.stored_bytes + layer.prepared_bytes for layer in self.layers)
        total = f"{len(self.layers)} quantized layers, {format_bytes(quantized)}"
        table = format_table([("layers", "count", "format", "N x K", "kernel", "bytes"), *self._rows()], right=(1, 5))
        return "\n".join([table, "", f"{total}; all else {format_bytes(self.other_bytes)}", *self._reasons()])

    def _rows(self) -> Iterator[tuple[str, ...]]:
        """A row for all layers of a name, but for its numbers, that are alike."""
        patterns = layer_patterns([layer.name for layer in self.layers])
        alike: dict[tuple[str, ...], list[LayerDescription]] = defaultdict(list)
        for layer in self.layers:
            rows, columns = layer.shape
            key = (patterns[layer.name], layer.format, f"{rows} x {columns}", f"{layer.kernel} ({layer.device})")
            alike[key].append(layer)
        for (name, fmt, shape, kernel), layers in alike.items():
            size = sum(layer.stored_bytes + layer.prepared_bytes for layer in layers)
            yield name, str(len(layers)), fmt, shape, kernel, format_bytes(size)

    def _reasons(self) -> Iterator[str]:
        notes = dict.fromkeys(f"{layer.kernel}: {layer.why}" for layer in self.layers if layer.why)
        rejected: dict[tuple[str, str], int] = defaultdict(int)
        for layer in self.layers:
            for kernel, reason in layer.rejected.items():
                rejected[kernel, reason] += 1
        yield from notes
        for (kernel, reason), count in rejected.items():
            yield f"not {kernel} for {count} layers: {reason}"


def describe(model: nn.Module) -> Description:
    """See ``omni_convert.describe``."""
    layers = []
    held = 0
    for name, module in all_modules(model).items():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        size = sum(tensor.numel() * tensor.element_size() for tensor in own)
        if isinstance(module, QuantizedLinear):
            layers.append(_layer(name, module, size))
        else:
            held += size
    return Description(layers=tuple(layers), other_bytes=held)


def all_modules(model: Any) -> dict[str, nn.Module]:
    """Of a model by their names, of a pipeline after the names of its components.

    Raises:
        OmniConvertError: neither a model nor a pipeline.
    """
    return {name: part for part_name, part in _parts(model) for name, part in _named(part_name, part)}


def _parts(model: Any) -> list[tuple[str, nn.Module]]:
    """A model, or the models of a pipeline."""
    if isinstance(model, nn.Module):
        return [("", model)]
    components = getattr(model, "components", None)
    if not isinstance(components, Mapping):
        raise OmniConvertError(f"found a {type(model).__name__}, expected a model or a Diffusers pipeline to describe.")
    return [(name, part) for name, part in components.items() if isinstance(part, nn.Module)]


def _named(prefix: str, part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in part.named_modules():
        yield ".".join(filter(None, (prefix, name))), module


def _layer(name: str, module: QuantizedLinear, size: int) -> LayerDescription:
    shape, device = (module.out_features, module.in_features), module.weight.device
    choice = None if device.type == "meta" else choose(module.format, shape, device_of(device))
    return LayerDescription(
        name=name,
        format=format_label(module.format),
        shape=shape,
        device=str(device),
        kernel=choice.kernel.name if choice else None,
        why=choice.kernel.note if choice else "",
        rejected=choice.rejected if choice else {},
        stored_bytes=size,
        prepared_bytes=prepared_bytes(module._handle),
    )
