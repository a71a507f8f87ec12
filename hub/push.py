"""Publish a converted folder: verified first, and visible only when all of it is there."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omni_convert.converter.manifest import read_manifest
from omni_convert.converter.manifest_shape import load_manifest
from omni_convert.converter.plan import encode_json
from omni_convert.converter.progress import without_bars
from omni_convert.converter.verify import verify
from omni_convert.formats.errors import OmniConvertError, UsageError, printable
from omni_convert.formats.layout import CONFIG_NAME, MANIFEST_NAME, PIPELINE_INDEX, read_json
from omni_convert.formats.text import format_bytes, format_table
from omni_convert.hub.card import PICTURE_NAME, base_of, make_card
from omni_convert.hub.card_place import CARD_SHA256, check_replaceable, read_texts
from omni_convert.hub.errors import HubError
from omni_convert.hub.metadata import CARD_NAME
from omni_convert.hub.picture import draw_picture
from omni_convert.hub.repository import Draft, RemoteFile, Repository, git_oid, parse_repo_id

NOT_PUBLISHED = (CARD_NAME, ".gitattributes")
"""Files of the base's repository that are about it: ours has a card and settings of its own."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A file of the upload. ``state``: new, changed, unchanged or removed, compared with what is published."""

    name: str
    size: int
    state: str


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What a push did. ``url``: of the repository, or of the pull request if that was to stay open."""

    repo: str
    url: str
    changes: tuple[Change, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"repo": self.repo, "url": self.url, "files": [asdict(change) for change in self.changes]}


Confirm = Callable[[str, tuple[Change, ...]], bool]
"""Is shown the URL of the repository and what would change; says whether to go on."""


def push(
    out: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    card: str | os.PathLike[str] | None = None,
    base_model: str | None = None,
    message: str | None = None,
    progress: bool = False,
    confirm: Confirm = lambda url, changes: True,
) -> Publication | None:
    """Publish the converted folder ``out`` on the Hugging Face Hub, with a model card.

    Files go to a pull request of ours, which is merged when all are there: the repository shows the whole model or what
    it showed before. A push that was interrupted goes on in that pull request.

    Args:
        repo_id: ``org/name``; made if it is not there.
        private: if it is made.
        create_pr: leave the pull request open, for somebody to merge.
        card: a README.md to publish in place of the one that is written from the manifest.
        base_model: repository on the Hub that was converted, if ``out`` was made from a folder.
        message: title of the pull request and the commit.
        progress: show progress on stderr (if it is a terminal).
        confirm: is asked before anything is written on the Hub. None is returned if it says no.

    Raises:
        OmniConvertError: ``out`` is unfinished, fails ``verify``, or the Hub refuses; says what to do.
    """
    root = Path(os.path.abspath(out))
    repo, given = target_repository(repo_id, base_model), read_texts(card, message)
    _check_whole(root)
    try:
        repo.user()  # before the folder is read for verification, which takes a while
        _verify(root, progress)
        upload = FolderUpload(root, repo, given, base_model)
        with without_bars(unless=progress and sys.stderr.isatty()):
            return publish(upload, private=private, create_pr=create_pr, message=message, confirm=confirm)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(str(interrupt) or " Nothing was uploaded.") from None


def target_repository(repo_id: str, base_model: str | None, source: str | None = None) -> Repository:
    """Where to publish. ``base_model``: as the user gave it; ``source``: repository that is converted.

    Raises:
        UsageError: no name of a repository, or the one that is converted.
    """
    repo, base = Repository(repo_id), None if base_model is None else parse_repo_id(base_model, is_base=True)
    _check_other(repo, base, source)
    return repo


def _check_other(repo: Repository, *bases: str | None) -> None:
    if any(base is not None and base.lower() == repo.id.lower() for base in bases):
        raise UsageError(
            f"{repo.id}: is the base model, whose weights would be replaced. Choose another repository to publish in."
        )


class FolderUpload:
    """What of a folder goes to a repository. ``seals``: what makes it loadable, and what is made for it here.

    ``oids``: names in git of small files that left the folder.
    """

    def __init__(
        self,
        root: Path,
        repo: Repository,
        card: str | None,
        base_model: str | None,
        oids: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.root = root
        self.oids = oids
        self.repo = repo
        manifest = load_manifest(root / MANIFEST_NAME)
        self.base = base_of(manifest, base_model)
        _check_other(repo, self.base.repo, manifest["source"].get("repo"))
        self.methods = manifest["recipe"].get("method") or "quantized"
        picture = draw_picture(manifest)
        text = card if card is not None else make_card(root, repo.id, base=self.base, picture=picture is not None)
        files = {name: entry for name, entry in manifest["files"].items() if name not in NOT_PUBLISHED}
        self.has_own_card = card is not None
        manifest = {key: value for key, value in manifest.items() if key != CARD_SHA256} | {"files": files}
        self.mark = f"(omni-convert {hashlib.sha256(encode_json(manifest)).hexdigest()[:12]})"
        if not self.has_own_card:
            manifest[CARD_SHA256] = hashlib.sha256(text.encode()).hexdigest()
        made = {MANIFEST_NAME: encode_json(manifest), CARD_NAME: text.encode()}
        self.made: dict[str, bytes] = made | ({PICTURE_NAME: picture} if picture is not None else {})
        self.files = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
        self.files |= {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in self.made.items()}
        self.title = f"{self.methods} weights of {self.base.repo or self.base.name}"

    @property
    def first(self) -> list[str]:
        """What goes before the seals."""
        return [name for name in self.files if not is_seal(name) and name not in self.made]

    @property
    def seals(self) -> dict[str, Path | bytes]:
        named = {name: self.root / name for name in self.files if is_seal(name)}
        return named | self.made

    def oid(self, name: str) -> str:
        """The name in git of a small file."""
        if name in self.oids:
            return self.oids[name]
        return git_oid(self.made[name] if name in self.made else (self.root / name).read_bytes())


def is_seal(name: str) -> bool:
    """Whether a file makes a folder look like a model that can be loaded."""
    return name.rpartition("/")[2] in (CONFIG_NAME, PIPELINE_INDEX) or name.endswith(".safetensors.index.json")


def publish(
    upload: FolderUpload, *, private: bool, create_pr: bool, message: str | None, confirm: Confirm
) -> Publication | None:
    """Show, ask, upload, compare, merge."""
    repo = upload.repo
    published = repo.files()
    if private and published is not None:
        repo.check_private()
    changes = find_changes(upload, published or {})
    card_changes = any(change.name == CARD_NAME and change.state == "changed" for change in changes)
    if card_changes and not (upload.has_own_card or create_pr):
        check_replaceable(repo, published or {})
    if not confirm(repo.url, changes):
        return None
    if all(change.state == "unchanged" for change in changes):
        return Publication(repo=repo.id, url=repo.url, changes=changes)
    repo.check_metadata(upload.made[CARD_NAME].decode())
    prepare(repo, private=private, create_pr=create_pr)
    draft = repo.open_draft(upload.title if message is None else message, upload.mark)
    try:
        draft.add_folder(upload.root, upload.first, "Weights and what goes with them")
        return seal(upload, draft, upload.seals, changes, create_pr=create_pr)
    except KeyboardInterrupt:
        kept = f" What is uploaded is kept in the pull request {draft.url}: the same command goes on from there."
        raise KeyboardInterrupt(kept) from None


def prepare(repo: Repository, *, private: bool, create_pr: bool) -> None:
    """Have a repository, and the right to write there if something is to be merged."""
    repo.create(private=private)
    if not create_pr:
        repo.check_write()


def seal(
    upload: FolderUpload,
    draft: Draft,
    last: Mapping[str, Path | bytes],
    changes: tuple[Change, ...],
    *,
    create_pr: bool,
) -> Publication:
    """Commit what comes ``last``, compare everything, and merge.

    Raises:
        OmniConvertError: what main shows by now, after an upload of hours, does not go with it.
    """
    repo, removed = upload.repo, [change.name for change in changes if change.state == "removed"]
    if set(stale_files(repo, repo.files() or {}, upload.files)) != set(removed):
        raise HubError(f"{repo.url}: holds another conversion than before the upload. Look at it, then run again.", 409)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warnings while validating metadata", UserWarning)  # a card may have none
        draft.commit(last, removed, "Config, index, manifest and card")
    draft.check(upload.files, upload.oid)
    draft.open()
    if not create_pr:
        stale_files(repo, repo.files() or {}, upload.files)
        draft.merge([*upload.files, *removed])
    return Publication(repo=upload.repo.id, url=draft.url if create_pr else upload.repo.url, changes=changes)


def stale_files(repo: Repository, published: Mapping[str, RemoteFile], files: Collection[str]) -> list[str]:
    """Files of an earlier conversion in the repository that this one does not replace.

    Raises:
        OmniConvertError: weights of somebody else, or their configs, would be replaced or lie beside ours.
    """
    earlier = read_json(repo.read(MANIFEST_NAME)).get("files") if MANIFEST_NAME in published else {}
    ours = {*(earlier if isinstance(earlier, dict) else ()), PICTURE_NAME}
    folders = {name.rpartition("/")[0] for name in files if name.endswith(".safetensors")}
    for name in published:
        weights = name.endswith((".safetensors", ".safetensors.index.json")) and name.rpartition("/")[0] in folders
        if name not in ours and (weights or (name in files and is_seal(name))):
            what = (
                "which this would replace"
                if name in files
                else "which would lie beside the new weights; engines could load both"
            )
            raise OmniConvertError(
                f"{repo.url}: holds {printable(name)}, which no {MANIFEST_NAME} there lists as its own, "
                f"and {what}. Choose another repository, or remove it there."
            )
    return [name for name in published if name in ours and name not in files and name not in NOT_PUBLISHED]


def find_changes(upload: FolderUpload, published: Mapping[str, RemoteFile]) -> tuple[Change, ...]:
    """What the upload makes of what is published.

    Raises:
        OmniConvertError: weights of somebody else, or their configs, would be replaced or lie beside ours.
    """

    def state(name: str, size: int, sha256: str) -> str:
        there = published.get(name)
        same = there is not None and there.is_same(size, sha256, lambda: upload.oid(name))
        return "unchanged" if same else "changed" if there else "new"

    files = [(name, size, state(name, size, sha256)) for name, (size, sha256) in upload.files.items()]
    files += [(name, published[name].size, "removed") for name in stale_files(upload.repo, published, upload.files)]
    return tuple(Change(name=name, size=size, state=state) for name, size, state in files)


def changes_text(url: str, changes: tuple[Change, ...]) -> str:
    """The table that is shown before an upload."""
    rows = [["file", "size", "state"], *([change.name, format_bytes(change.size), change.state] for change in changes)]
    size = sum(change.size for change in changes if change.state in ("new", "changed"))
    count = sum(change.state in ("new", "changed") for change in changes)
    return f"{format_table(rows, right=(1,))}\n{count} of {len(changes)} files, {format_bytes(size)}, go to {url}"


def _check_whole(root: Path) -> None:
    """Raises:
    OmniConvertError: not a finished conversion.
    """
    if read_manifest(root) is None:
        raise OmniConvertError(f"{root}: found no {MANIFEST_NAME}, expected a folder written by omni-convert.")


def _verify(root: Path, progress: bool) -> None:
    """Raises:
    OmniConvertError: the folder is not what it was when it was written.
    """
    result = verify(root, progress=progress)
    found = [f"{check.name}: {problem}" for check in result.checks for problem in check.problems]
    if not result.ok:
        raise OmniConvertError(
            f"{root}: does not pass verify, so nothing was uploaded. {printable(found[0], 300)} "
            f"({len(found)} in all; omni-convert verify shows them.)"
        )
