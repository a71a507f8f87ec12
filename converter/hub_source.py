"""A source by its name: a folder or file here, or a repository on the Hub, opened without its weights."""

from __future__ import annotations

import glob
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from omni_convert.converter.checkpoint import Checkpoint, open_checkpoint
from omni_convert.converter.hub_downloads import Downloads, HubFile
from omni_convert.converter.hub_errors import explained, retrying
from omni_convert.converter.hub_repo import Listing, Repo, list_repo, parse_repo, remember
from omni_convert.converter.hub_view import make_view
from omni_convert.converter.progress import progress_bar, without_bars
from omni_convert.converter.source import SourceFile
from omni_convert.formats.errors import OmniConvertError, UsageError, printable


class HubSource:
    """One commit of a repository, as a folder of stand-ins (``root``) and downloads that replace them."""

    def __init__(self, repo: Repo) -> None:
        """Raises:
        OmniConvertError: it cannot be seen or fetched, or is no checkpoint.
        """
        folder = tempfile.mkdtemp(prefix="omni-convert-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.root = Path(folder) / repo.id.partition("/")[2]
        self.root.mkdir()
        self.listing: Listing = list_repo(repo)
        self.downloads = Downloads(self.listing, self.root)
        try:
            with self.naming():
                self.left_out = make_view(self.listing, self.downloads, self.root)
        except OSError as error:
            raise OmniConvertError(
                f"{error.filename or folder}: cannot be written ({error.strerror}). Check the disk of temporary files "
                "(TMPDIR) and that of the Hub cache (HF_HOME), then run again."
            ) from error
        self._check_offline()
        remember(self.listing)

    def _check_offline(self) -> None:
        """Raises:
        OmniConvertError: nothing can be fetched, and something has to be.
        """
        from huggingface_hub import is_offline_mode

        needed = [name for name in self.listing.files if name not in self.left_out]
        missing = [name for name in needed if not self.downloads.cached(name)] if is_offline_mode() else []
        if missing:
            raise OmniConvertError(
                f"{self}: {printable(missing[0])} is not in the Hub cache ({len(missing)} of {len(needed)} files are "
                "not), and HF_HUB_OFFLINE is set. Unset it, then run again."
            )

    @property
    def warnings(self) -> list[str]:
        """What is not known of the source."""
        if self.listing.is_whole:
            return []
        return [
            f"{self}: HF_HUB_OFFLINE is set, and the Hub cache does not tell which files the repository has. These are "
            f"the {len(self.listing.files)} that it holds; others, such as a tokenizer, may be missing in the result. "
            "Without HF_HUB_OFFLINE, a --dry-run notes them."
        ]

    def __str__(self) -> str:
        return str(self.listing)

    def file(self, path: Path) -> SourceFile:
        """The file whose stand-in is ``path``."""
        name = path.relative_to(self.root).as_posix()
        return HubFile(path, self.listing.files[name].size, 0, name, self.downloads)

    @property
    def bytes_to_download(self) -> int:
        """Bytes that a whole conversion would fetch: what the Hub cache lacks."""
        return self.downloads.missing(name for name in self.listing.files if name not in self.left_out)

    def identity(self) -> dict[str, str]:
        """Where it comes from, for a journal or a manifest."""
        return {"repo": self.listing.repo.id, "revision": self.listing.commit}

    def facts(self, name: str) -> dict[str, Any]:
        """What is known of a file without reading it."""
        return self.listing.files[name].identity()

    def open(self, components: Sequence[str]) -> Checkpoint:
        with self.naming():
            opened = open_checkpoint(self.root, components)
        others = {name: self.file(self.root / name) for name in opened.others}
        return replace(opened, others=others, left_out={**opened.left_out, **self.left_out}, hub=self)

    def prepare(self, scratch: Path | None, refused: Sequence[str], *, compares: bool) -> None:
        """Have downloads go where they should. ``refused``: options that were given and need a folder. ``compares``:
        whether large files of the Hub cache are compared with their hash, as they are whenever the output is published.

        Raises:
            UsageError: there are any such options.
        """
        self.downloads.scratch = scratch
        self.downloads.compares = compares or scratch is not None
        for option in refused:
            raise UsageError(
                f"{option}: needs the source as a folder, found {self} on the Hub. Download it first: hf download "
                f"{self.listing.repo.id} --revision {self.listing.commit} --local-dir DIR"
            )

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Errors speak of the repository, not of stand-ins."""
        try:
            yield
        except OmniConvertError as error:
            raise type(error)(str(error).replace(str(self.root), str(self))) from error.__cause__


def find_repo(source: str | os.PathLike[str]) -> Repo | None:
    """The repository that ``source`` means; None if something of that name is here, or it is no such name."""
    text = os.fspath(source)
    return None if os.path.lexists(text) else parse_repo(text)


def open_source(source: str | os.PathLike[str], components: Sequence[str] = ()) -> Checkpoint:
    """``open_checkpoint`` of a path, or of ``org/name[@revision]`` on the Hub, if nothing here has that name."""
    repo = find_repo(source)
    return HubSource(repo).open(components) if repo else open_checkpoint(Path(source), components)


@contextmanager
def naming(checkpoint: Checkpoint) -> Iterator[None]:
    """Errors name the source as the user did."""
    if checkpoint.hub is None:
        yield
    else:
        with checkpoint.hub.naming():
            yield


@contextmanager
def fetching(checkpoint: Checkpoint, names: Sequence[str], *, show: bool) -> Iterator[None]:
    """Meanwhile, files are fetched ahead of their use, with a progress bar; nothing for a source that is here."""
    if (hub := checkpoint.hub) is None:
        yield
        return
    missing = hub.downloads.missing(names)
    with progress_bar("download", missing, show=show) as advance, hub.downloads.running(names, advance):
        yield


def converted_from(source: str | os.PathLike[str], recorded: Mapping[str, Any]) -> str | os.PathLike[str]:
    """``source``, at the commit that was converted if it is the repository of a manifest's ``source``, without a
    revision of its own."""
    repo = find_repo(source)
    if repo is None or repo.is_pinned or repo.id != recorded.get("repo"):
        return source
    return f"{repo.id}@{recorded['revision']}"


def local_folder(source: str | os.PathLike[str]) -> Path:
    """``source`` as a folder that is whole: of a repository what its model needs, in the Hub cache."""
    repo = find_repo(source)
    if repo is None:
        return Path(source)
    hub = HubSource(repo)
    from huggingface_hub import snapshot_download

    needed = [glob.escape(name) for name in hub.listing.files if name not in hub.left_out]
    with explained(repo), without_bars(unless=sys.stderr.isatty()):
        return Path(retrying(lambda: snapshot_download(repo.id, revision=hub.listing.commit, allow_patterns=needed)))
