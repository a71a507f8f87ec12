"""Check a converted checkpoint: files against the manifest, tensors against the format, errors against the source.

It shares the header reader, the recipe and the formats' contracts with the writer, not its arithmetic: codes and scales
are judged by what they stand for.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omni_convert.converter.check import Check
from omni_convert.converter.checkpoint import Component, open_component
from omni_convert.converter.compare import LayerComparison, compare_component
from omni_convert.converter.contract import check_contract, is_quantized
from omni_convert.converter.files import processors
from omni_convert.converter.hashes import file_problems
from omni_convert.converter.hub_source import converted_from, local_folder
from omni_convert.converter.inspect import quantized_layers
from omni_convert.converter.manifest import layer_formats, read_manifest
from omni_convert.converter.recipe import Recipe
from omni_convert.converter.values import value_problems
from omni_convert.formats.base import Format
from omni_convert.formats.config import QuantizationConfig, parse_config, stored_config
from omni_convert.formats.errors import OmniConvertError, printable
from omni_convert.formats.header import FLOAT_DTYPES, hash_header
from omni_convert.formats.layout import MANIFEST_NAME, read_index
from omni_convert.formats.text import format_db, format_table, layer_patterns, mean_db


@dataclass(kw_only=True)
class Verification:
    """The result of ``verify``."""

    path: str
    checks: list[Check] = field(default_factory=list)
    layers: list[LayerComparison] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        checks = [asdict(check) | {"ok": check.ok} for check in self.checks]
        return {"path": self.path, "ok": self.ok, "checks": checks, "layers": [item.to_dict() for item in self.layers]}

    def to_text(self) -> str:
        rows = [["check", "result", "checked"]]
        rows += [[check.name, check.result, check.checked] for check in self.checks]
        lines = [format_table(rows)]
        for check in self.checks:
            lines += [f"  {check.name}: {printable(problem, 2000)}" for problem in check.problems[:10]]
            if len(check.problems) > 10:
                lines.append(f"  {check.name}: ... and {len(check.problems) - 10} more (--json lists all)")
        if self.layers:
            worst = sorted(self.layers, key=lambda item: item.sqnr_db)[:3]
            mean = mean_db(item.sqnr_db for item in self.layers)
            lines += ["", self._error_table(), ""]
            lines.append(f"mean SQNR {format_db(mean)} over {len(self.layers)} layers; worst:")
            lines += [f"  {format_db(item.sqnr_db)}  {printable(item.layer)}" for item in worst]
        lines.append(f"{self.path}: {'verified' if self.ok else 'NOT what it should be'}")
        return "\n".join(lines)

    def _error_table(self) -> str:
        """The dequantized error of every group of layers (``--json``: of every layer)."""
        patterns = layer_patterns({item.layer for item in self.layers})
        groups: dict[str, list[float]] = defaultdict(list)
        for item in self.layers:
            groups[patterns[item.layer]].append(item.sqnr_db)
        rows = [["layers", "count", "lowest SQNR", "highest"]]
        rows += [[name, str(len(g)), format_db(min(g)), format_db(max(g))] for name, g in groups.items()]
        return format_table(rows, right=(1, 2, 3))


def verify(
    out: str | os.PathLike[str], *, source: str | os.PathLike[str] | None = None, progress: bool = False
) -> Verification:
    """Check the converted checkpoint ``out``, and with ``source``, a path or a repository on the Hub, also what
    quantization did to every layer. Of the repository that was converted the commit is taken that was, unless
    ``source`` names a revision.

    Of a quantized folder without a manifest, only whether vLLM-Omni could load it is checked.

    Raises:
        OmniConvertError: ``out`` is not a finished conversion, or cannot be read at all.
    """
    root = Path(os.path.abspath(out))
    result = Verification(path=str(root))
    manifest = read_manifest(root)
    if manifest is None:
        result.checks += _without_manifest(root, source)
        return result
    result.checks.append(_check_files(root, manifest["files"], progress))
    recipe = Recipe.from_dict(manifest["recipe"])
    formats = {name: layer_formats(recipe, name, entry["tensors"]) for name, entry in manifest["components"].items()}
    components: dict[str, Component] = {}
    for name, entry in manifest["components"].items():
        try:
            components[name] = open_component(root, name)
        except OmniConvertError as error:
            result.checks.append(Check(f"{_title(name)} headers", "weight files and index", (str(error),)))
            continue
        result.checks += _check_component(components[name], recipe, formats[name], entry["tensors"], _title(name))
    if source is not None:
        meant = converted_from(source, manifest["source"])
        original = Path(os.path.abspath(local_folder(meant)))
        said = "" if meant == source else f", of {meant}, which was converted"
        check = check_source(original, manifest["source"])
        result.checks.append(replace(check, checked=check.checked + said))
        if result.ok:
            for name, component in components.items():
                _compare(result, original, component, formats[name], name)
    if recipe.target == "vllm-omni":
        result.checks += check_contract(root)
    return result


def _without_manifest(root: Path, source: str | os.PathLike[str] | None) -> list[Check]:
    """The engine's rules alone, which take nothing but the folder."""
    if not is_quantized(root):
        raise OmniConvertError(
            f"{root}: found no {MANIFEST_NAME}, expected a folder written by omni-convert. "
            "To look at any checkpoint use: omni-convert inspect."
        )
    if source is not None:
        raise OmniConvertError(
            f"{root}: found no {MANIFEST_NAME}, and comparing with --source needs it. Verify without --source, for "
            "vLLM-Omni's rules alone."
        )
    said = "not there, so only the engine's rules were checked"
    return [Check("manifest", said, (), known=False), *check_contract(root)]


