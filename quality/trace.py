"""What each quantized layer does to real activations, alone.

The reference runs; wherever it calls a layer that the candidate has quantized, the candidate's layer gets the same
input, and their outputs are compared. So the error of a layer is its own, of its weights and activations, and none
that arrived from layers before it.
"""

from __future__ import annotations

import functools
import glob
import math
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from omni_convert.formats import format_label
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.text import layer_patterns
from omni_convert.quality.fused import Unit, own_pattern
from omni_convert.quality.generation import Ask
from omni_convert.quality.meter import freed_after
from omni_convert.quality.request import Request
from omni_convert.runtime.describe import all_modules
from omni_convert.runtime.linear import QuantizedLinear


@dataclass(kw_only=True)
class LayerTrace:
    """Sums of squares of a layer's output and of its error, over ``calls``. ``layer``: its name in the
    checkpoint, of a pipeline after that of its component. ``unit``: what it is quantized or kept with."""

    layer: str
    unit: Unit
    format: str
    calls: int = 0
    signal: float = 0.0
    noise: float = 0.0

    @property
    def relative_l2(self) -> float:
        """|error| / |output|; 0 if there is neither."""
        if not self.signal:
            return math.inf if self.noise else 0.0
        return math.sqrt(self.noise / self.signal)

    @property
    def sqnr_db(self) -> float:
        """10 log10 of signal over noise; infinite for an exact layer."""
        return 10 * math.log10(self.signal / self.noise) if self.noise and self.signal else math.inf

    def add(self, reference: Tensor, candidate: Tensor) -> None:
        """Outputs to the same input."""
        expected = reference.detach().float()
        self.calls += 1
        self.signal += float(expected.square().sum())
        self.noise += float((candidate.detach().float() - expected).square().sum())

    def to_dict(self) -> dict[str, Any]:
        numbers = {"relative_l2": self.relative_l2, "sqnr_db": self.sqnr_db}
        found = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        return {"layer": self.layer, "format": self.format, "calls": self.calls, **found}


def by_kind(layers: Sequence[LayerTrace]) -> list[tuple[LayerTrace, int]]:
    """The sums of layers whose names differ in their numbers only, under globs of these names, worst first; and how
    many they are."""
    patterns = layer_patterns([layer.layer for layer in layers])
    units = layer_patterns({layer.unit.name for layer in layers})
    kinds: dict[tuple[str, Unit, str], LayerTrace] = {}
    counts: dict[tuple[str, Unit, str], int] = defaultdict(int)
    for layer in layers:
        key = patterns[layer.layer], Unit(layer.unit.component, units[layer.unit.name]), layer.format
        kind = kinds.setdefault(key, LayerTrace(layer=key[0], unit=key[1], format=layer.format))
        kind.calls += layer.calls
        kind.signal += layer.signal
        kind.noise += layer.noise
        counts[key] += 1
    order = sorted(kinds, key=lambda key: (kinds[key].sqnr_db, key))
    return [(kinds[key], counts[key]) for key in order]


def keeping_lines(layers: Sequence[LayerTrace], most: int) -> list[str]:
    """The options that keep the ``most`` worst kinds of layers, each with all that the engine fuses with it."""
    kinds = [kind.unit for kind, _ in by_kind(layers) if kind.noise]
    return [f"--ignore {shlex.quote(_pattern(unit, layers))}" for unit in list(dict.fromkeys(kinds))[:most]]


def _pattern(kind: Unit, layers: Sequence[LayerTrace]) -> str:
    """What ``--ignore`` takes for all units of a kind."""
    prefix = f"{kind.component}." if kind.component else ""
    within = [layer for layer in layers if layer.unit.component == kind.component]
    if kind not in {layer.unit for layer in within}:  # but a glob of several
        return prefix + glob.escape(kind.name).replace("[*]", "*")
    others = [layer for layer in within if layer.unit != kind]
    return prefix + own_pattern(
        kind.name, (name for layer in others for name in (layer.layer.removeprefix(prefix), layer.unit.name))
    )


class Traced(NamedTuple):
    """A quantized layer. ``module``: the name of the module that it stands for."""

    module: str
    linear: QuantizedLinear


def quantized_layers(model: Any) -> dict[str, Traced]:
    """Of a model or pipeline, by the names of ``LayerTrace``, which are those of the checkpoint."""
    found = {}
    for name, module in all_modules(model).items():
        if isinstance(module, QuantizedLinear):
            component = "" if isinstance(model, nn.Module) else name.partition(".")[0]
            stored = ".".join(filter(None, (component, module.stored_name)))
            found[stored if module.stored_name else name] = Traced(name, module)
    return found


def trace(
    load: Callable[[], Any], layers: Mapping[str, Traced], units: Mapping[str, Unit], ask: Ask,
    request: Request, device: torch.device,
) -> tuple[LayerTrace, ...]:  # fmt: skip
    """Ask the reference that ``load`` loads; the layers that it called, worst first. ``units``: of every layer.

    Raises:
        OmniConvertError: it has no module of a layer's name.
    """
    with freed_after(device):
        traces = _trace(load(), layers, units, ask, request)
    return tuple(sorted((found for found in traces if found.calls), key=lambda found: (found.sqnr_db, found.layer)))


@torch.inference_mode()
def _trace(
    reference: Any, layers: Mapping[str, Traced], units: Mapping[str, Unit], ask: Ask, request: Request
) -> list[LayerTrace]:
    modules = all_modules(reference)
    if lost := [name for name, layer in layers.items() if layer.module not in modules]:
        raise OmniConvertError(
            f"the candidate has a quantized layer {lost[0]}, but the reference has no module of that name, expected "
            "two forms of one model. Compare a conversion with its source."
        )
    traces = {
        name: LayerTrace(layer=name, unit=units[name], format=format_label(layer.linear.format))
        for name, layer in layers.items()
    }
    hooks = {
        modules[layer.module]: functools.partial(_compare, layer.linear, traces[name]) for name, layer in layers.items()
    }
    with _hooks(hooks):
        for prompt in request.prompts:
            ask(reference, prompt, True)
    return list(traces.values())


def _compare(
    layer: QuantizedLinear,
    found: LayerTrace,
    _module: nn.Module,
    inputs: tuple[Any, ...],
    named: Mapping[str, Any],
    output: Any,
) -> None:
    found.add(output, layer(*inputs, **named))


@contextmanager
def _hooks(hooks: Mapping[nn.Module, Callable[..., None]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
