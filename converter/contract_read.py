"""Reading an output folder as vLLM-Omni's loader does: where it looks for configs, and which files it opens."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omni_convert.converter.contract_folder import TRANSFORMERS, Folder, Part, Place
from omni_convert.converter.contract_methods import FLAGS
from omni_convert.formats.errors import OmniConvertError, printable
from omni_convert.formats.header import read_header
from omni_convert.formats.layout import CONFIG_NAME, INDEX_NAMES, PIPELINE_INDEX, is_plain_name, read_json

_FAMILY = re.compile(r"(.+)-\d+-of-(\d+)\.safetensors")
_ENCODER = "text_encoder"


def read_folder(root: Path) -> Folder:
    """Read configs and headers, no weights; what cannot be read becomes a problem."""
    problems: list[str] = []
    is_pipeline = (root / PIPELINE_INDEX).is_file()
    index = _json(root / PIPELINE_INDEX, problems) if is_pipeline else {}
    folders = (
        sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] != ".") if root.is_dir() else []
    )
    places = [name for name in TRANSFORMERS if name in folders] if is_pipeline else [""]
    read = {name: _read_part(root, name, problems) for name in places}
    parts = [part for part in read.values() if part.is_coded or part.found is not None]
    rest = [_read_part(root, name, problems) for name in folders if name not in places]
    elsewhere = [part for part in rest if part.holds_codes or part.found is not None]
    folder = Folder(root=root, pipeline=str(index.get("_class_name")) if is_pipeline else None, index=index)
    problems += _gone(index, folders)
    if is_pipeline:
        main = read.get(TRANSFORMERS[0])
        parts += [part for other in elsewhere if (part := _beside(folder, main, other, problems))]
    if not parts and not problems:
        problems += _unread(root, elsewhere, is_pipeline=is_pipeline)
    return replace(folder, parts=sorted(parts, key=lambda part: part.name), elsewhere=elsewhere, problems=problems)


def _gone(index: Mapping[str, Any], folders: Sequence[str]) -> Iterator[str]:
    """Transformers that a pipeline lists; one that it does without has null for its class."""
    for name in TRANSFORMERS:
        value = index.get(name)
        if isinstance(value, list) and any(isinstance(item, str) for item in value) and name not in folders:
            yield f"{name}/: is gone, but {PIPELINE_INDEX} lists it: the engine finds no config and no weights there"


def _beside(folder: Folder, main: Part | None, part: Part, problems: list[str]) -> Part | None:
    """What the engine builds of a quantized folder beside the transformer ``main``; None if it does not quantize it.

    One of a pipeline that the tables do not know may be what the engine looks for.
    """
    if main is None or main.model is None:
        return part if part.found is not None else None
    kind, encoder = part.announced.kind, main.model.encoder
    if part.name != _ENCODER or encoder is None or folder.pipeline not in encoder.pipelines:
        if not _is_of_transformers(part):
            problems.append(
                f"{part.where}: is of quantized weights, but the engine never reads it: this pipeline loads "
                f"{part.name} without vLLM-Omni's quantization. Convert again, without {part.name}"
            )
    elif not part.holds_codes and kind is None:
        return None
    elif main.found is None or (kind and main.kind and kind != main.kind):
        problems.append(
            f"{part.name}/: holds quantized weights{f' of {kind}' if kind else ''}, but the engine builds it with "
            f"{main.where}, which has {main.kind or 'no method'}. Quantize both with one method"
        )
    else:
        return replace(part, lent=main.found)
    return None


def _is_of_transformers(part: Part) -> bool:
    """Whether its config announces a method of Transformers, which loads such a component by itself."""
    flag = part.announced.flag
    unflagged = flag is not None and flag[0] == FLAGS["fp8"] and flag[1] is None  # it has a method of that name too
    return part.found is not None and (part.announced.kind is None or unflagged)


def _unread(root: Path, elsewhere: Sequence[Part], *, is_pipeline: bool) -> Iterator[str]:
    """Why the engine would find nothing quantized."""
    looks = f"{TRANSFORMERS[0]}/{CONFIG_NAME}" if is_pipeline else f"{CONFIG_NAME} at the top"
    reason = f"the engine reads {looks} alone"
    if not is_pipeline:
        reason = f"without {PIPELINE_INDEX} {reason}"
    for part in elsewhere:
        yield f"{part.name}/: holds quantized weights, but {reason} and finds nothing quantized. Convert again"
    if not elsewhere:
        yield f"{looks}: the engine looks there, and there is nothing quantized. Convert again"


def _read_part(root: Path, name: str, problems: list[str]) -> Part:
    folder = root / name if name else root
    config = _json(folder / CONFIG_NAME, problems) if (folder / CONFIG_NAME).is_file() else {}
    file_problems: list[str] = []
    tensors: dict[str, Place] = {}
    files = _weight_files(folder, file_problems)
    for path in files:
        try:
            header = read_header(path)
        except OmniConvertError as error:
            file_problems.append(str(error))
            continue
        for tensor, stored in header.tensors.items():
            if tensor in tensors:
                file_problems.append(f"{path.name}: has {printable(tensor)}, which {tensors[tensor].path.name} has too")
            tensors[tensor] = Place(stored, path)
    file_problems += _index_problems(folder, tensors)
    return Part(name=name, folder=folder, config=config, tensors=tensors, file_problems=file_problems, files=len(files))


def _json(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return read_json(path)
    except OmniConvertError as error:
        problems.append(str(error))
        return {}


def _weight_files(folder: Path, problems: list[str]) -> list[Path]:
    """The files that the loader opens: those that the index names, else every safetensors file."""
    indexes = [name for name in INDEX_NAMES if (folder / name).is_file()]
    if len(indexes) > 1:
        problems.append(f"{folder.name}: has both {' and '.join(indexes)}: a ValueError. Remove the stale one")
    weight_map = _weight_map(folder / indexes[0]) if indexes else None
    if weight_map:
        names = sorted({str(name) for name in weight_map.values() if is_plain_name(name)})
        missing = [name for name in names if not (folder / name).is_file()]
        problems += [f"{name}: is missing, but {indexes[0]} names it: a FileNotFoundError" for name in missing]
        return [folder / name for name in names if name not in missing]
    if indexes:
        problems.append(f"{indexes[0]}: has no weight_map: a ValueError. Convert again")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        problems.append(f"{folder.name}: holds no safetensors file: a RuntimeError. Convert again")
    totals: dict[str, set[str]] = defaultdict(set)
    for path in files:
        if match := _FAMILY.fullmatch(path.name):
            totals[match[1]].add(match[2])
    problems += [
        f"{folder.name}: has no index, and shards {family}-*-of-{' and -of-'.join(sorted(counts))}: a ValueError. "
        "Remove the stale shards"
        for family, counts in totals.items()
        if len(counts) > 1
    ]
    return files


def _weight_map(path: Path) -> Mapping[str, Any]:
    try:
        weight_map = read_json(path).get("weight_map")
    except OmniConvertError:
        return {}
    return weight_map if isinstance(weight_map, dict) else {}


def _index_problems(folder: Path, tensors: Mapping[str, Place]) -> Iterator[str]:
    """An index and its shards must list the same tensors."""
    name = next((name for name in INDEX_NAMES if (folder / name).is_file()), None)
    weight_map = _weight_map(folder / name) if name else {}
    if not weight_map:
        return
    for tensor, file_name in weight_map.items():
        if tensor not in tensors or tensors[tensor].path.name != file_name:
            yield f"{name}: places {printable(tensor)} in {printable(file_name)}, which does not hold it. Convert again"
    for tensor, place in tensors.items():
        if tensor not in weight_map:
            yield f"{name}: does not list {printable(tensor)}, which {place.path.name} holds. Convert again"