def _check_files(root: Path, files: Mapping[str, Mapping[str, Any]], progress: bool) -> Check:
    from tqdm import tqdm

    expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    total = sum(int(entry["size"]) for entry in files.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=None if progress else True) as bar:
        found = file_problems(root, expected, processors(), bar.update)
    problems = [f"{name}: {problem} Convert again, or copy it again." for name, problem in found.items()]
    problems += [f"{name}: holds weights that the manifest does not list." for name in _stray_weights(root, files)]
    return Check("files", f"{len(files)} files by size and sha256", tuple(problems))


def _stray_weights(root: Path, files: Mapping[str, Any]) -> list[str]:
    """Safetensors files beside converted ones: engines that read a folder without an index would load both."""
    folders = {(root / name).parent for name in files if name.endswith(".safetensors")}
    found = sorted(path.relative_to(root).as_posix() for folder in folders for path in folder.glob("*.safetensors"))
    return [name for name in found if name not in files]


def _check_component(
    component: Component,
    recipe: Recipe,
    formats: Mapping[str, Format],
    decisions: Mapping[str, Any],
    title: str,
) -> list[Check]:
    where = f"{component.relative('config.json')}: quantization_config"
    try:
        config = parse_config(stored_config(component.config), where)
        for layer, fmt in formats.items():
            found, expected = config.format_on_disk(layer).config(()), fmt.config(())
            if found != expected:
                raise OmniConvertError(
                    f"{where}: announces {found} for {layer}, expected {expected} as in the manifest's recipe."
                )
    except OmniConvertError as error:
        return [Check(f"{title} config", "quantization_config", (str(error),))]
    structure = [*_structure_problems(component, config, formats, decisions), *_index_problems(component)]
    values = [] if structure else value_problems(component, recipe, formats)
    names = " + ".join(dict.fromkeys(fmt.name for fmt in config.formats))
    return [
        Check(f"{title} config", f"{names}, {len(config.ignored_layers)} ignored layers", ()),
        Check(f"{title} tensors", f"{len(decisions)} tensors by name, dtype and shape", tuple(structure)),
        Check(f"{title} codes", f"codes and scales of {len(formats)} layers", tuple(values)),
    ]


