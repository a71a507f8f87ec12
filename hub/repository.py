"""A model repository on the Hub, and a pull request in which a model grows until it is whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from omni_convert.converter.hub_errors import check_client
from omni_convert.formats.errors import OmniConvertError, UsageError, printable
from omni_convert.hub.errors import HubError, attempt

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, Discussion

_T = TypeVar("_T")
MAIN = "main"
_LONGEST_TITLE = 150
_DESCRIPTION = "Made by omni-convert, which adds files until the model is whole; its config comes with the last commit."


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a repository. ``sha256``: of a large one, None for a small one; ``oid``: of its git blob."""

    size: int
    sha256: str | None
    oid: str

    def is_same(self, size: int, sha256: str, oid: Callable[[], str]) -> bool:
        """Whether a local file has these bytes; ``oid``: its name in git, asked for of a small one only."""
        if size != self.size:
            return False
        return sha256 == self.sha256 if self.sha256 else oid() == self.oid


def git_oid(data: bytes) -> str:
    """The name of a file's content in git."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def parse_repo_id(text: str, *, is_base: bool = False) -> str:
    """``org/name``, checked. ``is_base``: of a model that was converted; old ones, as ``gpt2``, have no org.

    Raises:
        UsageError: not the name of a model repository.
    """
    check_client()
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    wrong = UsageError(
        f"{'--base-model: ' if is_base else ''}{printable(text)!r} is no name of a model repository, expected "
        f"{'ORGANIZATION/NAME' if is_base else 'ORGANIZATION/NAME or YOU/NAME'}, of letters, digits, '-', '_' and '.'."
    )
    if text.count("/") != 1 and not (is_base and "/" not in text):
        raise wrong
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise wrong from error
    return text


class Repository:
    """Where a model is published, with the rights of the token that huggingface_hub finds (login or HF_TOKEN)."""

    def __init__(self, repo_id: str) -> None:
        self.id = parse_repo_id(repo_id)  # before the client is imported, which this checks
        from huggingface_hub import HfApi

        from omni_convert import __version__

        self.api = HfApi(library_name="omni-convert", library_version=__version__)
        self._user: str | None = None

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{self.id}"

    def user(self) -> str:
        """Whose token it is.

        Raises:
            HubError: nobody's.
        """
        if self._user is None:
            self._user = str(self._try(lambda: self.api.whoami()["name"], "cannot be written to"))
        return self._user

    def files(self, revision: str = MAIN) -> dict[str, RemoteFile] | None:
        """What a revision holds; None if there is no such repository."""
        from huggingface_hub.hf_api import RepoFile

        try:
            entries = self._try(
                lambda: list(self.api.list_repo_tree(self.id, recursive=True, revision=revision)), "cannot be read"
            )
        except HubError as error:
            if error.status == 404:
                return None
            raise
        return {
            entry.path: RemoteFile(size=entry.size, sha256=entry.lfs.sha256 if entry.lfs else None, oid=entry.blob_id)
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    def commits(self, revision: str = MAIN) -> list[str]:
        """Those of a revision, the last one first."""
        found = self._try(lambda: self.api.list_repo_commits(self.id, revision=revision), "cannot be read")
        return [commit.commit_id for commit in found]

    def read(self, name: str, revision: str = MAIN) -> Path:
        """A local copy of a small file."""
        return Path(
            self._try(lambda: self.api.hf_hub_download(self.id, name, revision=revision), f"{name} cannot be read")
        )

    def create(self, *, private: bool) -> None:
        """Make it if it is not there.

        Raises:
            UsageError: ``private``, and everybody sees the one that is there.
        """
        self._try(lambda: self.api.create_repo(self.id, private=private or None, exist_ok=True), "cannot be created")
        if private:
            self.check_private()

    def check_private(self) -> None:
        """Raises:
        UsageError: everybody sees it.
        """
        if not self._try(lambda: self.api.repo_info(self.id), "cannot be read").private:
            raise UsageError(
                f"{self.url}: is there and public, so --private would not be kept. Make it private in its settings "
                f"({self.url}/settings), or leave out --private."
            )

    def check_write(self) -> None:
        """Before a byte is uploaded: everybody may open a pull request, but not merge it."""
        self._try(lambda: self.api.auth_check(self.id, write=True), "cannot be written to")

    def check_metadata(self, card: str) -> None:
        """Have the Hub check the metadata of a card, as it does of every commit.

        Raises:
            HubError: it would take no commit with that card.
        """
        from huggingface_hub.utils import get_session, hf_raise_for_status

        def ask() -> None:
            body = {"repoType": "model", "content": card}
            hf_raise_for_status(get_session().post(f"{self.api.endpoint}/api/validate-yaml", json=body))

        self._try(ask, "the metadata of its card cannot be published")

    def find_draft(self, mark: str) -> Draft | None:
        """The pull request of this user, neither closed nor merged, whose title ends with ``mark``."""
        user = self.user()
        found = self._try(lambda: self._find(user, mark), "its pull requests cannot be listed")
        return Draft(self, found) if found else None

    def open_draft(self, title: str, mark: str) -> Draft:
        """That pull request, or a new one."""
        user = self.user()

        def find_or_open() -> Discussion:
            return self._find(user, mark) or self.api.create_pull_request(
                self.id, f"{title[:_LONGEST_TITLE]} {mark}", description=_DESCRIPTION
            )

        return Draft(self, self._try(find_or_open, "no pull request can be opened"))

    def _find(self, user: str, mark: str) -> Discussion | None:
        for found in self.api.get_repo_discussions(self.id, discussion_type="pull_request"):
            is_ours = found.is_pull_request and found.author == user and found.title.endswith(mark)
            if is_ours and found.status in ("draft", "open"):
                return found
        return None

    def _try(self, step: Callable[[], _T], doing: str) -> _T:
        return attempt(step, self.id, doing)


class Draft:
    """A pull request: its files are its own until it is merged, all at once."""

    def __init__(self, repo: Repository, discussion: Discussion) -> None:
        self.repo = repo
        self.number = discussion.num
        self.revision = f"refs/pr/{self.number}"
        self.url = f"{repo.url}/discussions/{self.number}"

    def files(self) -> dict[str, RemoteFile]:
        found = self.repo.files(self.revision)
        if found is None:
            raise HubError(f"{self.repo.id}: {self.revision} is not there any more. Run again.", 404)
        return found

    def add_folder(self, folder: Path, names: Sequence[str], message: str) -> None:
        """Upload files of a folder; some may be committed before others."""
        import glob

        if names:
            self.repo._try(
                lambda: self.repo.api.upload_folder(
                    repo_id=self.repo.id, folder_path=folder, revision=self.revision, commit_message=message,
                    allow_patterns=[glob.escape(name) for name in names],
                ),
                "cannot be uploaded",
            )  # fmt: skip

    def commit(self, added: Mapping[str, Path | bytes], removed: Sequence[str], message: str) -> None:
        """Upload files, by their names there, and remove others, in one commit."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        def operations() -> list[CommitOperationAdd | CommitOperationDelete]:
            there = self.files() if removed else {}
            gone = [CommitOperationDelete(name) for name in removed if name in there]
            return [*gone, *(CommitOperationAdd(name, data) for name, data in added.items())]

        self.repo._try(
            lambda: self.repo.api.create_commit(
                self.repo.id, operations(), commit_message=message, revision=self.revision
            ),
            ", ".join(added) + " cannot be uploaded" if len(added) == 1 else "cannot be uploaded",
        )

    def check(self, expected: Mapping[str, tuple[int, str]], oid: Callable[[str], str]) -> None:
        """Whether the Hub holds what it should.

        Args:
            expected: name -> size and sha256.
            oid: the name in git of a local file that git itself holds there.

        Raises:
            OmniConvertError: names the first file that is missing or different.
        """
        found = self.files()
        for name, (size, sha256) in expected.items():
            remote = found.get(name)
            if remote is None or not remote.is_same(size, sha256, lambda name=name: oid(name)):  # type: ignore[misc]
                raise OmniConvertError(
                    f"{self.url}: {name} {'is missing' if remote is None else 'differs'} after the upload, so nothing "
                    "was published. Run again; if it stays so, close the pull request first."
                )

    def open(self) -> None:
        """Let people see it as ready."""
        self.repo._try(
            lambda: self.repo.api.change_discussion_status(self.repo.id, self.number, "open"), "cannot be opened"
        )

    def close(self, comment: str, doing: str) -> None:
        """``doing``: for the message if that fails."""
        self.repo._try(
            lambda: self.repo.api.change_discussion_status(self.repo.id, self.number, "closed", comment=comment), doing
        )

    def merge(self, names: Sequence[str]) -> None:
        """Publish everything at once; no error if that has happened already.

        Args:
            names: files that are to be as they are here.

        Raises:
            HubError: main changed some of them since this began; it is closed, since it never could be merged.
        """
        if names := self._clashes(names):
            self._supersede(printable(names[0]))

        def merge() -> None:
            api = self.repo.api
            if api.get_discussion_details(self.repo.id, self.number).status == "merged":
                return  # the answer to an earlier attempt was lost
            api.merge_pull_request(self.repo.id, self.number)

        try:
            self.repo._try(merge, f"pull request {self.url} cannot be merged")
        except HubError as error:
            if error.status != 409:
                raise
            self._supersede("the same files")

    def _clashes(self, names: Sequence[str]) -> list[str]:
        """Those that main changed since this began, and otherwise: a merge would fail, or take them from there."""
        repo = self.repo
        shown, own = repo.commits(), repo.commits(self.revision)
        base = next((commit for commit in own if commit in shown), None)
        if base is None or base == shown[0]:
            return []
        before, now, here = repo.files(base) or {}, repo.files() or {}, self.files()
        return [name for name in names if now.get(name) not in (before.get(name), here.get(name))]

    def _supersede(self, what: str) -> None:
        """Close it, so that the next run opens another, from what main is then.

        Raises:
            HubError: always.
        """
        self.close(
            "Superseded: main changed meanwhile.",
            f"main changed meanwhile, so {self.url} must be closed before you run again, and cannot be",
        )
        raise HubError(
            f"{self.repo.url}: main changed {what} since {self.url} was begun, which was therefore closed; nothing was "
            "published. Look at what changed there, then run again: that opens another pull request.", 409,
        )  # fmt: skip
