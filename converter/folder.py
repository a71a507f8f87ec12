"""The output folder: who may write into it, and what an interrupted or failed run leaves behind."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from omni_convert.converter.checkpoint import Checkpoint
from omni_convert.converter.output import PARTIAL_SUFFIX
from omni_convert.converter.plan import Plan, encode_json
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.layout import (
    CONFIG_NAME,
    MANIFEST_NAME,
    MARKER_NAME,
    PIPELINE_INDEX,
    is_plain_name,
    read_json,
)

_log = logging.getLogger(__name__)


class OutputFolder:
    """Takes a folder for one plan, and gives it back empty if the run fails.

    A marker file says "unfinished" from the first byte until everything is sealed. ``config.json``, the index and
    ``model_index.json`` are written last, so an interrupted folder cannot be loaded by mistake.
    """

    def __init__(self, plan: Plan, path: Path, job: dict[str, Any], *, overwrite: bool) -> None:
        self.plan = plan
        self.path = Path(os.path.abspath(path))
        self.job = job
        self.overwrite = overwrite
        self.seals = _seal_names(plan)
        self.copies = [name for name in plan.checkpoint.others if name not in self.seals]
        shards = [c.component.relative(s.source.path.name) for c in plan.components for s in c.shards]
        self.files = [*shards, *self.copies, *self.seals]
        self._stale: list[str] = []
        self._made: list[Path] = []
        self._lock: int | None = None

    def check(self, *, linked: bool) -> None:
        """Everything that can be refused before a byte is written.

        Raises:
            OmniConvertError: the folder holds something else, overlaps the source, or the disk is too small.
        """
        self._check_place()
        self._check_obstacles()
        self._check_contents()
        needed = self.plan.disk_bytes(linked=linked)
        replaced = (*self.files, *self._stale, *(name + PARTIAL_SUFFIX for name in self.files))
        reusable = sum(_freed_bytes(self.path / name) for name in replaced)
        free = shutil.disk_usage(_existing_parent(self.path)).free
        if needed > free + reusable:
            raise OmniConvertError(
                f"{self.path}: the output takes {needed} bytes, but the disk has {free} free. Free "
                f"{needed - free - reusable} bytes, choose another disk, or use --link for the files that only move."
            )

    def take(self) -> None:
        """Mark the folder as unfinished, then clear what is to be replaced, seals first.

        Raises:
            OmniConvertError: another process holds the folder.
        """
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock_marker()
        (self.path / MARKER_NAME).write_bytes(encode_json(self.job))
        self._remove_files()
        for name in self.files:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """A small file, at once under its final name or not at all."""
        partial = self.path / (name + PARTIAL_SUFFIX)
        partial.write_bytes(data)
        partial.replace(self.path / name)

    def finish(self) -> None:
        (self.path / MARKER_NAME).unlink()
        self._unlock()

    def give_back(self) -> None:
        """Remove everything of this run, if the folder was taken: it is as empty as before."""
        if self._lock is None:
            return
        self._remove_files()
        _remove(self.path / MARKER_NAME)
        folders = {parent for name in self.files for parent in (self.path / name).parents}
        for folder in sorted(folders, key=lambda item: -len(item.parts)):
            if folder.is_relative_to(self.path) and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        for folder in self._made:
            with suppress(OSError):  # gone already, or in use by now
                folder.rmdir()
        self._unlock()

    def _remove_files(self) -> None:
        """What this run writes or replaces, whole or not; seals first, so that it never looks complete."""
        for name in (*reversed(self.seals), *self._stale, *self.files):
            _remove(self.path / name)
            _remove(self.path / (name + PARTIAL_SUFFIX))

    def _lock_marker(self) -> None:
        """Hold the marker until ``finish`` or ``give_back``; the system lets go of it if this process dies."""
        marker = self.path / MARKER_NAME
        unfinished = marker.exists()
        self._lock = os.open(marker, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._unlock()
            raise OmniConvertError(
                f"{self.path}: another conversion is writing there now, expected a folder of our own. "
                "Wait until it is done, or choose another folder."
            ) from error
        except OSError as error:
            _log.warning("%s: cannot be locked (%s): see to it that no second run writes there", self.path, error)
        if not unfinished and not self.overwrite and len(list(self.path.iterdir())) > 1:
            marker.unlink()  # somebody finished here after we had looked
            self._unlock()
            raise OmniConvertError(f"{self.path}: is not empty any more. Choose another folder, or pass --overwrite.")

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_place(self) -> None:
        source, out = self.plan.checkpoint.root.resolve(), self.path.resolve()
        if self.path.exists() and not self.path.is_dir():
            raise OmniConvertError(f"{self.path}: is a file, expected a folder to write into. Choose another name.")
        single = self.plan.checkpoint.kind == "file"
        if out == source or (out.is_relative_to(source) and not single) or source.is_relative_to(out):
            raise OmniConvertError(
                f"{self.path}: the output folder and the source {source} are the same or one lies in the other. "
                "The source is never written to: choose a folder beside it."
            )
        for name in self.files:
            folder = _existing_parent((self.path / name).parent).resolve()
            if folder.is_relative_to(source) and not single:
                raise OmniConvertError(f"{self.path / name}: leads into the source {source}. Choose an empty folder.")

    def _check_obstacles(self) -> None:
        """No folder where a file must go, and no file where a folder must."""
        for name in self.files:
            path = self.path / name
            blocked = path if path.is_dir() else next((p for p in path.parents if p.exists() and not p.is_dir()), None)
            if blocked:
                raise OmniConvertError(
                    f"{blocked}: stands in the way of {path}: found a {'folder' if blocked == path else 'file'} there. "
                    "Remove it, or choose another folder."
                )

    def _check_contents(self) -> None:
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        if self.overwrite:
            self._stale = self._stale_files()
            return
        marker = self.path / MARKER_NAME
        if not marker.is_file():
            raise OmniConvertError(
                f"{self.path}: is not empty, expected an empty or new folder. Choose another, or pass --overwrite."
            )
        job = _marker_job(marker)
        if job is None and len(list(self.path.iterdir())) == 1:
            return  # killed while the marker was written: nothing else has happened yet
        if job != self.job:
            raise OmniConvertError(
                f"{self.path}: holds the unfinished output of another conversion (another source, recipe or "
                "version). Finish that one, choose another folder, or pass --overwrite."
            )

    def _check_weights_are_ours(self, earlier: Collection[str]) -> None:
        """``--overwrite`` replaces conversions, never somebody's only copy of a model."""
        for name in self.files:
            if name.endswith(".safetensors") and name not in earlier and (self.path / name).exists():
                raise OmniConvertError(
                    f"{self.path / name}: was not written by omni-convert ({MANIFEST_NAME} does not list it), and "
                    "--overwrite would replace it. Move it away, or choose another folder."
                )

    def _stale_files(self) -> list[str]:
        """Files of an earlier conversion that this one does not replace; weights of others are not touched."""
        manifest = self.path / MANIFEST_NAME
        earlier = read_json(manifest).get("files") if manifest.is_file() else None
        names = earlier if isinstance(earlier, dict) else {}
        if not (self.path / MARKER_NAME).is_file():
            self._check_weights_are_ours(names)
        stale = [name for name in names if name not in self.files and all(map(is_plain_name, name.split("/")))]
        for component in self.plan.components:
            folder = self.path / component.component.name
            for item in folder.glob("*.safetensors"):
                name = component.component.relative(item.name)
                if name not in self.files and name not in stale:
                    raise OmniConvertError(
                        f"{item}: holds weights that this conversion would leave beside its own; engines could load "
                        "both. Remove the file, or choose another folder."
                    )
        return [name for name in stale if (self.path / name).parent.resolve().is_relative_to(self.path.resolve())]


