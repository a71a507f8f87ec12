"""What the tests' Hub keeps: users, and repositories with commits, branches and discussions. No HTTP here."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hub_xet import XetStore

DATE = "2026-01-02T03:04:05.000Z"
LARGE = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".npz")


class HubError(Exception):
    """What the Hub answers instead: a status, its ``X-Error-Code`` and text."""

    def __init__(self, status: int, text: str, code: str = "", **body: Any) -> None:
        super().__init__(text)
        self.status, self.text, self.code, self.body = status, text, code, body


@dataclass(frozen=True)
class User:
    name: str
    write: bool = True
    orgs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Blob:
    """A file's content. ``sha256``: of a large file, None for a small one, which git itself holds."""

    oid: str
    size: int
    path: Path
    sha256: str | None = None
    xet_hash: str | None = None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Discussion:
    num: int
    title: str
    author: str
    status: str = "draft"
    merged: str | None = None


@dataclass
class Repo:
    id: str
    private: bool = False
    gated: bool = False
    allowed: set[str] = field(default_factory=set)
    """Users who accepted the terms of a gated repository."""
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    discussions: list[Discussion] = field(default_factory=list)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def commit(self, revision: str) -> Commit:
        """The commit of a branch, ``refs/pr/N`` or SHA."""
        sha = self.refs.get(revision.removeprefix("refs/heads/"), revision)
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def history(self, revision: str) -> Iterator[Commit]:
        """A commit and those before it."""
        found: Commit | None = self.commit(revision)
        while found:
            yield found
            found = self.commits[found.parent] if found.parent else None

    def add(self, ref: str, title: str, files: dict[str, Blob], parent: str | None) -> Commit:
        seed = f"{self.id} {parent} {title} {sorted((name, blob.etag) for name, blob in files.items())}"
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), parent, title, dict(sorted(files.items())))
        self.commits[commit.sha] = commit
        self.refs[ref] = commit.sha
        return commit


class Store:
    """All of it; content lies below ``folder``. ``quota``: bytes that a private repository may hold."""

    def __init__(self, folder: Path, xet: bool) -> None:
        self.blobs = folder / "blobs"
        self.blobs.mkdir(parents=True)
        self.xet = XetStore(folder / "xet") if xet else None
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, Blob] = {}
        self.users: dict[str, User] = {}
        self.quota: int | None = None

    def create(self, id: str, **options: Any) -> Repo:
        if id in self.repos:
            raise HubError(409, "You already created this model repo", body={"url": id})
        self.repos[id] = repo = Repo(id, **options)
        self.commit(repo, "main", "initial commit", {".gitattributes": self.small(b"*.safetensors filter=lfs\n")}, ())
        return repo

    def add_folder(self, id: str, folder: Path, ref: str = "main", **options: Any) -> Repo:
        """A repository (new, or the next commit of one) with exactly the files of a local folder."""
        repo = self.repos.get(id) or self.create(id, **options)
        paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        files = {name: self._take(name, path) for name, path in paths.items()}
        self.commit(repo, ref, f"Upload {folder.name}", files, repo.commit(ref).files if ref in repo.refs else ())
        return repo

    def _take(self, name: str, path: Path) -> Blob:
        data = path.read_bytes()
        if not name.endswith(LARGE):
            return self.small(data)
        sha256 = hashlib.sha256(data).hexdigest()
        (self.blobs / sha256).write_bytes(data)
        return self.find_large(sha256, len(data))

    def small(self, data: bytes) -> Blob:
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        (self.blobs / oid).write_bytes(data)
        return Blob(oid, len(data), self.blobs / oid)

    def find_large(self, sha256: str, size: int) -> Blob:
        """The large file of this hash, uploaded by either way.

        Raises:
            HubError: Nobody uploaded it, or its content has another hash or size.
        """
        with self.lock:
            if sha256 not in self.large:
                path = self.blobs / sha256
                xet_hash = self.xet.adopt(sha256, size, path) if self.xet else None
                if not path.exists():
                    raise HubError(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
                data = path.read_bytes()
                if (hashlib.sha256(data).hexdigest(), len(data)) != (sha256, size):
                    path.unlink()
                    raise HubError(422, f"Size or hash of {sha256} differ")
                self.large[sha256] = Blob(self.small(_pointer(sha256, size)).oid, size, path, sha256, xet_hash)
            return self.large[sha256]

    def commit(
        self, repo: Repo, ref: str, title: str, added: dict[str, Blob], removed: Any, parent: str = ""
    ) -> Commit:
        """Add a commit to a ref. ``removed``: paths that go; ``parent``: what the client believes the ref to be."""
        with self.lock:
            head = repo.commit(ref) if ref in repo.refs else None
            if head is None and repo.refs:
                raise HubError(404, f"Invalid rev id: {ref}", "RevisionNotFound")
            if head and parent and parent != head.sha:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = {path: blob for path, blob in (head.files if head else {}).items() if path not in removed} | added
            if repo.private and self.quota is not None and sum(blob.size for blob in files.values()) > self.quota:
                raise HubError(403, "Private repository storage limit reached, please upgrade your plan.")
            return repo.add(ref, title, files, head.sha if head else None)

    def open_discussion(self, repo: Repo, title: str, author: str, pull_request: bool) -> Discussion:
        with self.lock:
            found = Discussion(len(repo.discussions) + 1, title, author)
            repo.discussions.append(found)
            if pull_request:
                repo.refs[f"refs/pr/{found.num}"] = repo.refs["main"]
            return found

    def set_status(self, repo: Repo, num: int, status: str) -> None:
        with self.lock:
            repo.discussions[num - 1] = replace(repo.discussions[num - 1], status=status)

    def merge(self, repo: Repo, num: int) -> Commit:
        with self.lock:
            found = repo.discussions[num - 1]
            head, main = repo.commit(f"refs/pr/{num}"), repo.commit("main")
            shown = {commit.sha for commit in repo.history("main")}
            base = next(commit for commit in repo.history(head.sha) if commit.sha in shown)
            ours, theirs = _changed(base, head), _changed(base, main)
            if any(head.files.get(path) != main.files.get(path) for path in ours & theirs):
                raise HubError(409, "This pull request has merge conflicts")
            added = {path: head.files[path] for path in ours if path in head.files}
            merged = self.commit(repo, "main", found.title, added, ours - set(added))
            repo.discussions[num - 1] = replace(found, status="merged", merged=merged.sha)
            return merged


def _changed(old: Commit, new: Commit) -> set[str]:
    """Paths that one has, or has otherwise."""
    return {path for path in {*old.files, *new.files} if old.files.get(path) != new.files.get(path)}


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
