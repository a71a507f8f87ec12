"""One output file: written in any order by any thread, hashed front to back, renamed when whole."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from threading import Lock

from omni_convert.converter.source import read_into
from omni_convert.formats.errors import OmniConvertError

PARTIAL_SUFFIX = ".omni_convert.partial"
"""Marks a file that is not whole yet."""
_ATTEMPT = re.compile(r"(.+?)(?:\.[0-9a-f]{8})?" + re.escape(PARTIAL_SUFFIX))


def partial_path(path: Path, attempt: str = "") -> Path:
    """Where a file is written until it is whole; ``attempt``: 8 hexadecimal digits, where others may write it too."""
    return path.with_name(f"{path.name}{attempt and '.'}{attempt}{PARTIAL_SUFFIX}")


def partial_files(paths: Iterable[Path]) -> Iterator[Path]:
    """What attempts to write ``paths`` left."""
    wanted = set(paths)
    for folder in dict.fromkeys(path.parent for path in paths):
        for item in folder.glob(f"*{PARTIAL_SUFFIX}"):
            match = _ATTEMPT.fullmatch(item.name)
            stem = folder / item.name.removesuffix(PARTIAL_SUFFIX)  # may itself end like an attempt
            if stem in wanted or (match and folder / match[1] in wanted):
                yield item


class OutputFile:
    """A file that appears under its name only when every byte is there.

    ``spans`` cut it into pieces ``(offset, size)``, in any order, that cover it. Each is written once, by any thread;
    whichever thread finishes the piece that the hash waits for goes on hashing as far as the file is complete.
    """

    def __init__(
        self,
        path: Path,
        spans: Iterable[tuple[int, int]],
        *,
        link_to: Path | None = None,
        durable: bool = False,
        attempt: str = "",
        whole: Callable[[OutputFile], None] = lambda file: file.publish(),
    ) -> None:
        """``link_to``: a file of the same content to link to. ``durable``: the disk has every byte before the name.

        ``attempt``: as ``partial_path`` takes it. ``whole``: called once, when all is written and hashed; gives the
        file its name.
        """
        self.path = path
        self.partial_path = partial_path(path, attempt)
        self._spans = sorted(spans)
        self.size = sum(self._spans[-1]) if self._spans else 0
        self._place = {offset: place for place, (offset, _) in enumerate(self._spans)}
        self._done = [False] * len(self._spans)
        self._next = 0
        self._hash = hashlib.sha256()
        self._hashing = Lock()
        self._opening = Lock()
        self._writing = Lock()
        self._fd: int | None = None
        self._link_to = link_to
        self._durable = durable
        self._whole = whole
        self._back = memoryview(b"")

    @property
    def sha256(self) -> str | None:
        """The digest, once the file is whole."""
        return self._hash.hexdigest() if self._next == len(self._spans) else None

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Write one piece, then hash what is ready. For a hard link the bytes are there already."""
        place = self._place[offset]
        if len(data) != self._spans[place][1]:
            raise AssertionError(f"{self.path}: {self._spans[place][1]} bytes belong at {offset}, got {len(data)}")
        fd = self._open()
        if self._link_to is None:
            with self._writing:  # the file system lets one at a time in, and the others would spin
                _write_all(self.path, fd, memoryview(data), offset)
        self._done[place] = True
        self._advance(place, data)

    def publish(self) -> None:
        """Give the file its name."""
        self.finish()
        try:
            self.partial_path.replace(self.path)
        except OSError as error:
            raise self._error(error) from error

    def finish(self) -> None:
        """Close a file that is whole, for somebody else to name."""
        try:
            if self._durable and self._fd is not None:
                os.fsync(self._fd)
            self.close()
        except OSError as error:
            raise self._error(error) from error

    def close(self) -> None:
        """Close without renaming: for a run that stops."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        self._back = memoryview(b"")

    def _open(self) -> int:
        with self._opening:
            if self._fd is None:
                try:
                    self.partial_path.unlink(missing_ok=True)  # never truncated: it may be a link to the source
                    if self._link_to is None:
                        self._fd = os.open(self.partial_path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                    else:
                        os.link(self._link_to.resolve(), self.partial_path)  # the file, not a link to it
                        self._fd = os.open(self.partial_path, os.O_RDONLY)
                except OSError as error:
                    raise self._error(error) from error
            return self._fd

    def _error(self, error: OSError) -> OmniConvertError:
        return _unwritable(self.path, error, linked=self._link_to is not None)

    def _advance(self, place: int, data: memoryview | bytes) -> None:
        # A thread that finds the lock taken may leave: the holder looks again after releasing it.
        while self._ready() and self._hashing.acquire(blocking=False):
            try:
                before = self._next
                while self._ready():
                    self._hash_next(place, data)
                if before < self._next == len(self._spans):
                    self._whole(self)
            finally:
                self._hashing.release()

    def _ready(self) -> bool:
        return self._next < len(self._spans) and self._done[self._next]

    def _hash_next(self, place: int, data: memoryview | bytes) -> None:
        offset, size = self._spans[self._next]
        if self._next == place:  # still in the processor's cache
            self._hash.update(data)
        else:
            if len(self._back) < size:
                self._back = memoryview(bytearray(size))
            assert self._fd is not None
            read_into(self._fd, self._back[:size], offset, self.partial_path)
            self._hash.update(self._back[:size])
        self._next += 1


class PartFile:
    """The place of one part in a file that several processes write, on several machines, each its own bytes.

    It is open for writing only, and has its size from the first moment. Otherwise an NFS client that is given some of
    the bytes of a page reads the others, or takes them for zeros behind the end, and may send the whole page over what
    another machine wrote there meanwhile.
    """

    def __init__(self, path: Path, attempt: str, size: int, *, durable: bool) -> None:
        """``path``: of the file when it is whole; ``size``: its bytes; ``attempt``: as ``partial_path`` takes it."""
        self.path = path
        self._durable = durable
        self._fd: int | None = None
        try:
            self._fd = os.open(partial_path(path, attempt), os.O_WRONLY | os.O_CREAT, 0o666)
            os.ftruncate(self._fd, size)
        except OSError as error:
            self.close()
            raise _unwritable(path, error) from error

    def write(self, offset: int, data: memoryview | bytes) -> None:
        assert self._fd is not None
        _write_all(self.path, self._fd, memoryview(data), offset)

    def finish(self) -> None:
        """Close the file; whoever opens it from now on finds these bytes. What a network could not write shows here."""
        try:
            if self._durable and self._fd is not None:
                os.fsync(self._fd)
            self.close()
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def close(self) -> None:
        """Close a file that stays as it is: for a run that stops."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)


def _write_all(path: Path, fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(fd, data[done:], offset + done)
        except OSError as error:
            raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError, *, linked: bool = False) -> OmniConvertError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "Free some space or choose another disk" if full else "Check the folder and its rights"
    if linked:
        remedy = "Hard links need source and output on one file system: leave out --link"
    return OmniConvertError(f"{path}: cannot be written ({error.strerror}). {remedy}, then run again.")
