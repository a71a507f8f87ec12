"""Which files of a repository belong to the model that is converted: the rest is not downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from omni_convert.converter.files import is_alternative_weights
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.layout import (
    CONFIG_NAME,
    INDEX_NAMES,
    MANIFEST_NAME,
    MAX_JSON_BYTES,
    PIPELINE_INDEX,
    WEIGHT_NAMES,
    is_pickle,
    read_index,
    read_json,
)

_OTHER_LIBRARIES = re.compile(
    r"\.(gguf|onnx|onnx[._]data(_\d+)?|tflite|h5|msgpack|ot|mlmodel|pte|engine)$", re.IGNORECASE
)
_SHARD_INDEX = re.compile(r"\.safetensors\.index.*\.json$")
_SKIPPED = {".git": "version control", ".cache": "download cache", "__pycache__": "Python's cache"}


def is_planned_from(name: str) -> bool:
    """Whether a plan reads the content of this file, and not only a header."""
    base = PurePosixPath(name).name
    return base in (CONFIG_NAME, PIPELINE_INDEX, MANIFEST_NAME) or _SHARD_INDEX.search(base) is not None


def check_size(name: str, size: int) -> None:
    """Raises:
    OmniConvertError: a file that a plan reads is larger than any JSON file.
    """
    if size > MAX_JSON_BYTES:
        raise OmniConvertError(
            f"{name}: the Hub says it has {size} bytes, expected at most {MAX_JSON_BYTES} for a JSON file."
        )


def left_out(names: Iterable[str], folder: Path) -> dict[str, str]:
    """Files that are not needed, and why.

    Args:
        names: all files of the repository.
        folder: where those lie that a plan is made from.
    """
    names = list(names)
    components = _components(names, folder)
    weights = {home: _weights(names, home, folder) for home in {_home(name) for name in names}}
    found: dict[str, str] = {}
    for name in names:
        if reason := _reason(name, components, weights):
            found[name] = reason
    return found


def _reason(name: str, components: set[str] | None, weights: Mapping[str, frozenset[str]]) -> str:
    home, base = _home(name), PurePosixPath(name).name
    if skipped := next((_SKIPPED[part] for part in PurePosixPath(home).parts if part in _SKIPPED), ""):
        return skipped
    if _OTHER_LIBRARIES.search(base):
        return "weights for another library"
    if not (is_pickle(base) or base.endswith(".safetensors") or is_alternative_weights(base)):
        return ""
    if components is not None and home not in components:
        return "weights beside the model's components"
    chosen = weights[home]
    return "another copy of the weights" if chosen and base not in chosen and is_alternative_weights(base) else ""


def _home(name: str) -> str:
    return name.rpartition("/")[0]


def _components(names: list[str], folder: Path) -> set[str] | None:
    """The folders whose weights belong to the model; None if that cannot be told."""
    if PIPELINE_INDEX in names:
        return set(read_json(folder / PIPELINE_INDEX))
    if CONFIG_NAME in names:
        return {"", *(_home(name) for name in names if name.endswith(f"/{CONFIG_NAME}"))}
    return None


def _weights(names: list[str], home: str, folder: Path) -> frozenset[str]:
    """The weights of a folder by their standard names, with their index; none if it has no such."""
    present = {PurePosixPath(name).name for name in names if _home(name) == home}
    indexes = [name for name in INDEX_NAMES if name in present]
    single = {name for name in WEIGHT_NAMES if name in present}
    shards = {shard for name in indexes for shard in read_index(folder / home / name)[0].values()}
    return frozenset(single | set(indexes) | shards)
