"""``omni_convert.json``: where an output comes from, what was done to every tensor, and what its files must be."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni_convert.converter.checkpoint import Checkpoint, Component
from omni_convert.converter.plan import ComponentPlan, Plan, encode_json
from omni_convert.converter.weight_writer import LayerError
from omni_convert.formats import format_label
from omni_convert.formats.base import Format
from omni_convert.formats.header import hash_header
from omni_convert.formats.layout import CONFIG_NAME

HASH_BYTES = 4 << 20


def manifest_bytes(
    plan: Plan,
    files: Mapping[str, tuple[str, int]],
    errors: Mapping[tuple[str, str], LayerError],
    *,
    hash_source: bool,
) -> bytes:
    """The manifest: recipe, tool version, output files, source files, and the decision for every tensor."""
    from omni_convert import __version__

    return encode_json(
        {
            "omni_convert": __version__,
            "recipe": plan.recipe.to_dict(),
            "files": {name: {"size": size, "sha256": digest} for name, (digest, size) in sorted(files.items())},
            "source": {
                "name": plan.checkpoint.root.name,
                "kind": plan.checkpoint.kind,
                "files": _source_files(plan.checkpoint, files, hash_source=hash_source),
                "left_out": dict(plan.checkpoint.left_out),
            },
            "components": {
                part.component.name: _component(part, plan.recipe.part(part.component.name).format, errors)
                for part in plan.components
            },
        }
    )


def file_sha256(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _source_files(
    checkpoint: Checkpoint, outputs: Mapping[str, tuple[str, int]], *, hash_source: bool
) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name in checkpoint.others:
        entries[name] = _stat(checkpoint.root / name)
        header_sha256 = hash_header(checkpoint.root / name) if name.endswith(".safetensors") else None
        if header_sha256:
            entries[name]["header_sha256"] = header_sha256
        if hash_source:
            entries[name]["sha256"] = outputs[name][0]  # it arrived unchanged
    for component in checkpoint.components:
        for path, header_sha256 in _component_files(component):
            entry = _stat(path)
            if header_sha256:
                entry["header_sha256"] = header_sha256
            if hash_source:
                entry["sha256"] = file_sha256(path)
            entries[component.relative(path.name)] = entry
    return dict(sorted(entries.items()))


def _component_files(component: Component) -> list[tuple[Path, str | None]]:
    """The files that are not copied: shards (with their header's hash), index and config."""
    small = [component.folder / name for name in (component.shards.index_name, CONFIG_NAME) if name]
    shards: list[tuple[Path, str | None]] = [(shard.path, shard.sha256) for shard in component.shards.headers]
    return shards + [(path, None) for path in small if component.config is not None or path.name != CONFIG_NAME]


def _stat(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


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
            entry["sqnr_db"] = round(error.sqnr_db, 2) if math.isfinite(error.sqnr_db) else None
            if error.shared_scale_db is not None:
                entry["shared_scale_db"] = round(error.shared_scale_db, 2)
        tensors[tensor.name] = entry
    return {"class": part.component.class_name, "architecture": part.architecture, "tensors": tensors}
