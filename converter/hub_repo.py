"""A repository on the Hugging Face Hub: its name, the commit that a revision means now, and the files of that one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omni_convert.converter.hub_errors import check_client, explained, retrying
from omni_convert.formats.errors import OmniConvertError, printable
from omni_convert.formats.layout import is_plain_name, read_json

_ID = r"(?P<id>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*)"
_NAME = re.compile(rf"{_ID}(@(?P<revision>[^@\s]+))?")
_ADDRESS = re.compile(rf"(https?:/+(huggingface|hf)\.co/|hf:/+){_ID}((/tree/|@)(?P<revision>[^@\s]+?))?/?")
"""Of a page, or as huggingface_hub writes it; a path has one slash of two."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
"""A sha1, as of everything in git."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Repo:
    """``org/name``, and a branch, tag, commit or ``refs/pr/N``. ``is_pinned``: whether that was said."""

    id: str
    revision: str = "main"
    is_pinned: bool = False

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}"


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a commit. ``sha256``: of what lies in large file storage; of the rest only ``oid``, git's own hash, is
    known."""

    size: int
    oid: str | None
    sha256: str | None

    @property
    def etag(self) -> str | None:
        """The name of its content in the Hub cache."""
        return self.sha256 or self.oid

    def identity(self) -> dict[str, Any]:
        """What it is, for a journal or a manifest."""
        return {"size": self.size} | ({"sha256": self.sha256} if self.sha256 else {"git_oid": self.oid})


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files of one commit, by relative path. ``is_whole``: they are all, as the Hub itself listed them."""

    repo: Repo
    commit: str
    files: Mapping[str, RemoteFile]
    is_whole: bool = True

    def __str__(self) -> str:
        return f"{self.repo.id}@{self.commit[:12]}"


def parse_repo(text: str) -> Repo | None:
    """The repository that ``org/name``, ``org/name@revision`` or its address means; None for any other text."""
    match = _NAME.fullmatch(text) or _ADDRESS.fullmatch(text)
    if match is None:
        return None
    return Repo(match["id"], match["revision"] or Repo.revision, is_pinned=bool(match["revision"]))


def list_repo(repo: Repo) -> Listing:
    """Resolve the revision and list its files; offline, those that the Hub listed earlier, or else those in its cache.

    Raises:
        OmniConvertError: no such repository or revision, no right to see it, no connection, or a file whose name or
            size cannot be.
    """
    check_client()
    from huggingface_hub import HfApi, is_offline_mode
    from huggingface_hub.hf_api import RepoFile

    if is_offline_mode():
        return _list_cached(repo)
    api = HfApi(library_name="omni-convert")
    with explained(repo):
        commit = str(retrying(lambda: api.model_info(repo.id, revision=repo.revision).sha))
        entries = retrying(lambda: list(api.list_repo_tree(repo.id, revision=commit, recursive=True)))
    if not _COMMIT.fullmatch(commit):
        raise OmniConvertError(f"{repo}: the Hub says it is at {printable(commit)}, expected the hash of a commit.")
    files = {}
    for entry in entries:
        if isinstance(entry, RepoFile):
            lfs = entry.lfs
            files[_checked(repo, entry.path)] = RemoteFile(
                size=_size(repo, entry.path, lfs.size if lfs else entry.size),
                oid=entry.blob_id,
                sha256=_digest(repo, entry.path, lfs.sha256) if lfs else None,
            )
    return Listing(repo=repo, commit=commit, files=dict(sorted(files.items())))


def remember(listing: Listing) -> None:
    """Note in the Hub cache the files of the commit, and which one the revision means, as its library does: offline,
    nobody else knows."""
    noted = _noted_listing(listing.repo, listing.commit)
    if listing.is_whole and not noted.is_file():
        with suppress(OSError):
            noted.parent.mkdir(parents=True, exist_ok=True)
            partial = noted.with_name(f"{noted.name}.{os.getpid()}")
            partial.write_text(json.dumps({name: asdict(file) for name, file in listing.files.items()}))
            partial.replace(noted)
    ref = cache_folder(listing.repo) / "refs" / listing.repo.revision
    if listing.repo.revision == listing.commit or (ref.is_file() and ref.read_text() == listing.commit):
        return
    with suppress(OSError):  # a cache that is read-only serves as it is
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(listing.commit)


def cache_folder(repo: Repo) -> Path:
    """Where the Hub cache keeps a repository."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{repo.id.replace('/', '--')}"


def _noted_listing(repo: Repo, commit: str) -> Path:
    """Beside what huggingface_hub keeps of the repository, and deleted with that."""
    return cache_folder(repo) / "omni-convert" / f"{commit}.json"


def _list_cached(repo: Repo) -> Listing:
    folder = cache_folder(repo)
    ref = folder / "refs" / repo.revision
    commit = ref.read_text().strip() if ref.is_file() else repo.revision
    snapshot = folder / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
        raise OmniConvertError(
            f"{repo}: is no folder here, and the Hub cache does not hold it ({folder}); HF_HUB_OFFLINE is set, so the "
            "Hub was not asked. Unset it, or name a folder."
        )
    noted = _noted_listing(repo, commit)
    if noted.is_file():
        return Listing(repo=repo, commit=commit, files=_read_noted(repo, noted))
    files = {}
    for path in sorted(item for item in snapshot.rglob("*") if item.is_file()):
        name, etag = path.relative_to(snapshot).as_posix(), path.resolve().name
        size, oid, sha256 = path.stat().st_size, _COMMIT.fullmatch(etag), _SHA256.fullmatch(etag)  # a copy has no hash
        files[_checked(repo, name)] = RemoteFile(size=size, oid=oid and oid[0], sha256=sha256 and sha256[0])
    return Listing(repo=repo, commit=commit, files=files, is_whole=False)


def _read_noted(repo: Repo, path: Path) -> dict[str, RemoteFile]:
    files = {}
    for name, entry in read_json(path).items():
        known = entry if isinstance(entry, dict) else {}
        sha256 = known.get("sha256")
        files[_checked(repo, name)] = RemoteFile(
            size=_size(repo, name, known.get("size")),
            oid=known.get("oid"),
            sha256=_digest(repo, name, sha256) if sha256 else None,
        )
    return files


def _checked(repo: Repo, name: str) -> str:
    """A path that leads nowhere but below the folder into which it is written."""
    if not all(is_plain_name(part) for part in str(name).split("/")):
        raise OmniConvertError(
            f"{repo}: lists a file {printable(name)}, expected plain names and slashes. It is damaged or hostile: do "
            "not use it."
        )
    return name


def _size(repo: Repo, name: str, size: object) -> int:
    if type(size) is not int or not 0 <= size < 2**50:
        raise OmniConvertError(f"{repo}: says that {name} has {printable(size)} bytes, expected a size.")
    return size


def _digest(repo: Repo, name: str, digest: object) -> str:
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise OmniConvertError(f"{repo}: says that {name} has the sha256 {printable(digest)}, expected one.")
    return digest
