"""The folder of what is under way into a repository: its name tells the repository and the job, so it is ours alone."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omni_convert.converter.job import difference
from omni_convert.converter.journal import read_journal
from omni_convert.formats.errors import OmniConvertError, UsageError
from omni_convert.formats.layout import MARKER_NAME


class Work:
    """A job's place below ``parent``, by default in the cache of huggingface_hub. Nothing beside it is touched."""

    def __init__(self, parent: str | os.PathLike[str] | None, repo_id: str, job: Mapping[str, Any]) -> None:
        self.job = job
        self.identity = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:12]
        self.repo_id = repo_id
        self._home = _home(parent)
        self.path = self._home / f"{_prefix(repo_id)}{self.identity}"

    @property
    def out(self) -> Path:
        return self.path / "out"

    @property
    def downloads(self) -> Path:
        return self.path / "downloads"

    @property
    def stand_ins(self) -> Path:
        """Of weights that left the disk."""
        return self.path / "stand-ins"

    def check(self, *, resume: bool, overwrite: bool) -> list[str]:
        """Have no other unfinished work for this repository; ``overwrite`` removes it. Returns its identities.

        Raises:
            OmniConvertError: there is some, and it is kept or in use; or nothing to ``resume``.
        """
        if resume and not (self.out / MARKER_NAME).is_file():
            raise UsageError(f"--resume: {self.path} holds nothing to go on with. Begin without --resume.")
        others = self._others()
        for other in others:
            if not overwrite:
                raise self._unfinished(other)
            _remove_unused(other)
        return [other.name.removeprefix(_prefix(self.repo_id)) for other in others]

    def remove(self) -> None:
        """What the run made; the folder too, unless somebody keeps other files there."""
        _remove(self.path)

    def _others(self) -> list[Path]:
        """Places of other jobs for this repository that did not come to their end."""
        name = re.compile(re.escape(_prefix(self.repo_id)) + "[0-9a-f]{12}")
        found = [item for item in self._home.iterdir() if name.fullmatch(item.name)] if self._home.is_dir() else []
        return sorted(item for item in found if item != self.path and (item / "out" / MARKER_NAME).is_file())

    def _unfinished(self, other: Path) -> OmniConvertError:
        before = read_journal(other / "out" / MARKER_NAME).job or {}
        came_from = before.get("repository")
        source = f"{came_from['repo']}@{came_from['revision']}" if isinstance(came_from, dict) else "its source"
        return OmniConvertError(
            f"{other}: holds unfinished work for {self.repo_id}, of another job: {difference(before, self.job)}. "
            f"Go on with that one ({source}, and its options), or begin anew with --overwrite, which removes it."
        )


@contextmanager
def analysis_folder(parent: str | os.PathLike[str] | None, repo_id: str) -> Iterator[Path]:
    """Where an analysis for a repository has its downloads, beside the places of jobs; it is removed in the end.

    Raises:
        OmniConvertError: another run has its own there now.
    """
    path = _home(parent) / f"{_prefix(repo_id)}analysis"
    path.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OmniConvertError(
                f"{path}: another run for {repo_id} is reading its source there now. Wait until it is done, or stop it."
            ) from error
        except OSError:  # a file system without locks
            pass
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)


def _remove_unused(path: Path) -> None:
    marker = path / "out" / MARKER_NAME
    with marker.open("rb+") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OmniConvertError(
                f"{path}: {read_journal(marker).holder} is writing there now. Wait until it is done, or stop it."
            ) from error
        except OSError:  # a file system without locks
            pass
        _remove(path)


def _remove(path: Path) -> None:
    for name in ("out", "downloads", "stand-ins"):
        shutil.rmtree(path / name, ignore_errors=True)
    with suppress(OSError):
        path.rmdir()


def _home(parent: str | os.PathLike[str] | None) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "omni-convert" if parent is None else Path(os.path.abspath(parent))


def _prefix(repo_id: str) -> str:
    return f"{repo_id.replace('/', '--')}--"
