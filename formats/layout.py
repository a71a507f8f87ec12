"""How a model folder is laid out: the names of its files, its index and its shards, quantized or not."""

from __future__ import annotations

import json
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_convert.formats.errors import OmniConvertError, printable
from omni_convert.formats.header import Header, StoredTensor, read_header
from omni_convert.formats.strict_json import parse_object, read_object, read_value

CONFIG_NAME = "config.json"
PIPELINE_INDEX = "model_index.json"
MANIFEST_NAME = "omni_convert.json"
MARKER_NAME = ".omni_convert.partial"
"""In the root folder of a conversion that has not finished."""

WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
"""Diffusers, Transformers."""
INDEX_NAMES = tuple(f"{name}.index.json" for name in WEIGHT_NAMES)
MAX_JSON_BYTES = 100_000_000
_MAX_NESTED = 10_000

_VARIANT = re.compile(r"^(diffusion_pytorch_model|model)\.[^.]+\.safetensors$")
_PICKLE = re.compile(r"\.(bin|pt|pth|ckpt|pkl|pickle)$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The weight files of one model, their headers read and checked against the index, if there is one."""

    headers: tuple[Header, ...]
    index_name: str | None
    index_metadata: Mapping[str, Any]

    def tensors(self) -> Iterator[tuple[str, StoredTensor, Header]]:
        for header in self.headers:
            for name, tensor in header.tensors.items():
                yield name, tensor, header


def read_shards(folder: Path, check: Callable[[Path], None] = lambda path: None) -> Shards:
    """Find the weight files of a model folder and read their headers.

    Args:
        folder: of one model, in the naming of Diffusers or Transformers, or with one safetensors file of any name.
        check: called with the index and every weight file before it is opened; raises to refuse it.

    Raises:
        OmniConvertError: no folder, no weights, more than one set of them, pickles only, a missing or malformed shard,
            an index that does not fit its shards, or a tensor that is in two shards.
    """
    if not folder.is_dir():
        raise OmniConvertError(f"{folder}: found no folder, expected the weights of a model in it. Fetch it again.")
    index_name, single = _find_weights(folder)
    if index_name:
        check(folder / index_name)
        weight_map, metadata = read_index(folder / index_name)
        headers = _read_headers(folder, sorted(set(weight_map.values())), check)
        check_weight_map(folder / index_name, weight_map, headers)
    else:
        metadata = {}
        headers = _read_headers(folder, [single], check)
    shards = Shards(headers=headers, index_name=index_name or None, index_metadata=metadata)
    _check_unique(folder, shards)
    return shards


def read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """``weight_map`` and ``metadata`` of an index; a file it names lies beside it.

    Raises:
        OmniConvertError: damaged, a tensor is named twice, or a name leads elsewhere.
    """
    index = _parse(path, lambda text: parse_object(text, _read_member))
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise OmniConvertError(
            f"{path}: found no weight_map, expected tensor names mapped to files. Download the index again."
        )
    if not isinstance(metadata, dict):
        raise OmniConvertError(
            f"{path}: metadata is {printable(metadata)}, expected an object. Download the index again."
        )
    for tensor, name in weight_map.items():
        if not is_plain_name(name) or not str(name).endswith(".safetensors"):
            raise OmniConvertError(
                f"{path}: places tensor {printable(tensor)} in {printable(name)}, expected the plain name of a "
                ".safetensors file beside the index. The index is damaged or hostile: do not use it."
            )
    _check_distinct(path, sorted(set(weight_map.values())))
    return weight_map, metadata


def check_weight_map(path: Path, weight_map: Mapping[str, str], headers: Sequence[Header]) -> None:
    """``path``: of the index. ``headers``: of every file that it names.

    Raises:
        OmniConvertError: it places a tensor in a file that does not hold it.
    """
    by_name = {header.path.name: header for header in headers}
    for tensor, name in weight_map.items():
        if tensor not in by_name[name].tensors:
            raise OmniConvertError(
                f"{path}: places tensor {printable(tensor)} in {name}, but that shard does not hold it. "
                "Index and shards are of different versions: download the repository again."
            )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; of a name that appears twice the last, as every library reads a config.

    Raises:
        OmniConvertError: unreadable, too large, not JSON, or not an object.
    """
    data = _parse(path, json.loads)
    if not isinstance(data, dict):
        raise OmniConvertError(f"{path}: found a JSON {type(data).__name__}, expected an object. Download it again.")
    return data


def _parse(path: Path, parse: Callable[[str], Any]) -> Any:
    raw = _read_bytes(path)
    nested = raw.count(b"{") + raw.count(b"[")
    if nested > _MAX_NESTED + len(raw) // 32:  # two bytes of them take sixty of memory
        raise OmniConvertError(
            f"{path}: found {nested} lists and objects in {len(raw)} bytes, expected text and numbers in them. "
            "The file is damaged or hostile: do not use it."
        )
    try:
        return parse(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise OmniConvertError(f"{path}: is not valid JSON ({str(error)[:200]}). Download the file again.") from error


def _read_bytes(path: Path) -> bytes:
    """What a JSON file holds, unless it is too much; a device or a pipe could go on for ever."""
    try:
        found = path.stat()
        size = found.st_size
        raw = path.read_bytes() if stat.S_ISREG(found.st_mode) and size <= MAX_JSON_BYTES else b""
    except OSError as error:
        raise OmniConvertError(
            f"{path}: cannot be read ({error.strerror}). Check the path and its permissions."
        ) from error
    if not stat.S_ISREG(found.st_mode):
        raise OmniConvertError(f"{path}: is a folder or a special file, expected a JSON file. Remove it.")
    if size > MAX_JSON_BYTES:
        raise OmniConvertError(
            f"{path}: found {size} bytes, expected at most {MAX_JSON_BYTES} for a JSON file. Download it again."
        )
    return raw


def _read_member(name: str, text: str, place: int) -> tuple[Any, int]:
    is_map = name == "weight_map" and text.startswith("{", place)
    return read_object(text, place, read_value) if is_map else read_value(name, text, place)


def _check_distinct(path: Path, names: Sequence[str]) -> None:
    """Two files for Linux may be one where upper and lower case or ways to write an accent are the same."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise OmniConvertError(
                f"{path}: names both {other!a} and {name!a}, which some file systems take for one file. "
                "Rename the shards, also in the index."
            )


