"""Files of a repository as they are needed: from the Hub cache, or downloaded into it, ahead of who reads them."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition, Event, Thread
from typing import Any

from omni_convert.converter.hashes import PIECE_BYTES, file_sha256
from omni_convert.converter.hub_errors import GivenUpError, explained, retrying
from omni_convert.converter.hub_repo import Listing, RemoteFile, cache_folder
from omni_convert.converter.hub_resume import comes_by_http, go_on
from omni_convert.converter.source import SourceFile
from omni_convert.formats.errors import OmniConvertError, SourceError
from omni_convert.formats.header import hash_header

_log = logging.getLogger(__name__)
_AHEAD = 2
"""Files that are downloaded before anybody asked for them."""
_SMALL = 16 << 20
"""Bytes up to which a file of the Hub cache is always compared with its hash: it takes some milliseconds."""


@dataclass(frozen=True)
class HubFile(SourceFile):
    """A file of a repository, pinned to a commit; ``path`` is its stand-in. It is fetched when it is first opened."""

    name: str
    downloads: Downloads = field(compare=False, repr=False)

    def located(self) -> Path:
        return self.downloads.wait(self.name)

    def check(self) -> None:
        """A commit does not change, and what was downloaded has been compared with its hash."""

    def compare(self, found: os.stat_result) -> None:
        if found.st_size != self.size:
            raise SourceError(
                f"{self.path}: has {found.st_size} bytes, expected {self.size}: it changed during the run."
            )

    def release(self) -> None:
        self.downloads.release(self.name)


class Downloads:
    """The files of a listing. While ``running``, a thread fetches them in order, at most a few before they are used.

    ``scratch``: where files go that the Hub cache lacks, until ``release``; None for the Hub cache, which keeps them.
    ``compares``: whether large files of the Hub cache are compared with their hash too, as all are that come.
    """

    def __init__(self, listing: Listing, view: Path) -> None:
        """``view``: the folder of stand-ins, with the headers that the plan was made from."""
        self.listing = listing
        self.view = view
        self.scratch: Path | None = None
        self.compares = False
        self._ready: dict[str, Path] = {}
        self._passing: dict[str, Path] = {}
        self._used: set[str] = set()
        self._wanted: list[str] = []
        self._order: list[str] = []
        self._error: BaseException | None = None
        self._thread: Thread | None = None
        self._stop = Event()
        self._change = Condition()
        self._progress: Callable[[int], None] = lambda count: None

    def cached(self, name: str) -> Path | None:
        """A file in the Hub cache, if it is whole there."""
        path = self._in_cache(name)
        return path if path and path.stat().st_size == self.listing.files[name].size else None

    def _in_cache(self, name: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.listing.repo.id, name, revision=self.listing.commit)
        return Path(found) if isinstance(found, str) else None

    def missing(self, names: Iterable[str]) -> int:
        """Bytes of these files that would be downloaded."""
        return sum(file.size - _size(self._part(file)) for file in self._lacking(names))

    def _lacking(self, names: Iterable[str]) -> list[RemoteFile]:
        """Those of these files that are not in the Hub cache, under any name."""
        blobs = cache_folder(self.listing.repo) / "blobs"
        files = {self.listing.files[name].etag or name: name for name in names}
        lacking = [name for etag, name in files.items() if not self.cached(name) and not (blobs / etag).is_file()]
        return [self.listing.files[name] for name in lacking]

    def _part(self, file: RemoteFile) -> Path:
        """Where a large file grows that comes by plain HTTP."""
        if self.scratch:
            return self.scratch / ".cache" / "omni-convert" / f"{file.etag}"
        return cache_folder(self.listing.repo) / "blobs" / f"{file.etag}.omni-convert.incomplete"

    def claim(self, disk: Path, names: Iterable[str]) -> int:
        """Bytes that downloads take of the disk on which the folder ``disk`` lies. Of ``scratch``, which lies beside an
        output that leaves the disk and is counted with it, what is there: negative, since each file serves, or goes.

        Raises:
            OmniConvertError: they go to another disk, which has too little.
        """
        if self.scratch:
            return -sum(map(_size, self.scratch.rglob("*")))
        needed = self.missing(names)
        home = cache_folder(self.listing.repo)
        parent = next(folder for folder in (home, *home.parents) if folder.exists())
        if parent.stat().st_dev == disk.stat().st_dev:
            return needed
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise OmniConvertError(
                f"{home}: the downloads take {needed} bytes, but the disk has {free} free. Free {needed - free} bytes, "
                "or have the cache elsewhere (HF_HOME)."
            )
        return 0

    @contextmanager
    def running(self, names: Sequence[str], progress: Callable[[int], None]) -> Iterator[None]:
        """Fetch ``names`` in this order meanwhile; ``progress`` receives the bytes that come."""
        self._order, self._progress = list(names), progress
        self._ready.clear()  # another run may compare more, and have its downloads elsewhere
        self._used.clear()
        self._clear_scratch()
        self._stop.clear()
        self._thread = Thread(target=self._run, name="omni-convert-downloads", daemon=True)
        self._thread.start()
        try:
            yield
        finally:
            self.give_up()
            thread, self._thread = self._thread, None
            thread.join(timeout=2)  # what is under way cannot always be stopped
            if not thread.is_alive():
                self._stop.clear()

    def _clear_scratch(self) -> None:
        """Remove what a run that was killed left there and nobody goes on with: parts of files that come by Xet, and
        whole or growing ones that are not needed any more."""
        if self.scratch is None:
            return
        parts = {self._part(self.listing.files[name]) for name in self._order}
        for path in [item for item in self.scratch.rglob("*") if item.is_file() and item not in parts]:
            name = path.relative_to(self.scratch).as_posix()
            is_notes = name.startswith(".cache/huggingface/")
            if name.endswith(".incomplete") if is_notes else name not in self._order:
                path.unlink()

    def give_up(self) -> None:
        """Let nobody wait any more, since the run stops."""
        self._stop.set()
        with self._change:
            self._change.notify_all()

    def wait(self, name: str) -> Path:
        """Where a file lies, once it is there.

        Raises:
            OmniConvertError: it, or one before it, could not be fetched.
        """
        if self._thread is None:
            return self.fetch(name)
        with self._change:
            self._used.add(name)
            if name not in self._ready:
                self._wanted.append(name)
            self._change.notify_all()
            while name not in self._ready:
                if self._error is not None:
                    raise self._error
                if self._stop.is_set():
                    raise GivenUpError("Stopped.")
                self._change.wait()
            return self._ready[name]

    def release(self, name: str) -> None:
        """Nobody reads this file any more: if it is no part of the Hub cache, it is removed."""
        with self._change:
            if path := self._passing.pop(name, None):
                del self._ready[name]
                os.truncate(path, 0)  # a thread may hold it open, which would hold its bytes
                path.unlink()
            self._change.notify_all()

    def fetch(self, name: str) -> Path:
        """Where a file lies, now; it is downloaded if need be, and compared with what the Hub said of it."""
        path = self._in_cache(name)
        if path and not self._is_right(name, path):
            _log.warning("%s: %s is damaged in the Hub cache, and fetched again.", self.listing, name)
            self._discard(path)
            path = None
        if path is None:
            with explained(self.listing.repo, name):
                path = retrying(lambda: self._download(name), self._stop.wait)
            self._check_hash(name, path)
            if self.scratch:
                self._passing[name] = path
        stand_in = self.view / name
        if name.endswith(".safetensors") and stand_in.exists() and hash_header(stand_in) != hash_header(path):
            raise SourceError(
                f"{path}: its header is not the one that the plan was made from. Run again, with --hash-source if it "
                "stays so."
            )
        return path

    def _run(self) -> None:
        while (name := self._next()) is not None:
            try:
                path = self.fetch(name)
            except BaseException as error:  # whoever waits raises it
                with self._change:
                    self._error = error
                    self._change.notify_all()
                return
            with self._change:
                self._ready[name] = path
                self._change.notify_all()

    def _next(self) -> str | None:
        """What to fetch: first what somebody waits for, then ahead of need; None when the run is over."""
        with self._change:
            while not self._stop.is_set():
                self._wanted = [name for name in self._wanted if name not in self._ready]
                self._order = [name for name in self._order if name not in self._ready and name not in self._used]
                if self._wanted:
                    return self._wanted[0]
                ahead = 0 if self.scratch else _AHEAD
                if self._order and len(self._ready.keys() - self._used) < ahead:
                    return self._order[0]
                self._change.wait()
        return None

    def _download(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        whole = self._grown(name)
        if whole and self.scratch:
            return whole
        bar = _counter(self._progress, self._stop)
        try:
            found = hf_hub_download(
                self.listing.repo.id,
                name,
                revision=self.listing.commit,
                local_dir=self.scratch,
                library_name="omni-convert",
                tqdm_class=bar,
            )
        except BaseException:
            self._progress(-bar.count)
            raise
        return Path(found)

    def _grown(self, name: str) -> Path | None:
        """A large file that came by plain HTTP, now or before this run; None if it has to come otherwise."""
        file = self.listing.files[name]
        whole = self.scratch / name if self.scratch else cache_folder(self.listing.repo) / "blobs" / f"{file.etag}"
        if whole.is_file() and whole.stat().st_size == file.size:
            return whole
        if whole.exists() or not comes_by_http(self.listing, name):
            return None
        done = go_on(self.listing, name, self._part(file), whole, self._progress, self._stop)
        return whole if done else None

    def _check_hash(self, name: str, path: Path) -> None:
        """Raises:
        SourceError: what came is not what the Hub said of this commit.
        """
        file = self.listing.files[name]
        found = _hash(path, file, self._stop)
        if (path.stat().st_size, found) == (file.size, file.etag):
            return
        self._discard(path)
        raise SourceError(
            f"{self.listing}: {name} came with the hash {found}, expected {file.etag}: it was changed or damaged on "
            "its way here, and was removed. Run again."
        )

    def _is_right(self, name: str, path: Path) -> bool:
        """Whether a file of the Hub cache has its size, and where that is compared its hash."""
        file = self.listing.files[name]
        if path.stat().st_size != file.size:
            return False
        is_compared = file.etag is not None and (self.compares or file.size <= _SMALL)
        return not is_compared or _hash(path, file, self._stop) == file.etag

    def _discard(self, path: Path) -> None:
        """Remove a download, with what the Hub cache names by its hash; nothing else to which a link may lead."""
        content = path.resolve()
        path.unlink(missing_ok=True)
        if content.parent == (cache_folder(self.listing.repo) / "blobs").resolve():
            content.unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _hash(path: Path, file: RemoteFile, stop: Event) -> str:
    def goes_on(count: int) -> None:
        if stop.is_set():
            raise GivenUpError("Stopped.")

    if file.sha256:
        return file_sha256(path, goes_on)
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as opened:
        while block := opened.read(PIECE_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _counter(progress: Callable[[int], None], stop: Event) -> Any:
    """What the client takes for a class of progress bars: it counts bytes, and ends the download when the run stops."""

    class Counter:
        count = 0

        def __init__(self, *args: object, **options: object) -> None:
            self.n = self.total = 0

        def update(self, count: float | None = 1) -> None:
            if stop.is_set():
                raise GivenUpError("Stopped.")
            Counter.count += int(count or 0)
            progress(int(count or 0))

        def nothing(self, *args: object, **options: object) -> None:
            """Nothing is shown."""

        update_transfer = set_postfix_str = set_transfer_postfix_str = set_description = refresh = close = nothing
        __exit__ = nothing

        def __enter__(self) -> Counter:
            return self

    return Counter
