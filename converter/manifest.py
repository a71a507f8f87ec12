"""``omni_convert.json``: where an output comes from, what was done to every tensor, and what its files must be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from omni_convert.converter.checkpoint import Checkpoint, Component
from omni_convert.converter.hashes import file_sha256
from omni_convert.converter.layer_error import LayerError
from omni_convert.converter.manifest_shape import load_manifest
from omni_convert.converter.plan import ComponentPlan, Plan, encode_json
from omni_convert.converter.recipe import Recipe
from omni_convert.converter.source import SourceFile
from omni_convert.formats import format_label
from omni_convert.formats.base import Format
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.header import hash_header
from omni_convert.formats.layout import CONFIG_NAME, MANIFEST_NAME, MARKER_NAME
from omni_convert.formats.text import recorded_db


def manifest_bytes(
    plan: Plan,
    files: Mapping[str, tuple[str, int]],
    errors: Mapping[tuple[str, str], LayerError],
    *,
    hashing_threads: int,
) -> bytes:
    """The manifest: recipe, tool version, output files, source files, and the decision for every tensor.

    ``hashing_threads``: how many read the whole source once more, for its sha256; 0 leaves that out.
    """
    from omni_convert import __version__

    return encode_json(
        {
            "omni_convert": __version__,
            "recipe": plan.recipe.to_dict(),
            "files": {name: {"size": size, "sha256": digest} for name, (digest, size) in sorted(files.items())},
            "source": {
                "name": plan.checkpoint.name,
                "kind": plan.checkpoint.kind,
                **(plan.checkpoint.hub.identity() if plan.checkpoint.hub else {}),
                "files": _source_files(plan.checkpoint, files, hashing_threads),
                "left_out": dict(plan.checkpoint.left_out),
            },
            "components": {
                part.component.name: _component(part, plan.recipe.part(part.component.name).format, errors)
                for part in plan.components
            },
            "cautions": list(plan.cautions),
        }
    )


def _source_files(
    checkpoint: Checkpoint, outputs: Mapping[str, tuple[str, int]], hashing_threads: int
) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, file in checkpoint.others.items():
        entries[name] = _facts(checkpoint, name, file)
        header_sha256 = hash_header(checkpoint.root / name) if name.endswith(".safetensors") else None
        if header_sha256:
            entries[name]["header_sha256"] = header_sha256
        if hashing_threads:
            entries[name]["sha256"] = outputs[name][0]  # it arrived unchanged
    own = {
        component.relative(path.name): (path, header_sha256)
        for component in checkpoint.components
        for path, header_sha256 in _component_files(component)
    }
    for name, (path, header_sha256) in own.items():
        entries[name] = _facts(checkpoint, name, SourceFile.now(path))
        if header_sha256:
            entries[name]["header_sha256"] = header_sha256
    if hashing_threads:
        unknown = {name: path for name, (path, _) in own.items() if "sha256" not in entries[name]}
        with ThreadPoolExecutor(hashing_threads) as pool:
            for name, digest in zip(unknown, pool.map(file_sha256, unknown.values()), strict=True):
                entries[name]["sha256"] = digest
    return dict(sorted(entries.items()))


def _component_files(component: Component) -> list[tuple[Path, str | None]]:
    """The files that are not copied: shards (with their header's hash), index and config."""
    small = [component.folder / name for name in (component.shards.index_name, CONFIG_NAME) if name]
    shards: list[tuple[Path, str | None]] = [(shard.path, shard.sha256) for shard in component.shards.headers]
    return shards + [(path, None) for path in small if component.config is not None or path.name != CONFIG_NAME]


def _facts(checkpoint: Checkpoint, name: str, file: SourceFile) -> dict[str, Any]:
    """What is recorded of every file of the source."""
    return checkpoint.hub.facts(name) if checkpoint.hub else {"size": file.size, "mtime_ns": file.mtime_ns}


def _component(part: ComponentPlan, usual: Format, errors: Mapping[tuple[str, str], LayerError]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    unnamed = (usual, usual.fused())
    for tensor in part.tensors():
        decision = tensor.decision
        entry: dict[str, Any] = {"action": decision.format.name if decision.format else "keep", "why": decision.reason}
        if decision.format:
            if decision.format not in unnamed:
                entry["format"] = format_label(decision.format)
            error = errors[part.component.name, tensor.layer]
            entry["dtype"] = tensor.source.spec.dtype
            entry["sqnr_db"] = recorded_db(error.sqnr_db) if math.isfinite(error.sqnr_db) else None
            if error.shared_scale_db is not None:
                entry["shared_scale_db"] = recorded_db(error.shared_scale_db)
        tensors[tensor.name] = entry
    sizes = {
        "weights": sum(tensor.source.spec.numel for tensor in part.tensors()),
        "bytes_before": sum(tensor.source.spec.nbytes for tensor in part.tensors()),
        "bytes_after": sum(tensor.bytes_after for tensor in part.tensors()),
    }
    return {"class": part.component.class_name, "architecture": part.architecture, **sizes, "tensors": tensors}


def read_manifest(root: Path) -> dict[str, Any] | None:
    """The manifest of a finished conversion; None if the folder has none.

    Raises:
        OmniConvertError: there is no such folder, the conversion is unfinished, or the manifest is damaged.
    """
    if not root.is_dir():
        raise OmniConvertError(
            f"{root}: found no {MANIFEST_NAME}, expected a folder written by omni-convert, and there is none. What is "
            "on the Hub is downloaded first: hf download ORGANIZATION/NAME --local-dir DIR"
        )
    if (root / MARKER_NAME).exists():
        raise OmniConvertError(f"{root}: is the unfinished output of a conversion. Run that conversion again.")
    if not (root / MANIFEST_NAME).is_file():
        return None
    return load_manifest(root / MANIFEST_NAME)


def layer_formats(recipe: Recipe, component: str, decisions: Mapping[str, Any]) -> dict[str, Format]:
    """The format of every quantized layer of a component, by the decisions of the manifest."""
    default, *others = recipe.formats_of(component)
    labels = {format_label(written): fmt for fmt in others for written in (fmt, fmt.fused())}
    return {
        name.removesuffix(".weight"): labels.get(entry.get("format"), default)
        for name, entry in decisions.items()
        if entry["action"] != "keep"
    }
