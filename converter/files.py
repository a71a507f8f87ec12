"""Small checks on files of a source that must not be trusted, and on what lies beside the weights."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from omni_convert.formats.errors import OmniConvertError

MAX_JSON_BYTES = 100_000_000

_PICKLE = re.compile(r"\.(bin|pt|pth|ckpt|pkl|pickle)$", re.IGNORECASE)
_ALTERNATIVE = re.compile(
    r"^(diffusion_pytorch_model|pytorch_model|model)([.-].*)?\."
    r"(safetensors|bin|pt|pth|ckpt|(safetensors|bin)\.index(\.\w+)?\.json)$"
    r"|^(tf_model\.h5|flax_model\.msgpack|rust_model\.ot)$"
)


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_pickle(file_name: str) -> bool:
    return _PICKLE.search(file_name) is not None


def is_alternative_weights(file_name: str) -> bool:
    """Whether a file beside the shards holds the same weights again: a variant, a pickle, another framework's."""
    return _ALTERNATIVE.search(file_name) is not None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        OmniConvertError: unreadable, too large, not JSON, or not an object.
    """
    try:
        size = path.stat().st_size
        text = path.read_bytes() if size <= MAX_JSON_BYTES else b""
    except OSError as error:
        raise OmniConvertError(
            f"{path}: cannot be read ({error.strerror}). Check the path and its permissions."
        ) from error
    if size > MAX_JSON_BYTES:
        raise OmniConvertError(f"{path}: found {size} bytes, expected at most {MAX_JSON_BYTES} for a JSON file.")
    try:
        data = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise OmniConvertError(f"{path}: not valid JSON ({str(error)[:200]}). Download the file again.") from error
    if not isinstance(data, dict):
        raise OmniConvertError(f"{path}: found a JSON {type(data).__name__}, expected an object. Download it again.")
    return data


def check_name(index: Path, tensor: str, file_name: object) -> None:
    """An index may only name files that lie beside it."""
    if (
        not isinstance(file_name, str)
        or not file_name.endswith(".safetensors")
        or len(file_name) > 255
        or any(char in file_name for char in "/\\\0:")
    ):
        raise OmniConvertError(
            f"{index}: places tensor {tensor[:120]!r} in {str(file_name)[:200]!r}, expected the plain name of a "
            ".safetensors file beside the index. The index is damaged or hostile: do not use it."
        )


def check_inside(path: Path, root: Path) -> None:
    """A file of the source must not be a link that leads out of it (links into the Hub cache's blobs are fine)."""
    target, home = path.resolve(), root.resolve()
    allowed = [home]
    for folder in (home, *home.parents):
        if folder.parent.name == "snapshots":
            allowed.append(folder.parent.parent / "blobs")
            break
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise OmniConvertError(
            f"{path}: is a link to {target}, which lies outside of {home}. "
            "Copy the file into the folder, or convert the folder that really holds it."
        )
