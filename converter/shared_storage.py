"""Whether another machine sees the files that this one sees, under the same paths."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omni_convert.converter.source import SourceFile
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.layout import MARKER_NAME


@dataclass(frozen=True, kw_only=True)
class View:
    """What the machine that leads a run sees: the source files, and the marker of the unfinished output, which names
    the run. It also has a version of this package, since another could write other bytes."""

    host: str
    version: str
    marker: Path
    content: bytes
    sources: tuple[SourceFile, ...]

    @classmethod
    def of(cls, out: Path, sources: Sequence[SourceFile]) -> View:
        """What this machine sees now; others will see it too, since it is sent to the disk."""
        from omni_convert import __version__

        marker = out / MARKER_NAME
        with marker.open("rb") as file:
            os.fsync(file.fileno())
            content = file.read()
        return cls(host=platform.node(), version=__version__, marker=marker, content=content, sources=tuple(sources))

    def check_source(self) -> None:
        """Raises:
        OmniConvertError: a source file is not what it was when the plan was made.
        """
        for source in self.sources:
            source.check()

    def check(self, node: str) -> None:
        """Whether the machine that runs this, ``node``, sees the same. The marker only grows meanwhile.

        Raises:
            OmniConvertError: it does not.
        """
        from omni_convert import __version__

        if __version__ != self.version:
            raise OmniConvertError(
                f"node {node}: found omni-convert {__version__}, expected {self.version} as on {self.host}. Install "
                "the same version on every node, then run again."
            )
        for source in self.sources:
            self._compare(node, source.path, _status(source.path), (source.size, source.mtime_ns))
        self._compare(node, self.marker, _head(self.marker, len(self.content)), self.content)

    def _compare(self, node: str, path: Path, found: object, expected: object) -> None:
        if found != expected:
            what = "does not have this file" if found is None else "has another file there"
            raise OmniConvertError(
                f"{path}: node {node} {what}, expected the one that {self.host} sees. The nodes of a cluster work on "
                "storage that they share: mount it under the same path on each, then run again."
            )


def _status(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _head(path: Path, size: int) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError:
        return None
