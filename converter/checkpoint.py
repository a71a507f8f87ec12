"""A read-only view of a source: its components, shards and tensors by header, and the files beside them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni_convert.converter.files import check_inside, is_alternative_weights
from omni_convert.converter.source import SourceFile
from omni_convert.formats.errors import OmniConvertError, UsageError, printable
from omni_convert.formats.header import Header, StoredTensor, read_header
from omni_convert.formats.layout import (
    CONFIG_NAME,
    MANIFEST_NAME,
    MARKER_NAME,
    PIPELINE_INDEX,
    WEIGHT_NAMES,
    Shards,
    is_pickle,
    is_plain_name,
    pickle_message,
    read_index,
    read_json,
    read_shards,
)

if TYPE_CHECKING:
    from omni_convert.converter.hub_source import HubSource

_NOT_A_MODEL = "{path}: is no .safetensors file, expected one, or a model folder. Check the path."
_SHARD_NAME = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
DEFAULT_COMPONENTS = ("transformer", "transformer_2")
_SKIPPED_FOLDERS = {".git": "version control", ".cache": "download cache", "__pycache__": "Python's cache"}


@dataclass(frozen=True, kw_only=True)
class Component:
    """One model inside a checkpoint: a config and the shards of its weights. ``name`` is "" for the root."""

    name: str
    folder: Path
    config: Mapping[str, Any] | None
    shards: Shards

    @property
    def class_name(self) -> str:
        """The model class as the config names it, or "unknown"."""
        config = self.config or {}
        architectures = config.get("architectures")
        first = architectures[0] if isinstance(architectures, list) and architectures else None
        return str(config.get("_class_name") or first or config.get("model_type") or "unknown")

    def tensors(self) -> Iterator[tuple[str, StoredTensor, Header]]:
        return self.shards.tensors()

    def relative(self, file_name: str) -> str:
        """Path of one of its files relative to the checkpoint, with forward slashes."""
        return f"{self.name}/{file_name}" if self.name else file_name


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A source. ``components`` have open headers; ``others`` maps the relative paths of the remaining files
    to what they are.

    ``pipeline_class``: as ``model_index.json`` names it.
    """

    root: Path
    kind: str  # "pipeline", "model" or "file"
    components: tuple[Component, ...]
    others: Mapping[str, SourceFile]
    left_out: Mapping[str, str]
    pipeline_class: str | None = None
    hub: HubSource | None = None
    """The repository that ``root`` stands for."""

    @property
    def name(self) -> str:
        """Of the folder or the file."""
        return self.components[0].shards.headers[0].path.name if self.kind == "file" else self.root.name

    def shard_file(self, header: Header) -> SourceFile:
        """The file of a header of one of the components."""
        return self.hub.file(header.path) if self.hub else SourceFile.of_shard(header)

    def component_config(self, name: str) -> Mapping[str, Any] | None:
        """The config of any component of a pipeline, opened or not; None if it has none."""
        opened = {component.name: component.config for component in self.components}
        if name in opened or f"{name}/{CONFIG_NAME}" not in self.others:
            return opened.get(name)
        return read_json(self.root / name / CONFIG_NAME)


def open_checkpoint(path: Path, components: Sequence[str] = ()) -> Checkpoint:
    """Read the headers of the components to quantize; no weight is read, nothing is written.

    Args:
        path: a diffusers pipeline folder, a component or transformers folder, or one ``.safetensors`` file.
        components: of a pipeline, the components to open; empty for the diffusion transformers.

    Raises:
        OmniConvertError: anything missing, malformed, ambiguous or pointing out of the source.
    """
    path = Path(os.path.abspath(path))  # not resolve(): a Hub cache snapshot is a folder of links
    if path.is_file():
        return _open_file(path, components)
    if not path.is_dir():
        raise OmniConvertError(
            f"{path}: found nothing there, expected a model folder, a .safetensors file, or "
            "ORGANIZATION/NAME[@REVISION] of a repository on the Hub. A name without ORGANIZATION, such as gpt2, is a "
            "path."
        )
    if (path / MARKER_NAME).exists():
        raise OmniConvertError(f"{path}: is the unfinished output of a conversion. Run that conversion again.")
    if (path / PIPELINE_INDEX).is_file():
        names = _pipeline_components(path, components)
        opened = tuple(open_component(path, name) for name in names)
        class_name = read_json(path / PIPELINE_INDEX).get("_class_name")
        return replace(_with_other_files(path, "pipeline", opened), pipeline_class=str(class_name))
    _refuse_components(path, components)
    component = open_component(path, "")
    if component.config is None:
        raise OmniConvertError(
            f"{path}: found no {CONFIG_NAME}, expected one beside the weights. The download is incomplete: fetch it. "
            "To convert weights alone, name the .safetensors file."
        )
    return _with_other_files(path, "model", (component,))


def find_components(path: Path) -> list[str]:
    """Names of the folders of a pipeline that hold safetensors weights; [""] for a single model."""
    if not (path / PIPELINE_INDEX).is_file():
        return [""]
    folders = sorted(item for item in path.iterdir() if item.is_dir() and item.name not in _SKIPPED_FOLDERS)
    return [folder.name for folder in folders if any(folder.glob("*.safetensors"))]


def open_component(root: Path, name: str) -> Component:
    """One component of a checkpoint folder, quantized or not; "" for the folder itself."""
    folder = root / name if name else root
    config_path = folder / CONFIG_NAME
    config = None
    if config_path.is_file():
        check_inside(config_path, root)
        config = read_json(config_path)
    shards = read_shards(folder, lambda path: check_inside(path, root))
    return Component(name=name, folder=folder, config=config, shards=shards)