def job_identity(checkpoint: Checkpoint, recipe: dict[str, Any], version: str) -> dict[str, Any]:
    """What makes two runs the same job: the source's headers, the recipe and the version."""
    return {
        "omni_convert": version,
        "recipe": recipe,
        "source": str(checkpoint.root),
        "headers": {
            component.relative(shard.path.name): shard.sha256
            for component in checkpoint.components
            for shard in component.shards.headers
        },
    }


def _seal_names(plan: Plan) -> list[str]:
    """Files that make the folder loadable, in the order in which they are written."""
    components = [part.component for part in plan.components]
    names = [MANIFEST_NAME]
    names += [item.relative(item.shards.index_name) for item in components if item.shards.index_name]
    names += [item.relative(CONFIG_NAME) for item in components]
    return names + ([PIPELINE_INDEX] if plan.checkpoint.kind == "pipeline" else [])


def _marker_job(marker: Path) -> object:
    try:
        return json.loads(marker.read_bytes())
    except ValueError:
        return None


def _remove(path: Path) -> None:
    """Delete a file of ours; what is not there, or is a folder, is not ours."""
    with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
        path.unlink()


def _existing_parent(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _freed_bytes(path: Path) -> int:
    """What deleting a file frees: nothing while other hard links hold it."""
    return _size(path) if path.is_file() and path.stat().st_nlink == 1 else 0


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def total_size(root: Path, names: Iterable[str]) -> int:
    """Bytes of some files below ``root``."""
    return sum(_size(root / name) for name in names)
