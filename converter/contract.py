"""Whether vLLM-Omni 0.30 would load an output as it is meant: every rule of its contract, from the engine's side.

Reads the output folder alone and knows nothing of what wrote it. A broken rule is mostly silent in the engine, which
then computes with garbage, so every problem says what would happen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omni_convert.converter import contract_layers, contract_values
from omni_convert.converter.check import Check
from omni_convert.converter.contract_folder import QUANTIZATION, Folder, Part
from omni_convert.converter.contract_read import read_folder
from omni_convert.formats.errors import OmniConvertError, printable
from omni_convert.formats.layout import CONFIG_NAME, MANIFEST_NAME, PIPELINE_INDEX, read_json

PREFIX = "vllm-omni "
_NOT_ASKED = "not asked for: fused_scale per-channel, for engines that read a scale of every row (Ascend NPU)"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """``count``: of what a rule looks at in a part; where that is nothing, the rule is not shown."""

    name: str
    unit: str
    count: Callable[[Folder, Part], int]
    problems: Callable[[Folder, Part], Iterator[str]]
    needs_method: bool = True
    """Whether it takes a config that the engine understands."""


def check_contract(root: Path, without: Collection[str] = ()) -> list[Check]:
    """Every rule that applies to the output folder ``root``, whether it holds, and how it does not.

    ``without``: names of rules to leave out, where the folder lacks what they read.
    """
    folder = read_folder(root)
    checks = []
    for rule in [rule for rule in RULES if rule.name not in without]:
        parts = folder.models if rule.needs_method else folder.parts
        count = sum(rule.count(folder, part) for part in parts)
        texts = [text for part in parts for text in rule.problems(folder, part)]
        if rule.name == "config place":
            texts += folder.problems
        problems = [printable(f"{text.removesuffix('.')}.", 2000) for text in dict.fromkeys(texts)]
        if rule.name == "fused scales" and count and _keeps_rows(root) and any(p.kind == "int8" for p in parts):
            checks.append(Check(PREFIX + rule.name, _NOT_ASKED, ()))
        elif count or problems:
            checks.append(Check(PREFIX + rule.name, _counted(count, rule.unit), tuple(problems)))
    return checks + _unknown_classes(folder)


def is_quantized(root: Path) -> bool:
    """Whether anything in the folder ``root`` is quantized, or says so, wherever the engine looks."""
    folder = read_folder(root)
    return bool(folder.parts or folder.elsewhere)


def _counted(count: int, unit: str) -> str:
    """``unit`` begins with a plural."""
    noun, _, rest = unit.partition(" ")
    return f"{count} {noun.removesuffix('s') if count == 1 else noun} {rest}"


def _keeps_rows(root: Path) -> bool:
    """Whether the manifest says that every row of fused layers was to keep its own scale."""
    try:
        recipe = read_json(root / MANIFEST_NAME).get("recipe")
    except OmniConvertError:
        return False
    parts = recipe.get("components", {"": recipe}) if isinstance(recipe, dict) else None
    specs = parts.values() if isinstance(parts, dict) else ()
    return any(isinstance(spec, dict) and spec.get("fused_scale") == "per-channel" for spec in specs)


def _unknown_classes(folder: Folder) -> list[Check]:
    names = [
        f"{part.title} is {printable(part.config.get('_class_name') or part.config.get('model_type') or 'of none')}"
        for part in folder.parts
        if part.model is None and part.lent is None
    ]
    said = f"{', '.join(names)}: not in the engine's tables, so only what holds for every class was checked"
    return [Check(f"{PREFIX}model class", said, (), known=False)] if names else []


def _place(folder: Folder, part: Part) -> Iterator[str]:
    if part.name and part is folder.parts[0]:
        yield from _stray_configs(folder)
    if part.lent is not None:  # its own config is not read
        return
    stage = ".".join((*(part.model.config_at if part.model else ()), QUANTIZATION))
    if part.found is None:
        yield (
            f"{part.where}: has no {QUANTIZATION} at its top, where the engine looks: it takes codes for BF16 weights. "
            "Convert again"
        )
    for place, found in _places(part.config):
        if place not in (QUANTIZATION, stage):
            yield f"{part.where}: has {place}, where the engine does not look. Move it to {QUANTIZATION}"
        elif found != part.found:
            yield f"{part.where}: {place} differs from {QUANTIZATION}, and the engine reads both. Make them equal"


def _stray_configs(folder: Folder) -> Iterator[str]:
    """Of the pipeline itself."""
    if QUANTIZATION in folder.index:
        yield f"{PIPELINE_INDEX}: has {QUANTIZATION}, where the engine never looks. Move it to the transformer's config"
    try:
        config = read_json(folder.root / CONFIG_NAME) if (folder.root / CONFIG_NAME).is_file() else {}
    except OmniConvertError:
        return
    if QUANTIZATION in config:
        yield f"{CONFIG_NAME}: has {QUANTIZATION}, but a pipeline has it in the transformer's config. Move it there"


def _places(config: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Every ``quantization_config`` in a config, with its path."""
    parts: list[tuple[str, Mapping[str, object]]] = [("", config)]
    while parts:
        above, part = parts.pop()
        for key, value in part.items():
            if key == QUANTIZATION:
                yield above + key, value
            elif isinstance(value, dict):
                parts.append((f"{above}{key}.", value))


def _keys(folder: Folder, part: Part) -> Iterator[str]:
    for problem in part.announced.problems:
        yield f"{part.where}: {QUANTIZATION} {problem}"


def _flag(folder: Folder, part: Part) -> Iterator[str]:
    if part.announced.flag and part.announced.flag[1] is not True:
        name, value = part.announced.flag
        yield (
            f"{part.where}: {name} is {printable(value)}, expected true: the engine would take the weights for "
            "unquantized ones and quantize the codes again. Set it to true"
        )


def _refused(folder: Folder, part: Part) -> Iterator[str]:
    reason = part.model.refused.get(part.kind) if part.model else None
    if part.model and reason:
        yield f"{part.where}: has {part.kind} for {part.model.name}: {reason}. Convert with another method"


def _files(folder: Folder, part: Part) -> Iterator[str]:
    yield from part.file_problems


RULES: Sequence[Rule] = (
    Rule(
        name="weight files", unit="files as the engine finds them", needs_method=False,
        count=lambda folder, part: part.files, problems=_files,
    ),
    Rule(
        name="config place", unit="configs where the engine looks", needs_method=False,
        count=lambda folder, part: 1, problems=_place,
    ),
    Rule(
        name="config keys", unit="configs by keys and values", needs_method=False,
        count=lambda folder, part: part.found is not None, problems=_keys,
    ),
    Rule(
        name="serialized flag", unit="flags of what is on disk",
        count=lambda folder, part: part.announced.flag is not None, problems=_flag,
    ),
    Rule(
        name="method", unit="methods that the class can run",
        count=lambda folder, part: part.model is not None, problems=_refused,
    ),
    *(
        Rule(name=name, unit=unit, count=count, problems=problems)
        for name, (unit, count, problems) in {**contract_layers.RULES, **contract_values.RULES}.items()
    ),
)  # fmt: skip
"""In the order in which they are shown."""
