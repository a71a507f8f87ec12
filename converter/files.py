"""Small checks on files of a source that must not be trusted, and on what lies beside the weights."""

from __future__ import annotations

import os
import re
from pathlib import Path

from omni_convert.formats.errors import OmniConvertError, UsageError, printable

_ALTERNATIVE = re.compile(
    r"^(diffusion_pytorch_model|pytorch_model|model)([.-].*)?\."
    r"(safetensors|bin|pt|pth|ckpt|(safetensors|bin)\.index(\.\w+)?\.json)$"
    r"|^consolidated([.-].*)?\.safetensors$"
    r"|^(tf_model\.h5|flax_model\.msgpack|rust_model\.ot)$"
)


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_size(text: str) -> int:
    """Bytes, from a number with a unit of 1000 or 1024: ``400M``, ``1.5GB``, ``512MiB``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kmgt])(i?)b?|b?)", text.strip().lower())
    if match is None:
        raise UsageError(f"{printable(text)!r} is no size, expected a number and a unit such as 400M, 1.5GB or 512MiB.")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("kmgt".index(prefix) + 1 if prefix else 0))


def freed_bytes(path: Path) -> int:
    """What deleting a file frees: nothing while other hard links hold it."""
    return path.stat().st_size if path.is_file() and path.stat().st_nlink == 1 else 0


def sync_file(path: Path) -> None:
    """Have the disk know the content of a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have the disk know the names in a folder."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_alternative_weights(file_name: str) -> bool:
    """Whether a file beside the shards holds the same weights again: a variant, a pickle, another framework's."""
    return _ALTERNATIVE.search(file_name) is not None


def check_inside(path: Path, root: Path) -> None:
    """A file of the source must not be a link that leads out of it (links into the Hub cache's blobs are fine)."""
    target, home = Path(os.path.realpath(path)), root.resolve()  # realpath() bears links that lead in a circle
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
