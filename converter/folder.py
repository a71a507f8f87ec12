"""The output folder: who may write into it, what a run that stops leaves behind, and how the next goes on."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from omni_convert.converter.file_writer import FileRecord
from omni_convert.converter.files import freed_bytes, sync_file, sync_folder
from omni_convert.converter.groups import Group
from omni_convert.converter.hashes import file_problems
from omni_convert.converter.job import difference
from omni_convert.converter.journal import Entries, Journal, read_journal
from omni_convert.converter.layer_error import LayerError
from omni_convert.converter.output import partial_files, partial_path
from omni_convert.converter.plan import Plan
from omni_convert.formats.errors import OmniConvertError, UsageError
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
    """Takes a folder for one plan. A run that stops leaves it empty, or such that the same job can go on.

    The marker says "unfinished" from the first byte until everything is sealed, and lists the files that are whole.
    ``config.json``, the index and ``model_index.json`` are written last, so an interrupted folder cannot be loaded by
    mistake. ``files``: all that the run writes. ``records``: those that are whole.
    """

    def __init__(
        self,
        plan: Plan,
        path: Path,
        job: dict[str, Any],
        *,
        overwrite: bool = False,
        resume: bool = False,
        durable: bool = False,
    ) -> None:
        """``overwrite``: begin anew whatever is there. ``resume``: only go on. ``durable``: wait for the disk."""
        self.plan = plan
        self.path = Path(os.path.abspath(path))
        self.job = job
        self.overwrite = overwrite
        self.resume = resume
        self.durable = durable
        self.seals = _seal_names(plan)
        copies = [name for name in plan.checkpoint.others if name not in self.seals]
        self.files = [*plan.shards, *copies, *self.seals]
        self.records: dict[str, FileRecord] = {}
        self._stale: list[str] = []
        self._made: list[Path] = []
        self._lock: int | None = None
        self._journal: Journal | None = None
        self._sealed = False

    @property
    def missing(self) -> list[str]:
        """What is to be written before the seals, in the order of the plan."""
        return [name for name in self.files if name not in self.records and name not in self.seals]

    @property
    def errors(self) -> dict[tuple[str, str], LayerError]:
        """Of every quantized layer of the finished files, by component and layer, in the order of the plan."""
        return {
            (component, tensor.layer): self.records[name].errors[tensor.layer]
            for name, (component, shard) in self.plan.shards.items()
            if name in self.records
            for tensor in shard.tensors
            if tensor.layer in self.records[name].errors
        }

    @property
    def known(self) -> dict[Group, float]:
        """The magnitudes that finished files share with others."""
        return {
            (component, group): value
            for name, (component, _) in self.plan.shards.items()
            if name in self.records
            for group, value in self.records[name].largest.items()
        }

    def check(self, needed: int, *, kept: bool) -> None:
        """Everything that can be refused before a byte is written.

        ``needed``: bytes that the folder will take. ``kept``: whether what is written stays there.

        Raises:
            OmniConvertError: the folder holds something else, overlaps the source, or the disk is too small.
        """
        self._check_place()
        self._check_obstacles()
        self._check_contents()
        hub, disk = self.plan.checkpoint.hub, _existing_parent(self.path)
        needed += hub.downloads.claim(disk, self.missing) if hub else 0
        replaced = [self.path / name for name in (*self.files, *self._stale)]
        reusable = sum(map(freed_bytes, (*replaced, *self._partial_files())))
        free = shutil.disk_usage(disk).free
        if needed > free + reusable:
            what = "the output and the downloads take" if hub else "the output takes"
            remedy = "choose another disk" if kept else "have the work on another disk (--work)"
            if kept and not hub:
                remedy += ", or use --link for the files that only move"
            raise OmniConvertError(
                f"{self.path}: {what} {needed} bytes, but the disk has {free} free. Free "
                f"{needed - free - reusable} bytes, or {remedy}."
            )

    def take(self, threads: int, progress: Callable[[int], object], elsewhere: Mapping[str, str]) -> None:
        """Mark the folder as unfinished; keep what an earlier run of this job finished, clear the rest, seals first.

        ``threads``, ``progress``: who compares kept files with their sha256, and receives the bytes of what is done.
        ``elsewhere``: sha256 of files that are kept in another place, and need not be here.

        Raises:
            OmniConvertError: another process holds the folder.
        """
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        found = self._lock_marker()
        self.records = dict(found.files) if found else {}
        here = {name: record for name, record in self.records.items() if elsewhere.get(name) != record.sha256}
        expected = {name: (record.size, record.sha256) for name, record in here.items()}
        for name, problem in file_problems(self.path, expected, threads, progress).items():
            _log.warning("%s: %s It is written again.", self.path / name, problem)
            del self.records[name]
        self._remove_files(keep=self.records)
        for name in here.keys() & self.records if self.durable else ():
            sync_file(self.path / name)
        assert self._lock is not None
        self._journal = Journal(self._lock, durable=self.durable)
        self._journal.begin(self.job, found)
        for name in self.files:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)

    def record(self, name: str, record: FileRecord) -> None:
        """A file is whole and has its name."""
        assert self._journal is not None
        self.records[name] = record
        self._journal.add(name, record)

    def write(self, name: str, data: bytes) -> None:
        """A small file, at once under its final name or not at all."""
        partial = partial_path(self.path / name)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            if self.durable:
                os.fsync(file.fileno())
        partial.replace(self.path / name)
        if self.durable:
            sync_folder(partial.parent)

    def sync(self) -> None:
        """Have the disk know every name so far, if the output is to be durable."""
        if not self.durable:
            return
        inside = {folder for name in self.files for folder in (self.path / name).parents}
        for folder in {item for item in inside if item.is_relative_to(self.path)} | {
            made.parent for made in self._made
        }:
            sync_folder(folder)

    def finish(self) -> None:
        for path in self._partial_files():  # of workers that were lost
            _remove(path)
        self._journal, self._sealed = None, True  # whatever happens now, it is whole
        (self.path / MARKER_NAME).unlink()
        if self.durable:
            sync_folder(self.path)
        self._unlock()

    def stop(self, *, keep: bool) -> str:
        """For a run that ends early: remove what is not whole, and if not ``keep`` the rest too. Says what is kept."""
        if self._journal is None:  # not taken, or sealed: nothing here is ours to remove
            self._unlock()
            return f" {self.path} is complete." if self._sealed else ""
        kept = self.records if keep else {}
        with suppress(OSError):  # what cannot be removed must not hide why the run ended
            self._remove_files(keep=kept)
            if not kept:
                self._remove_empty()
        self._unlock()
        count = len(self.files) - len(self.seals)
        return (
            f" {len(kept)} of {count} files are finished and kept: the same command goes on from there." if kept else ""
        )

    def _remove_empty(self) -> None:
        """The marker, and the folders of this run."""
        _remove(self.path / MARKER_NAME)
        folders = {parent for name in self.files for parent in (self.path / name).parents}
        for folder in sorted(folders, key=lambda item: -len(item.parts)):
            if folder.is_relative_to(self.path) and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        for folder in self._made:
            with suppress(OSError):  # gone already, or in use by now
                folder.rmdir()

    def _remove_files(self, keep: Collection[str]) -> None:
        """What this run writes or replaces, whole or not; seals first, so that it never looks complete."""
        for name in (*reversed(self.seals), *self._stale, *self.files):
            if name not in keep:
                _remove(self.path / name)
        for path in self._partial_files():
            _remove(path)

    def _partial_files(self) -> Iterator[Path]:
        return partial_files([self.path / name for name in self.files])

    def _lock_marker(self) -> Entries | None:
        """Hold the marker until ``finish`` or ``stop``; the system lets go of it if this process dies.

        Returns what an earlier run of this job left, if this one goes on from there.
        """
        marker = self.path / MARKER_NAME
        unfinished = marker.exists()
        self._lock = os.open(marker, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._unlock()
            raise OmniConvertError(
                f"{self.path}: {_holder(marker)} is writing there now, expected a folder of our own. "
                "Wait until it is done, or choose another folder."
            ) from error
        except OSError as error:
            _log.warning("%s: cannot be locked (%s): see to it that no second run writes there", self.path, error)
        ours = marker.exists() and os.path.samestat(marker.stat(), os.fstat(self._lock))
        others = len(list(self.path.iterdir())) > (1 if ours else 0)
        entries = None if self.overwrite or not ours else self._own_entries(marker)
        if not ours or (not self.overwrite and others and (entries is None or not unfinished)):
            if ours and not read_journal(marker).size:
                marker.unlink()  # made by us: somebody finished here after we had looked
            self._unlock()
            raise OmniConvertError(
                f"{self.path}: was written by another run just now. Look at it, choose another folder, or pass "
                "--overwrite."
            )
        return entries

    def _own_entries(self, marker: Path) -> Entries | None:
        """What the journal says, if it is this job's."""
        found = read_journal(marker)
        if found.job is None or difference(found.job, self.job):
            return None
        files = {name: record for name, record in found.files.items() if name in self.files}
        return replace(found, files=files)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_place(self) -> None:
        source, out = _real(self.plan.checkpoint.root), _real(self.path)
        if self.path.exists() and not self.path.is_dir():
            raise OmniConvertError(f"{self.path}: is a file, expected a folder to write into. Choose another name.")
        single = self.plan.checkpoint.kind == "file"
        if out == source or (out.is_relative_to(source) and not single) or source.is_relative_to(out):
            raise OmniConvertError(
                f"{self.path}: the output folder and the source {source} are the same or one lies in the other. "
                "The source is never written to: choose a folder beside it."
            )
        for name in self.files:
            folder = _real(_existing_parent((self.path / name).parent))
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
            if self.resume:
                raise UsageError(f"--resume: {self.path} holds nothing to go on with. Begin without --resume.")
            return
        if self.overwrite:
            self._stale = self._stale_files()
            return
        marker = self.path / MARKER_NAME
        if not marker.is_file():
            raise OmniConvertError(
                f"{self.path}: is not empty, expected an empty or new folder. Choose another, or pass --overwrite."
            )
        found = read_journal(marker)
        if found.job is None and len(list(self.path.iterdir())) == 1:
            return  # killed while the marker was written: nothing else has happened yet
        if found.job is None:
            raise OmniConvertError(
                f"{self.path}: holds files beside an empty {MARKER_NAME}, expected an empty or new folder. Choose "
                "another, or pass --overwrite."
            )
        if reason := difference(found.job, self.job):
            raise OmniConvertError(
                f"{self.path}: holds the unfinished output of another job: {reason}. Finish that one, choose another "
                "folder, or begin anew with --overwrite."
            )
        self.records = {name: record for name, record in found.files.items() if name in self.files}

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
        names = dict(earlier) if isinstance(earlier, dict) else {}
        if (self.path / MARKER_NAME).is_file():
            with suppress(OmniConvertError):  # a damaged journal names nothing
                names |= read_journal(self.path / MARKER_NAME).files
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
        return [name for name in stale if _real((self.path / name).parent).is_relative_to(_real(self.path))]


def _seal_names(plan: Plan) -> list[str]:
    """Files that make the folder loadable, in the order in which they are written."""
    components = [part.component for part in plan.components]
    names = [MANIFEST_NAME]
    names += [name for name in plan.checkpoint.others if _seals_component(name)]
    names += [item.relative(item.shards.index_name) for item in components if item.shards.index_name]
    names += [item.relative(CONFIG_NAME) for item in components]
    return names + ([PIPELINE_INDEX] if plan.checkpoint.kind == "pipeline" else [])


def _seals_component(name: str) -> bool:
    """Whether a file that arrives unchanged makes a component look complete."""
    return name.endswith((f"/{CONFIG_NAME}", ".safetensors.index.json"))


def _holder(marker: Path) -> str:
    try:
        return read_journal(marker).holder
    except OmniConvertError:  # it is being written
        return Entries.holder


def _remove(path: Path) -> None:
    """Delete a file of ours; what is not there, or is a folder, is not ours."""
    with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
        path.unlink()


def _real(path: Path) -> Path:
    """Without links; ``Path.resolve`` fails where they lead in circles."""
    return Path(os.path.realpath(path))


def _existing_parent(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())
