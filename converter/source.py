"""Source files while they are converted: read in pieces, never written to, and the same from plan to output."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from omni_convert.formats.errors import OmniConvertError, SourceError
from omni_convert.formats.header import Header

_OPEN_FILES = 8


@dataclass(frozen=True)
class SourceFile:
    """A file, and its size and time of last change when the plan was made."""

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def of_shard(cls, header: Header) -> SourceFile:
        return cls(header.path, header.file_size, header.mtime_ns)

    @classmethod
    def now(cls, path: Path) -> SourceFile:
        stat = path.stat()
        return cls(path, stat.st_size, stat.st_mtime_ns)

    def located(self) -> Path:
        """Where its bytes are; waits until they are there."""
        return self.path

    def open(self) -> int:
        """A descriptor for reading.

        Raises:
            OmniConvertError: the file cannot be opened, or is not what it was when the plan was made.
        """
        path = self.located()
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise unreadable(path, error) from error
        self.compare(os.fstat(fd))
        return fd

    def release(self) -> None:
        """Nobody reads it any more."""

    def check(self) -> None:
        """Raises:
        OmniConvertError: the file is not what it was when the plan was made.
        """
        try:
            self.compare(self.path.stat())
        except OSError as error:
            raise unreadable(self.path, error) from error

    def compare(self, found: os.stat_result) -> None:
        """As ``check``, of the status that was found."""
        if (found.st_size, found.st_mtime_ns) == (self.size, self.mtime_ns):
            return
        what = f"has {found.st_size} bytes, expected {self.size}"
        if found.st_size == self.size:
            what = (
                f"was written to (its time of last change is {(found.st_mtime_ns - self.mtime_ns) / 1e9:.3f} s later)"
            )
        raise SourceError(
            f"{self.path}: {what}: it changed during the run. Nothing of this run can be kept: wait until the source "
            "is at rest, then run again."
        )


def unreadable(path: Path, error: OSError) -> OmniConvertError:
    return OmniConvertError(f"{path}: cannot be opened ({error.strerror}). Check its rights, then run again.")


class Reader:
    """Reads source files for one thread, of which it keeps the last few open."""

    def __init__(self) -> None:
        self._fds: dict[SourceFile, int] = {}

    def read(self, source: SourceFile, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``."""
        fd = self._fds.get(source)
        if fd is None:
            while len(self._fds) >= _OPEN_FILES:
                os.close(self._fds.pop(next(iter(self._fds))))
            fd = self._fds[source] = source.open()
        read_into(fd, buffer, offset, source.path)

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])


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
            raise SourceError(
                f"{path}: ends at byte {os.fstat(fd).st_size}, expected at least {offset + len(buffer)}. "
                "It became shorter during the run: restore it, then run again."
            )
        done += count
