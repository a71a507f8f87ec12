"""How much every method would cost every layer, and which layers to keep: from one pass over the source."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni_convert.converter import convert
from omni_convert.converter.choice import Alternatives, Choice, check_conditions
from omni_convert.converter.choose import Conditions, parse_conditions
from omni_convert.converter.execute import DEFAULT_MEMORY, Settings, shrink
from omni_convert.converter.files import processors
from omni_convert.converter.hub_source import fetching, naming, open_source
from omni_convert.converter.measure import Errors, measure, memory_bytes, weight_bytes
from omni_convert.converter.pieces import PIECE_BYTES
from omni_convert.converter.plan import Plan, make_plan
from omni_convert.converter.progress import progress_bar
from omni_convert.converter.recipe import Choices, make_recipe
from omni_convert.formats.errors import OmniConvertError, UsageError
from omni_convert.formats.quant_config import Spec, method_text
from omni_convert.formats.text import finite, mean_db

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT_METHODS = ("int8", "fp8", "mxfp8", "mxfp4")


@dataclass(frozen=True, kw_only=True)
class AnalyzedLayer:
    """``sqnr_db``: by method, of those that would quantize the layer; infinite where nothing is lost."""

    component: str
    layer: str
    shape: tuple[int, ...]
    sqnr_db: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What each of ``methods`` would do: ``plans`` and the ``errors`` of their layers, in the order of the methods.

    ``refused``: methods that the target cannot load, and why.
    """

    name: str
    methods: tuple[str, ...]
    plans: tuple[Plan, ...]
    errors: tuple[Errors, ...]
    refused: Mapping[str, str]
    seconds: float

    @cached_property
    def layers(self) -> list[AnalyzedLayer]:
        """Every layer that some method would quantize; first what is furthest below the means of its methods."""
        found = []
        for parts in zip(*(plan.components for plan in self.plans), strict=True):
            for tensors in zip(*(part.tensors() for part in parts), strict=True):
                key = (parts[0].component.name, tensors[0].layer)
                sqnr = {
                    method: errors[key].sqnr_db
                    for method, errors, tensor in zip(self.methods, self.errors, tensors, strict=True)
                    if tensor.decision.format
                }
                if sqnr:
                    shape = tensors[0].source.spec.shape
                    found.append(AnalyzedLayer(component=key[0], layer=key[1], shape=shape, sqnr_db=sqnr))
        means = {method: self.mean_sqnr_db(number) for number, method in enumerate(self.methods)}

        def lead(item: AnalyzedLayer) -> float:
            leads = [value - means[method] for method, value in item.sqnr_db.items() if math.isfinite(value)]
            return math.fsum(leads) / len(leads) if leads else math.inf

        return sorted(found, key=lambda item: (lead(item), item.component, item.layer))

    def mean_sqnr_db(self, number: int) -> float:
        """Of the method of that number, over the layers that lose anything."""
        return mean_db(error.sqnr_db for error in self.errors[number].values())

    def title(self, component: str, layer: str) -> str:
        """A layer as reports name it."""
        return f"{component}.{layer}" if len(self.plans[0].components) > 1 else layer

    @cached_property
    def alternatives(self) -> Alternatives:
        """What may be chosen from."""
        return Alternatives(self.methods, self.plans, self.errors)

    def curve(self, points: int = 20) -> list[Choice]:
        """The best choices within shares of the source's bytes, evenly from the smallest possible up to 1; none where
        no method makes it smaller."""
        smallest = Fraction(self.alternatives.smallest, self.plans[0].bytes_before)
        if smallest >= 1:
            return []
        shares = (smallest + (1 - smallest) * place / points for place in range(points))
        return [self.alternatives.choose(Conditions(size=share)) for share in shares]

    def choose(self, *, auto_ignore: str | None = None, budget: str | None = None) -> Choice:
        """Which layers to keep, or, for a target that mixes methods, the method of every layer.

        Args:
            auto_ignore: ``sqnr>=DECIBELS``, of every quantized layer.
            budget: ``size<=SHARE`` of the source's tensor bytes in the quantized components.

        Raises:
            UsageError: neither, another spelling, or no choice that holds them.
        """
        conditions = parse_conditions(auto_ignore, budget)
        if conditions is None:
            raise UsageError("found no condition, expected --auto-ignore, --budget or both.")
        choice = self.alternatives.choose(conditions)
        assert choice.plan  # what its recipe cannot say is said now
        return choice

    def to_dict(self) -> dict[str, Any]:
        methods = {
            method: {
                "mean_sqnr_db": finite(self.mean_sqnr_db(number)),
                "layers": len(self.errors[number]),
                "bytes_after": plan.bytes_after,
                "size": round(plan.bytes_after / plan.bytes_before, 6),
            }
            for number, (method, plan) in enumerate(zip(self.methods, self.plans, strict=True))
        }
        layers = [
            {
                "component": item.component,
                "layer": item.layer,
                "shape": list(item.shape),
                "sqnr_db": {method: finite(value) for method, value in item.sqnr_db.items()},
            }
            for item in self.layers
        ]
        return {
            "model": self.name,
            "target": self.plans[0].recipe.target,
            "bytes_before": self.plans[0].bytes_before,
            "seconds": round(self.seconds, 3),
            "methods": methods,
            "refused": dict(self.refused),
            "layers": layers,
        }


