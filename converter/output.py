"""One output file: written in any order by any thread, hashed front to back, renamed when whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

from omni_convert.formats.errors import OmniConvertError

PARTIAL_SUFFIX = ".omni_convert.partial"
"""Marks a file that is not whole yet."""


def read_into(fd: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill ``buffer`` from ``offset``.

    Raises:
        OmniConvertError: the file ends early (it was truncated after its header was read), or cannot be read.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError as error:
            raise OmniConvertError(
                f"{path}: cannot be read at byte {offset + done} ({error.strerror}). Check the disk, then run again."
            ) from error
        if count == 0:
            raise OmniConvertError(
                f"{path}: ends at byte {offset + done}, expected at least {offset + len(buffer)}. "
                "It became shorter during the run: restore it, then run again."
            )
        done += count


class OutputFile:
    """A file that appears under its name only when every byte is there.

    ``spans`` cut it into consecutive pieces ``(offset, size)``. Each is written once, by any thread; whichever
    thread finishes the piece that the hash waits for goes on hashing as far as the file is complete.
    """

    def __init__(self, path: Path, spans: Sequence[tuple[int, int]], *, link_to: Path | None = None) -> None:
        self.path = path
        self.size = spans[-1][0] + spans[-1][1] if spans else 0
        self._spans = spans
        self._done = [False] * len(spans)
        self._next = 0
        self._hash = hashlib.sha256()
        self._hashing = Lock()
        self._opening = Lock()
        self._fd: int | None = None
        self._link_to = link_to

    @property
    def sha256(self) -> str | None:
        """The digest, once the file is whole."""
        return self._hash.hexdigest() if self._next == len(self._spans) else None

    @property
    def partial_path(self) -> Path:
        return self.path.with_name(self.path.name + PARTIAL_SUFFIX)

    def write(self, span: int, data: memoryview | bytes) -> None:
        """Write one piece, then hash what is ready. For a hard link the bytes are there already."""
        offset, size = self._spans[span]
        if len(data) != size:
            raise AssertionError(f"{self.path}: span {span} has {size} bytes, got {len(data)}")
        fd = self._open()
        if self._link_to is None:
            self._write_all(fd, memoryview(data), offset)
        self._done[span] = True
        self._advance(span, data)

    def close(self) -> None:
        """Close without renaming: for a run that stops."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open(self) -> int:
        with self._opening:
            if self._fd is None:
                try:
                    if self._link_to is None:
                        self._fd = os.open(self.partial_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
                    else:
                        self.partial_path.unlink(missing_ok=True)
                        os.link(self._link_to.resolve(), self.partial_path)  # the file, not a link to it
                        self._fd = os.open(self.partial_path, os.O_RDONLY)
                except OSError as error:
                    raise self._error(error) from error
            return self._fd

    def _write_all(self, fd: int, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(fd, data[done:], offset + done)
            except OSError as error:
                raise self._error(error) from error

    def _error(self, error: OSError) -> OmniConvertError:
        remedy = "Free some space or choose another disk" if error.errno == 28 else "Check the folder and its rights"
        if self._link_to is not None:
            remedy = "Hard links need source and output on one file system: leave out --link"
        return OmniConvertError(f"{self.path}: cannot be written ({error.strerror}). {remedy}, then run again.")

    def _advance(self, span: int, data: memoryview | bytes) -> None:
        # A thread that finds the lock taken may leave: the holder looks again after releasing it.
        while self._ready() and self._hashing.acquire(blocking=False):
            try:
                while self._ready():
                    self._hash_next(span, data)
                if self._next == len(self._spans):
                    self.close()
                    self.partial_path.replace(self.path)
            finally:
                self._hashing.release()

    def _ready(self) -> bool:
        return self._next < len(self._spans) and self._done[self._next]

    def _hash_next(self, span: int, data: memoryview | bytes) -> None:
        offset, size = self._spans[self._next]
        if self._next == span:  # still in the processor's cache
            self._hash.update(data)
        else:
            buffer = memoryview(bytearray(size))
            assert self._fd is not None
            read_into(self._fd, buffer, offset, self.partial_path)
            self._hash.update(buffer)
        self._next += 1
