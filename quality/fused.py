"""What an engine quantizes or keeps as a whole, and the ``--ignore`` that means it."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from omni_convert.converter.checkpoint import open_component
from omni_convert.converter.decide import View
from omni_convert.converter.recipe import Recipe
from omni_convert.formats.config import exact_pattern
from omni_convert.formats.layout import PIPELINE_INDEX, read_json
from omni_convert.formats.patterns import Pattern


class Unit(NamedTuple):
    """A component, "" of a model that is no pipeline, and the engine's name of what it fuses, or the layer's own."""

    component: str
    name: str


def engine_units(folder: Path, target: str, layers: Iterable[str]) -> dict[str, Unit]:
    """The unit of every one of ``layers``, named as in the checkpoint in ``folder``, after its component if any."""
    index = folder / PIPELINE_INDEX
    pipeline = read_json(index).get("_class_name") if index.is_file() else None
    recipe = Recipe(parts={}, target=target)
    views: dict[str, View] = {}
    found: dict[str, Unit] = {}
    for layer in layers:
        component, _, own = layer.partition(".") if index.is_file() else ("", "", layer)
        if component not in views:
            views[component] = View(open_component(folder, component), recipe, pipeline)
        view = views[component]
        group = view.group(f"{own}.weight") if own in view.runtime_names else None
        found[layer] = Unit(component, group or own)
    return found


def own_pattern(name: str, others: Iterable[str]) -> str:
    """What ``--ignore`` takes for a layer, or for what the engine fuses, and for none of ``others``."""
    escaped = glob.escape(name)
    if escaped != name or name.startswith("re:"):  # would be a pattern
        return escaped if escaped.startswith("[") else exact_pattern(escaped)
    return exact_pattern(name) if any(map(Pattern(name).matches, others)) else name
