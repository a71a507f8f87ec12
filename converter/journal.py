"""The marker of an unfinished output: which job writes there, who runs it, and which files are whole.

One JSON object per line: ``{"job": ...}`` first, then ``{"run": ...}`` for every process that took the folder, and
``{"file": ...}`` for every file that has its name. A process may die while it writes a line: the last may be cut off.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from omni_convert.converter.file_writer import FileRecord
from omni_convert.converter.layer_error import LayerError
from omni_convert.converter.statistics import LayerStatistics
from omni_convert.formats.errors import OmniConvertError, printable


@dataclass(frozen=True, kw_only=True)
class Entries:
    """What a journal says. ``job`` is None if nothing was written yet. ``size``: bytes of its whole lines."""

    job: Mapping[str, Any] | None = None
    holder: str = "another process"
    files: dict[str, FileRecord] = field(default_factory=dict)
    size: int = 0


class Journal:
    """A journal that is held by this process; ``add`` may be called from any thread."""

    def __init__(self, fd: int, *, durable: bool) -> None:
        self._fd = fd
        self._durable = durable
        self._lock = Lock()

    def begin(self, job: Mapping[str, Any], keep: Entries | None) -> None:
        """Start a journal of ``job``, or go on after what is kept."""
        os.ftruncate(self._fd, keep.size if keep else 0)
        os.lseek(self._fd, 0, os.SEEK_END)
        if keep is None:
            self._write({"job": job})
        self._write({"run": {"process": os.getpid(), "host": socket.gethostname()}})

    def add(self, name: str, record: FileRecord) -> None:
        """A file has its name."""
        errors = {layer: _sums(error) for layer, error in record.errors.items()}
        entry = {"sha256": record.sha256, "size": record.size, "errors": errors, "largest": record.largest}
        self._write({"file": name, **entry})

    def _write(self, entry: Mapping[str, Any]) -> None:
        line = memoryview(json.dumps(entry).encode() + b"\n")
        with self._lock:
            while line:
                line = line[os.write(self._fd, line) :]
            if self._durable:
                os.fsync(self._fd)


def read_journal(path: Path) -> Entries:
    """Raises:
    OmniConvertError: it is damaged, other than by the end of a process.
    """
    job, holder, files, size = None, Entries.holder, {}, 0
    try:
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            entry = json.loads(line)
            if "job" in entry:
                job = dict(entry["job"])
            elif "run" in entry:
                holder = f"process {int(entry['run']['process'])} on {printable(str(entry['run']['host']))}"
            else:
                files[str(entry["file"])] = _record(entry)
            size += len(line)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OmniConvertError(
            f"{path}: is damaged ({type(error).__name__}: {str(error)[:200]}), expected the journal of an unfinished "
            "conversion. Start over with --overwrite, or choose another folder."
        ) from error
    return Entries(job=job, holder=holder, files=files, size=size)


def _record(entry: Mapping[str, Any]) -> FileRecord:
    return FileRecord(
        sha256=str(entry["sha256"]),
        size=int(entry["size"]),
        errors={layer: _error(*sums) for layer, sums in entry["errors"].items()},
        largest={group: float(value) for group, value in entry["largest"].items()},
    )


def _sums(error: LayerError) -> list[Any]:
    """What ``_error`` takes."""
    sums: list[Any] = [error.signal, error.noise, error.own_noise]
    return [*sums, asdict(error.statistics)] if error.statistics else sums


def _error(
    signal: float, noise: float, own_noise: float | None, statistics: Mapping[str, Any] | None = None
) -> LayerError:
    return LayerError(
        signal=float(signal),
        noise=float(noise),
        own_noise=None if own_noise is None else float(own_noise),
        statistics=LayerStatistics.parse(statistics) if statistics else None,
    )