def analyze(
    source: str | os.PathLike[str],
    methods: Sequence[str] = (),
    quantization: Spec = None,
    *,
    auto_ignore: str | None = None,
    budget: str | None = None,
    threads: int | None = None,
    memory: int | None = None,
    progress: bool = False,
    **choices: Unpack[Choices],
) -> Analysis:
    """Measure what several methods would do to every layer of a checkpoint, without converting it.

    The source's weights are read once, those with which others share a scale twice. SQNRs are those that ``convert``
    reports.

    Args:
        source: as ``convert`` takes it; never written to.
        methods: as ``formats.quant_config.parse_method`` reads them: ``fp8``, ``fp8:channel``, ``mxfp4:balanced``;
            by default ``DEFAULT_METHODS``, without those that the target cannot load.
        quantization: in place of ``methods``, as ``convert`` takes it.
        auto_ignore, budget: what ``Analysis.choose`` will be asked for: what is wrong with them is said before any
            weight is read, as far as headers tell.
        threads: default: the processors this process may use.
        memory: bytes that this may take beyond the libraries; default 400 MiB.
        progress: show a progress bar on stderr (if it is a terminal).
        choices: as ``convert`` takes them; with ``method`` or ``recipe`` in place of ``methods``.

    Raises:
        OmniConvertError: names what is wrong and what to do.
    """
    conditions = parse_conditions(auto_ignore, budget)
    return _analyze(source, methods, quantization, conditions, threads, memory, None, progress, choices)


def _analyze(
    source: str | os.PathLike[str], methods: Sequence[str], quantization: Spec, conditions: Conditions | None,
    threads: int | None, memory: int | None, scratch: Path | None, progress: bool, choices: Choices,
) -> Analysis:  # fmt: skip
    started = time.perf_counter()
    found, refused = _plans(source, methods, quantization, choices)
    plans = tuple(found.values())
    if conditions:
        check_conditions(tuple(found), plans, conditions)
    settings = _settings(plans, threads, memory)
    checkpoint = plans[0].checkpoint
    if checkpoint.hub:
        checkpoint.hub.prepare(scratch, (), compares=False)
    with (
        naming(checkpoint),
        fetching(checkpoint, list(plans[0].shards), show=progress),
        progress_bar("analyze", weight_bytes(plans), show=progress) as advance,
    ):
        errors = measure(plans, settings, advance)
    return Analysis(
        name=checkpoint.name,
        methods=tuple(found),
        plans=plans,
        errors=tuple(errors),
        refused=refused,
        seconds=time.perf_counter() - started,
    )


def choose(
    source: str | os.PathLike[str],
    quantization: Spec = None,
    *,
    methods: Sequence[str] = (),
    auto_ignore: str | None = None,
    budget: str | None = None,
    threads: int | None = None,
    memory: int | None = None,
    scratch: Path | None = None,
    progress: bool = False,
    **choices: Unpack[Choices],
) -> Choice:
    """``analyze`` for a conversion, then ``Analysis.choose``; what is wrong with the conditions is found before.

    ``scratch``: where downloads are kept until their layers are measured; None for the Hub cache.
    """
    conditions = parse_conditions(auto_ignore, budget)
    if conditions is None:
        raise UsageError("--methods is what to choose from, expected --auto-ignore or --budget beside it.")
    if not methods:
        make_recipe(quantization=quantization, **choices)  # a conversion has no methods by default
    found = _analyze(source, methods, quantization, conditions, threads, memory, scratch, progress, choices)
    return found.choose(auto_ignore=auto_ignore, budget=budget)


def chosen_plan(
    source: str | os.PathLike[str], quantization: Spec, methods: Sequence[str], auto_ignore: str | None,
    budget: str | None, choices: Choices, **means: Any,
) -> Plan:  # fmt: skip
    """The plan of a conversion: by ``choose``, which takes ``means``, if there is something to choose, else from
    headers alone."""
    if methods or auto_ignore is not None or budget is not None:
        return choose(
            source, quantization, methods=methods, auto_ignore=auto_ignore, budget=budget, **means, **choices
        ).plan
    return convert.plan(source, quantization, **choices)


def _settings(plans: Sequence[Plan], threads: int | None, memory: int | None) -> Settings:
    """Within the memory.

    Raises:
        UsageError: one thread needs more.
    """

    def need(settings: Settings) -> int:
        return memory_bytes(plans, settings)

    allowed = DEFAULT_MEMORY if memory is None else memory
    settings = shrink(Settings(threads=threads or processors(), piece_bytes=PIECE_BYTES), allowed, need)
    if need(settings) > allowed:
        raise UsageError(
            f"--memory {allowed}: found a need of at least {need(settings)} bytes, for rows that share a scale and "
            "error sums. Give more, or measure fewer methods at once."
        )
    return settings


def _plans(
    source: str | os.PathLike[str], methods: Sequence[str], quantization: Spec, choices: Choices
) -> tuple[dict[str, Plan], dict[str, str]]:
    """The plan of every method, and why others have none."""
    if isinstance(methods, str):
        raise UsageError(f"methods is {methods!r}, expected a list of strings.")
    components = choices.get("components", ())
    is_given = any(value is not None for value in (quantization, choices.get("method"), choices.get("recipe")))
    if is_given and methods:
        raise UsageError("found methods beside a method or recipe, expected one of them.")
    is_given = is_given or bool(methods) or (bool(components) and all("=" in text for text in components))
    specs: Sequence[Spec] = methods or ([quantization] if is_given else DEFAULT_METHODS)
    recipes = [make_recipe(quantization=spec, **choices) for spec in specs]
    checkpoint = open_source(source, recipes[0].components)
    plans: dict[str, Plan] = {}
    refused: dict[str, OmniConvertError] = {}
    for recipe in recipes:
        label = " + ".join(map(method_text, recipe.formats))
        try:
            with naming(checkpoint):
                plans[label] = make_plan(checkpoint, recipe)
        except OmniConvertError as error:
            if is_given:
                raise
            refused[label] = error
    if not plans:
        raise next(iter(refused.values()))
    return plans, {label: str(error) for label, error in refused.items()}
