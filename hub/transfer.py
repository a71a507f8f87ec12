"""Convert into a repository on the Hub: every shard is uploaded as soon as it is whole, and leaves the disk.

Shards are committed to a pull request, one by one, and seen by nobody until its merge. So what is uploaded can be asked
of the Hub after any crash, by public calls, which of files that were uploaded and not yet committed it cannot.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from threading import Event, Lock, Semaphore, Thread
from typing import TYPE_CHECKING

from omni_convert.converter import contract_values
from omni_convert.converter.analyze import chosen_plan
from omni_convert.converter.contract import check_contract
from omni_convert.converter.convert import Means, Report, check, run
from omni_convert.converter.file_writer import FileRecord
from omni_convert.converter.folder import OutputFolder
from omni_convert.converter.job import job_identity
from omni_convert.converter.outlet import SMALL_BYTES, is_small
from omni_convert.converter.plan import Plan
from omni_convert.converter.progress import without_bars
from omni_convert.converter.stand_ins import keep_scales, lay_out
from omni_convert.formats.errors import OmniConvertError, UsageError, printable
from omni_convert.formats.quant_config import Spec
from omni_convert.formats.text import format_bytes
from omni_convert.hub.card import card_head
from omni_convert.hub.card_place import check_replaceable, read_texts
from omni_convert.hub.errors import redact
from omni_convert.hub.push import (
    NOT_PUBLISHED,
    FolderUpload,
    Publication,
    find_changes,
    is_seal,
    prepare,
    seal,
    stale_files,
    target_repository,
)
from omni_convert.hub.repository import Draft, git_oid, parse_repo_id
from omni_convert.hub.work import Work, analysis_folder

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from omni_convert.converter.recipe import Choices

_AT_ONCE = 2
"""Files under way: one that is written, one that is uploaded."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where to publish, and how, as ``push`` takes it. ``work``: the folder below which is what is under way.

    Raises:
        UsageError: no repository can have that name.
    """

    repo_id: str
    private: bool = False
    create_pr: bool = False
    card: str | os.PathLike[str] | None = None
    base_model: str | None = None
    message: str | None = None
    work: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        parse_repo_id(self.repo_id)

    def reading(self) -> AbstractContextManager[Path]:
        """Where a source is downloaded that is read only to choose how to convert it: it is not kept."""
        return analysis_folder(self.work, self.repo_id)


def convert_to_hub(
    source: str | os.PathLike[str],
    repo_id: str,
    quantization: Spec = None,
    *,
    private: bool = False,
    create_pr: bool = False,
    card: str | os.PathLike[str] | None = None,
    base_model: str | None = None,
    message: str | None = None,
    work: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    memory: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    progress: bool = False,
    methods: Sequence[str] = (),
    auto_ignore: str | None = None,
    budget: str | None = None,
    **choices: Unpack[Choices],
) -> tuple[Report, Publication]:
    """Convert a checkpoint into a repository on the Hub, without ever having all of it on the disk.

    A run that ends early goes on where it was when it is called again.

    Args:
        source, quantization, threads, memory, device, progress, methods, auto_ignore, budget, choices: as ``convert``
            takes them. A source on the Hub that is read to choose is downloaded for that, and again to be converted.
        overwrite: begin anew, and remove what other runs left unfinished for this repository in ``work``.
        repo_id, private, create_pr, card, base_model, message: as ``push`` takes them.
        work: folder below which is what is under way, about three shards; by default in the cache of huggingface_hub.

    Raises:
        OmniConvertError: as ``convert`` and ``push``.
    """
    started = time.perf_counter()
    target = Target(
        repo_id=repo_id, private=private, create_pr=create_pr, card=card, base_model=base_model, message=message,
        work=work,
    )  # fmt: skip
    means = Means(threads=threads, memory=memory, device=device, overwrite=overwrite)
    is_read = bool(methods) or auto_ignore is not None or budget is not None
    with target.reading() if is_read else nullcontext() as scratch:
        planned = chosen_plan(
            source, quantization, methods, auto_ignore, budget, choices, threads=threads, memory=memory,
            scratch=scratch, progress=progress,
        )  # fmt: skip
    return transfer(planned, target, means, progress=progress, started=started)


def transfer(plan: Plan, target: Target, means: Means, *, progress: bool, started: float) -> tuple[Report, Publication]:
    """Carry out a plan; the result is in a repository, and the work folder is gone."""
    if means.engine != "local":
        raise UsageError(f"--engine {means.engine} writes into a folder. Convert into one, then: omni-convert push.")
    with without_bars():
        outlet = HubOutlet(plan, target, means, progress=progress)
        report = run(plan, outlet.work.out, outlet.means, progress=progress, started=started, outlet=outlet)
    outlet.work.remove()
    assert outlet.publication is not None
    return replace(report, out=outlet.publication.url), outlet.publication


class HubOutlet:
    """Uploads large files, each while the next is converted. See ``Outlet``."""

    def __init__(self, plan: Plan, target: Target, means: Means, *, progress: bool) -> None:
        """Finds out everything that can be refused before a byte is converted."""
        self._plan, job = plan, job_identity(plan)
        self.work = Work(target.work, target.repo_id, job)
        self._target = target
        self._card = read_texts(target.card, target.message)
        hub = plan.checkpoint.hub
        self.means = replace(means, scratch=self.work.downloads if hub else None)
        self._repo = target_repository(target.repo_id, target.base_model, hub.listing.repo.id if hub else None)
        self._mark = _mark(self.work.identity)
        methods = " and ".join(dict.fromkeys(fmt.name for fmt in plan.recipe.formats))
        self._title = target.message or f"{methods} weights of {hub.listing.repo.id if hub else plan.checkpoint.name}"
        self._progress = progress
        removed = self.work.check(resume=means.resume, overwrite=means.overwrite)
        self._repo.user()
        self._published = self._repo.files() or {}
        stale_files(self._repo, self._published, OutputFolder(plan, self.work.out, job).files)
        with TemporaryDirectory(prefix="omni-convert-") as folder:
            self._check_contract(Path(folder), contract_values.RULES)
        check(plan, self.work.out, self.means, kept=False)
        if self._card is None and not target.create_pr:
            check_replaceable(self._repo, self._published)
        base = target.base_model or (hub.listing.repo.id if hub else None)
        self._repo.check_metadata(
            self._card or card_head(plan.checkpoint.root, plan.checkpoint.kind, plan.recipe, base)
        )
        prepare(self._repo, private=target.private, create_pr=target.create_pr)
        self._close_drafts(removed)
        self._draft = self._repo.find_draft(self._mark)
        found = self._draft.files() if self._draft else self._published
        self.there: Mapping[str, str] = {name: file.sha256 for name, file in found.items() if file.sha256}
        self.publication: Publication | None = None
        self._room = Semaphore(_AT_ONCE)
        self._queue: SimpleQueue[dict[str, Path]] = SimpleQueue()
        self._lock, self._small = Lock(), dict[str, Path]()
        self._oids: dict[str, str] = {}
        self._stopped = Event()
        self._error: OmniConvertError | None = None
        Thread(target=self._upload_all, name="omni-convert-upload", daemon=True).start()

    def make_room(self) -> None:
        while not self._room.acquire(timeout=0.1):
            self._check()
        self._check()

    def send(self, name: str, path: Path, record: FileRecord) -> None:
        if name.endswith(".safetensors") and path.is_file():
            keep_scales(path, self.work.stand_ins / name)
        if self.there.get(name) == record.sha256:
            path.unlink(missing_ok=True)
        elif not is_small(name, record.size):
            self._queue.put({name: path})
            return
        elif not is_seal(name) and name not in NOT_PUBLISHED and (batch := self._batch(name, path)):
            self._queue.put(batch)
            return
        self._room.release()  # a small file goes with others, at the latest with the last commit

    def _batch(self, name: str, path: Path) -> dict[str, Path]:
        """The small files that wait, if they are enough to go; none if not."""
        with self._lock:
            self._small[name] = path
            if sum(item.stat().st_size for item in self._small.values()) < SMALL_BYTES:
                return {}
            batch, self._small = self._small, {}
            return batch

    def wait(self) -> None:
        for _ in range(_AT_ONCE):
            self.make_room()

    def give_up(self) -> None:
        self._stopped.set()

    def publish(self, folder: Path) -> None:
        self._check_contract(self.work.stand_ins, [contract_values.CODES])
        upload = FolderUpload(folder, self._repo, self._card, self._target.base_model, self._oids)
        changes = find_changes(upload, self._published)
        if all(change.state == "unchanged" for change in changes):
            self.publication = Publication(repo=self._repo.id, url=self._repo.url, changes=changes)
            return
        small = {name: folder / name for name in upload.first if (folder / name).is_file()}
        last = {**small, **upload.seals}
        self.publication = seal(upload, self._open(), last, changes, create_pr=self._target.create_pr)

    def _close_drafts(self, identities: Iterable[str]) -> None:
        """Of work that nobody goes on with."""
        for identity in identities:
            if draft := self._repo.find_draft(_mark(identity)):
                draft.close("Another conversion was begun with --overwrite.", f"{draft.url} cannot be closed")
                if self._progress:
                    _tell(f"closed {draft.url}, which another job had begun")

    def _check_contract(self, folder: Path, without: Collection[str]) -> None:
        """Raises:
        OmniConvertError: vLLM-Omni would not load the output, as far as what is laid out in ``folder`` tells.
        """
        if self._plan.recipe.target != "vllm-omni":
            return
        lay_out(self._plan, folder)
        found = [f"{check.name}: {text}" for check in check_contract(folder, without) for text in check.problems]
        if found:
            raise OmniConvertError(
                f"{self._repo.url}: nothing was published, since vLLM-Omni would not load the result as it is meant. "
                f"{printable(found[0], 1000)} ({len(found)} in all.) Correct it, or convert for another engine "
                "(--target)."
            )

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._stopped.is_set():
            raise OmniConvertError("The run ends.")  # another error, which is the one that is shown, ended it

    def _open(self) -> Draft:
        if self._draft is None:
            self._draft = self._repo.open_draft(self._title, self._mark)
        return self._draft

    def _upload_all(self) -> None:
        """On a thread that nobody has to wait for: an interrupted process may end in the middle of an upload.

        It ends with the first error, so that whoever runs again does not meet it in the same pull request.
        """
        while self._error is None and not self._stopped.is_set():
            files = self._queue.get()
            try:
                self._upload(files)
            except OmniConvertError as error:
                self._error = error
            except BaseException as error:  # whatever it is, whoever waits raises it
                self._error = OmniConvertError(
                    f"{next(iter(files))}: cannot be uploaded ({type(error).__name__}: {redact(str(error))})."
                )
            finally:
                self._room.release()

    def _upload(self, files: Mapping[str, Path]) -> None:
        sizes = {name: path.stat().st_size for name, path in files.items()}
        what = next(iter(files)) if len(files) == 1 else f"{len(files)} files"
        self._open().commit(files, [], f"Add {what}")
        if self._stopped.is_set():
            return  # somebody else may write there by now
        for name, path in files.items():
            if is_small(name, sizes[name]):
                self._oids[name] = git_oid(path.read_bytes())
            path.unlink(missing_ok=True)
        if self._progress:
            _tell(f"uploaded {what} ({format_bytes(sum(sizes.values()))})")


def _mark(identity: str) -> str:
    """What the title of a job's pull request ends with."""
    return f"(omni-convert {identity})"


def _tell(text: str) -> None:
    """A line on stderr, above the progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)