def _open_file(path: Path, components: Sequence[str]) -> Checkpoint:
    if path.suffix != ".safetensors":
        raise OmniConvertError(pickle_message(path) if is_pickle(path.name) else _NOT_A_MODEL.format(path=path))
    _refuse_components(path, components)
    if _SHARD_NAME.search(path.name):
        raise OmniConvertError(
            f"{path}: is one shard of several, expected a whole model. Convert the folder {path.parent} instead."
        )
    shards = Shards(headers=(read_header(path),), index_name=None, index_metadata={})
    component = Component(name="", folder=path.parent, config=_sibling_config(path), shards=shards)
    return Checkpoint(root=path.parent, kind="file", components=(component,), others={}, left_out={})


def _sibling_config(path: Path) -> dict[str, Any] | None:
    """The config that belongs to a file with one of the standard names; any other file stands alone."""
    config_path = path.with_name(CONFIG_NAME)
    if path.name not in WEIGHT_NAMES or not config_path.is_file():
        return None
    check_inside(config_path, path.parent)
    return read_json(config_path)


def _refuse_components(path: Path, components: Sequence[str]) -> None:
    if components:
        raise UsageError(f"--component {components[0]}: {path} is not a pipeline (it has no {PIPELINE_INDEX}).")


def _pipeline_components(path: Path, wanted: Sequence[str]) -> list[str]:
    known = _listed_folders(path)
    if missing := [name for name in wanted if name not in known]:
        raise UsageError(f"--component {missing[0]}: the pipeline {path} has {', '.join(known) or 'no components'}.")
    names = list(dict.fromkeys(wanted)) or [name for name in DEFAULT_COMPONENTS if name in known]
    if not names:
        with_weights = [name for name in known if any((path / name).glob("*.safetensors"))]
        raise UsageError(
            f"{path}: found no {' or '.join(DEFAULT_COMPONENTS)} in {PIPELINE_INDEX}. Name what to quantize with "
            f"--component, one of: {', '.join(with_weights) or 'none has safetensors weights'}."
        )
    for name in names:
        if not (path / name / CONFIG_NAME).is_file():
            raise OmniConvertError(
                f"{path / name}: found no {CONFIG_NAME}, expected one. The download is incomplete: fetch it."
            )
    return names


def _listed_folders(path: Path) -> list[str]:
    """The components of a pipeline; each must be there, with every shard that its index names."""
    index = path / PIPELINE_INDEX
    names = []
    for name, value in read_json(index).items():
        if not isinstance(value, list) or len(value) != 2 or not all(isinstance(part, str) for part in value):
            continue
        if not is_plain_name(name) or not (path / name).is_dir():
            raise OmniConvertError(
                f"{index}: lists {printable(name)}, but the pipeline has no such folder. The download is incomplete: "
                "fetch it."
            )
        names.append(name)
        for shard_index in (path / name).glob("*.safetensors.index*.json"):
            check_inside(shard_index, path)
            for file_name in sorted(set(read_index(shard_index)[0].values())):
                if not (path / name / file_name).is_file():
                    raise OmniConvertError(
                        f"{path / name / file_name}: is missing, expected because {shard_index.name} names it. "
                        "The download is incomplete: fetch it."
                    )
    return names


def _with_other_files(root: Path, kind: str, components: tuple[Component, ...]) -> Checkpoint:
    written = {component.relative(shard.path.name) for component in components for shard in component.shards.headers}
    written |= {c.relative(c.shards.index_name) for c in components if c.shards.index_name}
    written |= {component.relative(CONFIG_NAME) for component in components}
    folders = {component.folder for component in components}
    others: dict[str, SourceFile] = {}
    left_out = {f"{name}/": reason for name, reason in _SKIPPED_FOLDERS.items() if (root / name).is_dir()}
    for path in _walk(root):
        relative = path.relative_to(root).as_posix()
        if relative in written:
            continue
        if relative == MANIFEST_NAME:
            left_out[relative] = "manifest of an earlier conversion"
        elif relative.endswith(MARKER_NAME):
            left_out[relative] = "unfinished file of a conversion"
        elif path.parent in folders and is_alternative_weights(path.name):
            left_out[relative] = "another copy of the unquantized weights"
        else:
            check_inside(path, root)
            others[relative] = SourceFile.now(path)
    return Checkpoint(root=root, kind=kind, components=components, others=others, left_out=left_out)


def _refuse_unreadable(error: OSError) -> None:
    raise OmniConvertError(
        f"{error.filename}: cannot be read ({error.strerror}). Check its rights: what lies in it belongs to the model."
    ) from error


def _walk(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root, onerror=_refuse_unreadable):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS)
        for name in subfolders:
            if (Path(folder) / name).is_symlink():
                raise OmniConvertError(
                    f"{Path(folder) / name}: is a link to a folder, expected a folder. Links could lead out of the "
                    "source or in circles: copy the folder, or convert what the link points to."
                )
        for name in sorted(files):
            path = Path(folder) / name
            try:
                name.encode()
            except UnicodeEncodeError as error:
                raise OmniConvertError(f"{str(path)!a}: its name is not Unicode. Rename the file.") from error
            if not path.is_file():
                raise OmniConvertError(f"{path}: is a broken link or a special file, expected a file. Remove it.")
            yield path