def is_plain_name(name: object) -> bool:
    """Whether ``name`` can name a file or folder right here, on any system: no path, printable, not too long."""
    if not isinstance(name, str) or not name.isprintable() or len(name.encode()) > 255:
        return False
    meant = unicodedata.normalize("NFKC", name)  # what some systems make of full-width dots and slashes
    return meant not in ("", ".", "..") and not any(char in meant for char in "/\\:")


def is_pickle(file_name: str) -> bool:
    """Whether weights of this name can run code when they are read."""
    return _PICKLE.search(file_name) is not None


def pickle_message(path: Path) -> str:
    return (
        f"{path}: found pickle weights, expected safetensors. Pickle files can run code when they are read, so they "
        "are refused. Load the model with its library and write it with save_pretrained(..., "
        "safe_serialization=True), or download the safetensors version of the repository."
    )


def _find_weights(folder: Path) -> tuple[str, str]:
    """Name of the index, or else of the only weight file; the other of the two is empty."""
    standard = [name for name in (*INDEX_NAMES, *WEIGHT_NAMES) if (folder / name).is_file()]
    if len(standard) > 1:  # Diffusers prefers the index, Transformers the single file
        raise OmniConvertError(f"{folder}: found both {' and '.join(standard)}, expected one. Remove the stale one.")
    if standard:
        return (standard[0], "") if standard[0] in INDEX_NAMES else ("", standard[0])
    found = sorted(item.name for item in folder.glob("*.safetensors"))
    if variants := [name for name in found if _VARIANT.match(name)]:
        raise OmniConvertError(
            f"{folder}: found only a variant of the weights ({variants[0]}), expected {' or '.join(WEIGHT_NAMES)}, or "
            "their index. Libraries would not find it: rename the files (and the names in their index) without the "
            "variant."
        )
    if len(found) == 1:
        return "", found[0]
    if found:
        raise OmniConvertError(
            f"{folder}: found {len(found)} safetensors files ({', '.join(found[:3])}, ...) but no index, expected "
            f"{' or '.join(INDEX_NAMES)}. Download the index too, or convert one file at a time."
        )
    if pickles := sorted(item for item in folder.iterdir() if is_pickle(item.name)):
        raise OmniConvertError(pickle_message(pickles[0]))
    raise OmniConvertError(
        f"{folder}: found no weights, expected one of {', '.join((*WEIGHT_NAMES, *INDEX_NAMES, PIPELINE_INDEX))}. "
        "Check the path, or download the checkpoint again."
    )


def _read_headers(folder: Path, names: Sequence[str], check: Callable[[Path], None]) -> tuple[Header, ...]:
    headers = []
    for name in names:
        path = folder / name
        if not path.is_file():
            found = "is no file" if path.exists() else "is missing"
            raise OmniConvertError(
                f"{path}: {found}, expected a file because the index names it. The download is incomplete: fetch it."
            )
        check(path)
        headers.append(read_header(path))
    return tuple(headers)


def _check_unique(folder: Path, shards: Shards) -> None:
    home: dict[str, str] = {}
    for tensor, _, header in shards.tensors():
        other = home.setdefault(tensor, header.path.name)
        if other != header.path.name:
            raise OmniConvertError(
                f"{folder}: tensor {printable(tensor)} is in both {other} and {header.path.name}, expected it once. "
                "The shards are of different versions: download the repository again."
            )