def _structure_problems(
    component: Component,
    config: QuantizationConfig,
    formats: Mapping[str, Format],
    decisions: Mapping[str, Any],
) -> Iterator[str]:
    """Tensors against the format's contract, the config's ignored layers and the manifest's decisions."""
    specs = {name: tensor.spec for name, tensor, _ in component.tensors()}
    ignored = set(config.ignored_layers)
    quantized = set[str]().union(*(quantized_layers(component, tuple(fmt.suffixes)) for fmt in config.formats))
    expected = set(decisions)
    for name, decision in decisions.items():
        layer = name.removesuffix(".weight")
        if decision["action"] == "keep":
            if name != layer and name in specs and layer in quantized:
                yield f"{name}: is quantized, expected it kept ({decision['why']})."
            continue
        fmt = formats[layer]
        names = {f"{layer}.{suffix}" for suffix in fmt.suffixes}
        expected |= names
        if missing := names - specs.keys():
            yield f"{layer}: lacks {', '.join(sorted(missing))}."
            continue
        if refusal := fmt.refusal(specs[name].shape):
            yield f"{name}: has shape {specs[name].shape}: {refusal}."
            continue
        for suffix, spec in fmt.tensors(specs[name].shape).items():
            if specs[f"{layer}.{suffix}"] != spec:
                yield f"{layer}.{suffix}: is {specs[f'{layer}.{suffix}']}, expected {spec}."
        if layer in ignored:
            yield f"{layer}: is quantized, but the config ignores it."
    yield from (f"{name}: is missing." for name in sorted(expected - specs.keys()))
    yield from (f"{name}: is not in the manifest." for name in sorted(specs.keys() - expected))
    for name, spec in specs.items():
        layer = name.removesuffix(".weight")
        matrix = name.endswith(".weight") and len(spec.shape) == 2 and spec.dtype in FLOAT_DTYPES
        if matrix and layer not in quantized and layer not in ignored:
            yield f"{layer}: is unquantized, but the config does not ignore it."


def _index_problems(component: Component) -> list[str]:
    """``total_size`` and completeness of the index (that its names exist was checked when it was opened)."""
    index_name = component.shards.index_name
    if index_name is None:
        return []
    weight_map, metadata = read_index(component.folder / index_name)
    names = {name for name, _, _ in component.tensors()}
    total = sum(tensor.spec.nbytes for _, tensor, _ in component.tensors())
    problems = [f"{index_name}: does not list {name}." for name in sorted(names - weight_map.keys())]
    if metadata.get("total_size") != total:
        problems.append(f"{index_name}: total_size is {metadata.get('total_size')}, expected {total}.")
    return problems


def check_source(root: Path, recorded: Mapping[str, Any]) -> Check:
    """Whether ``root`` is the source that the manifest names: sizes and headers of every weight file."""
    base = root.parent if root.is_file() else root
    if not base.is_dir():
        return Check("source", str(root), (f"{root}: found nothing there, expected the model that was converted.",))
    problems: list[str] = []
    for name, entry in recorded["files"].items():
        path = base / name
        if not path.is_file():
            problems.append(f"{name}: is not in the source {root}.")
        elif path.stat().st_size != entry["size"]:
            problems.append(f"{name}: has {path.stat().st_size} bytes in the source, {entry['size']} when converted.")
        elif "header_sha256" in entry and hash_header(path) != entry["header_sha256"]:
            problems.append(f"{name}: its header differs from the one that was converted.")
    return Check("source", f"{len(recorded['files'])} files by size, weights by header", tuple(problems))


def _compare(
    result: Verification, original: Path, component: Component, formats: Mapping[str, Format], name: str
) -> None:
    from omni_convert.converter.checkpoint import open_checkpoint

    names = () if component.name == "" else (component.name,)
    (source,) = open_checkpoint(original, names).components
    layers, problems = compare_component(source, component, formats)
    title = _title(name)
    result.layers += layers
    result.checks.append(
        Check(f"{title} values", f"{len(layers)} layers dequantized, the rest compared", tuple(problems))
    )


def _title(name: str) -> str:
    return name or "model"
