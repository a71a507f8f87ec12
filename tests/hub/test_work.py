"""The folder of what is under way into a repository: what is removed there, what is not, and who goes on in it."""

from __future__ import annotations

import fcntl
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hostile.small import QWEN_CONFIG, qwen_shards, write_sharded
from hub_server import TOKEN, Fault, HubServer
from publishing import command, folder_files, published, use, weights_of

import omni_convert
from omni_convert import OmniConvertError, UsageError
from omni_convert.hub.transfer import Target, convert_to_hub

REPO = "me/model-INT8"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sharded(tmp_path_factory.mktemp("source") / "model", qwen_shards(), QWEN_CONFIG)


@pytest.fixture(scope="module")
def local(source: Path) -> dict[str, bytes]:
    """What a conversion into a folder writes."""
    omni_convert.convert(source, source.with_name("out"), method="int8")
    return weights_of(folder_files(source.with_name("out")))


@pytest.fixture
def home(hub: HubServer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process keeps what it has of a Hub that has the model as ``org/base``."""
    hub.store.add_folder("org/base", source)
    use(hub, monkeypatch, tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def crash(hub: HubServer, home: Path) -> Callable[..., Path]:
    """Ends a run before the merge; returns its place."""

    def run(work: Path = home / "omni-convert", **options: str) -> Path:
        before = set(work.iterdir()) if work.exists() else set()
        hub.faults.append(Fault("/merge", "POST", times=99, status=403))
        with pytest.raises(OmniConvertError, match="no right"):
            convert_to_hub("org/base", REPO, work=work, **{"method": "int8", **options})  # type: ignore[arg-type]
        hub.faults.clear()
        (place,) = set(work.iterdir()) - before
        return place

    return run


def test_what_somebody_else_keeps_there_stays(
    hub: HubServer, home: Path, source: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    work = tmp_path / "mine"
    (work / "downloads").mkdir(parents=True)
    (work / "downloads" / "thesis.txt").write_text("mine")
    omni_convert.convert(source, work / "out", method="fp8")
    before = folder_files(work)
    convert_to_hub("org/base", REPO, method="int8", work=work, overwrite=True)
    assert weights_of(published(hub, REPO)) == local
    assert folder_files(work) == before
    assert {item.name for item in work.iterdir()} == {"downloads", "out"}


def test_what_a_kill_leaves_of_downloads_is_removed(
    hub: HubServer, home: Path, local: dict[str, bytes], tmp_path: Path, crash: Callable[..., Path]
) -> None:
    work = tmp_path / "work"
    place = crash(work)
    rest = place / "downloads" / ".cache" / "huggingface" / "download" / "x.4f1c.incomplete"
    rest.parent.mkdir(parents=True, exist_ok=True)
    rest.write_bytes(bytes(1000))
    shard = sorted(name for name in local if name.endswith(".safetensors"))[0]
    uploaded = place / "downloads" / shard
    uploaded.write_bytes(bytes(1000))
    hub.faults.append(Fault("/merge", "POST", times=99, status=403))
    with pytest.raises(OmniConvertError, match="no right"):
        convert_to_hub("org/base", REPO, method="int8", work=work)
    assert place.is_dir()
    assert not rest.exists()
    assert not uploaded.exists()


def test_what_a_kill_leaves_counts_as_free(
    hub: HubServer, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lies among the downloads serves the next run, or is removed by it."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    needed = []
    for _ in range(2):
        with pytest.raises(OmniConvertError, match=r"^.*/out: the output and the downloads take \d+ bytes") as error:
            convert_to_hub("org/base", REPO, method="int8", work=tmp_path)
        out, _, said = str(error.value).partition(": ")
        needed.append(int(re.findall(r"take (\d+) bytes", said)[0]))
        rest = Path(out).with_name("downloads") / ".cache" / "huggingface" / "download" / "x.4f1c.incomplete"
        rest.parent.mkdir(parents=True, exist_ok=True)
        rest.write_bytes(bytes(1000))
    assert needed[0] - needed[1] == 1000


def test_other_unfinished_work_is_named_first(
    hub: HubServer, home: Path, source: Path, local: dict[str, bytes], tmp_path: Path, crash: Callable[..., Path]
) -> None:
    place = crash()
    old = hub.store.repos["org/base"].commit("main").sha
    changed = shutil.copytree(source, tmp_path / "changed")
    (changed / "README.md").write_text("# Changed\n")
    hub.store.add_folder("org/base", changed)
    requests = len(hub.requests)
    with pytest.raises(OmniConvertError, match=rf"{place.name}: holds unfinished work.*org/base@{old}.*--overwrite"):
        convert_to_hub("org/base", REPO, method="int8")
    assert not [item for item in hub.requests[requests:] if REPO in item.path]
    assert len(hub.store.repos[REPO].discussions) == 1
    convert_to_hub("org/base", "me/another", method="int8")
    convert_to_hub(f"org/base@{old}", REPO, method="int8")
    assert weights_of(published(hub, REPO)) == local
    assert not list((home / "omni-convert").iterdir())


def test_overwrite_removes_the_other_work(hub: HubServer, home: Path, crash: Callable[..., Path]) -> None:
    place = crash(method="fp8")
    status, _, err = command(hub, home, "--method", "int8", "--overwrite", "org/base", f"hub:{REPO}")
    assert status == 0, err
    assert f"closed {hub.url}/{REPO}/discussions/1, which another job had begun" in err
    assert [pull.status for pull in hub.store.repos[REPO].discussions] == ["closed", "merged"]
    assert not place.exists()
    assert not list((home / "omni-convert").iterdir())


def test_overwrite_leaves_what_another_process_works_on(hub: HubServer, home: Path, crash: Callable[..., Path]) -> None:
    place = crash(method="fp8")
    before = folder_files(place)
    with (place / "out" / ".omni_convert.partial").open("rb+") as marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        with pytest.raises(OmniConvertError, match=rf"{place.name}: .* is writing there now\. Wait until it is done"):
            convert_to_hub("org/base", REPO, method="int8", overwrite=True)
    assert folder_files(place) == before


def test_nothing_to_go_on_with(hub: HubServer, home: Path, source: Path) -> None:
    status, _, err = command(hub, home, "--method", "int8", "--resume", source, f"hub:{REPO}")
    assert status == 2
    assert "holds nothing to go on with" in err
    assert REPO not in hub.store.repos


def test_an_error_that_nobody_expected_has_no_token(
    hub: HubServer, home: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise LookupError(f"at https://x.example/a?Signature=abc with {TOKEN}")

    monkeypatch.setattr("omni_convert.hub.repository.Draft.commit", fail)
    with pytest.raises(
        OmniConvertError, match=r"cannot be uploaded \(LookupError: at https://x.example/a with"
    ) as error:
        convert_to_hub(source, REPO, method="int8")
    assert TOKEN not in str(error.value)
    assert "Signature" not in str(error.value)


@pytest.mark.parametrize("name", ["bad", "", "me/x@rev", "me/x/y"])
def test_names_are_checked_without_the_network(name: str) -> None:
    with pytest.raises(UsageError, match="is no name of a model repository"):
        Target(repo_id=name)


def test_a_dry_run_checks_the_name(hub: HubServer, home: Path, source: Path) -> None:
    status, out, err = command(hub, home, "--method", "int8", "--dry-run", source, "hub:bad")
    assert (status, out) == (2, "")
    assert "'bad' is no name of a model repository" in err
    assert hub.requests == []
