"""From one repository into another: the bytes of a local conversion, on little disk, whatever happens on the way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import pytest
from hostile.small import QWEN_CONFIG, qwen_shards, random, write_json, write_sharded
from hub_server import READ_ONLY, TOKEN, Fault, HubServer
from publishing import command, folder_files, published, start, use, weights_of

import omni_convert
from omni_convert import OmniConvertError, UsageError
from omni_convert.converter.outlet import outlet_bytes
from omni_convert.hub.transfer import convert_to_hub

REPO = "me/model-INT8"
WIDTH, SHARDS = 1024, 6
SHARD = WIDTH * WIDTH * 2 * 2
"""Bytes of every shard of the source: two matrices in BF16."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose transformer and text encoder have shards of one size, and small files."""
    folder = tmp_path_factory.mktemp("source") / "model"
    kinds = ["attn.to_out.0", "txt_mlp.net.2"]
    blocks = [
        {f"transformer_blocks.{n}.{kind}.weight": random(WIDTH, WIDTH, seed=2 * n + i) for i, kind in enumerate(kinds)}
        for n in range(SHARDS)
    ]
    write_sharded(folder / "transformer", blocks, {"_class_name": "SomeTransformer2DModel"})  # type: ignore[arg-type]
    encoder = [{f"layers.{n}.weight": random(2 * WIDTH, WIDTH, seed=n)} for n in range(3)]
    write_sharded(folder / "text_encoder", encoder, {"architectures": ["SomeTextModel"]}, stem="model")  # type: ignore[arg-type]
    write_json(folder / "scheduler" / "scheduler_config.json", {"shift": 3.0})
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# The base\n")
    index = {"_class_name": "SomePipeline", "scheduler": ["diffusers", "Scheduler"]}
    index |= {"transformer": ["diffusers", "SomeTransformer2DModel"], "text_encoder": ["transformers", "Some"]}
    write_json(folder / "model_index.json", index)
    return folder


@pytest.fixture(scope="module")
def local(source: Path) -> dict[str, bytes]:
    """What a conversion into a folder writes."""
    omni_convert.convert(source, source.with_name("out"), method="int8")
    return weights_of(folder_files(source.with_name("out")))


@pytest.fixture(params=["hub", "xet_hub"])
def any_hub(request: pytest.FixtureRequest, source: Path) -> HubServer:
    """A Hub with the model as ``org/base``."""
    hub: HubServer = request.getfixturevalue(request.param)
    hub.store.add_folder("org/base", source)
    return hub


def check_published(hub: HubServer, local: dict[str, bytes]) -> None:
    """All of it is there, main showed nothing less, and every shard was committed once, to one pull request."""
    repo = hub.store.repos[REPO]
    assert weights_of(published(hub, REPO)) == local
    merged = repo.commit("main")
    assert merged.parent is not None
    assert set(repo.commits[merged.parent].files) == {".gitattributes"}
    assert [pull.status for pull in repo.discussions] == ["merged"]
    last = repo.commit("refs/pr/1")
    assert last.parent is not None
    before = repo.commits[last.parent].files
    assert not [name for name in before if name.endswith((".json", "README.md"))]
    assert len([name for name in before if name.endswith(".safetensors")]) == SHARDS + 3
    titles = Counter(commit.title for commit in repo.commits.values())
    assert {title: count for title, count in titles.items() if title.startswith("Add ") and count > 1} == {}


def commits(hub: HubServer) -> int:
    """Shards that are committed so far."""
    repo = hub.store.repos.get(REPO)
    return sum(commit.title.startswith("Add ") for commit in list(repo.commits.values())) if repo else 0


def when_committed(hub: HubServer, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until that many shards are there."""
    end = time.monotonic() + 60
    while commits(hub) < count and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.002)


class Disk:
    """The most that some folders held at a time, in bytes."""

    def __init__(self, *folders: Path) -> None:
        self.most = 0
        self._folders = folders
        self._stop = Event()
        self._thread = Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.most = max(self.most, sum(map(_bytes, self._folders)))

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.most


def _bytes(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # gone meanwhile
                total += Path(place, name).lstat().st_blocks * 512  # stand-ins are mostly holes
    return total


def test_from_hub_to_hub_on_little_disk(any_hub: HubServer, local: dict[str, bytes], tmp_path: Path) -> None:
    home = tmp_path / "home"
    disk = Disk(home)
    status, out, err = command(any_hub, home, "--method", "int8", "--threads", "3", "org/base", f"hub:{REPO}")
    most = disk.stop()
    print(f"{most / SHARD:.2f} shards at most")
    assert status == 0, err
    assert out.splitlines()[-1] == f"written to        {any_hub.url}/{REPO}"
    check_published(any_hub, local)
    assert SHARD < most <= 3 * SHARD + SHARD // 5
    assert not list((home / "omni-convert").iterdir())
    card = published(any_hub, REPO)["README.md"].decode()
    commit = any_hub.store.repos["org/base"].commit("main").sha
    assert "base_model: org/base\n" in card
    assert "license: mit\n" in card
    assert f"https://huggingface.co/org/base/tree/{commit}" in card
    assert TOKEN not in out + err


def test_from_a_folder(
    hub: HubServer, source: Path, local: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(hub, monkeypatch, tmp_path / "home")
    work = tmp_path / "work"
    report, publication = convert_to_hub(source, REPO, method="int8", work=work, base_model="org/base", private=True)
    assert report.out == publication.url == f"{hub.url}/{REPO}"
    assert report.bytes_written == sum(map(len, folder_files(source.with_name("out")).values()))
    assert hub.store.repos[REPO].private
    assert not list(work.iterdir())
    check_published(hub, local)
    before = len(hub.requests)
    again = convert_to_hub(source, REPO, method="int8", work=work, base_model="org/base")[1]
    assert {change.state for change in again.changes} == {"unchanged"}
    assert not [item for item in hub.requests[before:] if item.method == "PUT" or "/commit/" in item.path]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_goes_on(
    number: signal.Signals, xet_hub: HubServer, source: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    xet_hub.store.add_folder("org/base", source)
    arguments = ("--method", "int8", "org/base", f"hub:{REPO}")
    for count in (1, 6):
        process = start(xet_hub, tmp_path, *arguments)
        when_committed(xet_hub, count, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
        assert process.returncode == (-9 if number == signal.SIGKILL else 1), err
        assert number == signal.SIGKILL or re.search(r"Interrupted\. \d+ of 11 files are finished and kept", err)
        assert set(published(xet_hub, REPO)) == {".gitattributes"}
    status, _, err = command(xet_hub, tmp_path, *arguments)
    assert status == 0, err
    check_published(xet_hub, local)


def test_kills_at_every_moment(hub: HubServer, source: Path, local: dict[str, bytes], tmp_path: Path) -> None:
    arguments = ("--method", "int8", source, f"hub:{REPO}")
    for tenths in (13, 17, 21, 25):
        process = start(hub, tmp_path, *arguments)
        time.sleep(tenths / 10)
        process.kill()
        process.communicate(timeout=30)
        shown = set(published(hub, REPO)) if REPO in hub.store.repos else set()
        assert shown <= {".gitattributes"} or weights_of(published(hub, REPO)) == local
    status, _, err = command(hub, tmp_path, *arguments)
    assert status == 0, err
    assert weights_of(published(hub, REPO)) == local


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault("/commit/refs/pr/1", "POST", times=99, status=503), r"the Hub is in trouble \(503"),
        (Fault("/upload/", "PUT", times=99, status=500), r"the Hub is in trouble \(500"),
        (Fault("/merge", "POST", times=99, status=500), r"the Hub is in trouble \(500"),
    ],
)
def test_trouble_in_the_middle(
    hub: HubServer, source: Path, local: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    fault: Fault, text: str,
) -> None:  # fmt: skip
    use(hub, monkeypatch, tmp_path / "home")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.faults.append(fault)
    with pytest.raises(OmniConvertError, match=rf"{text}.*the same command goes on from there"):
        convert_to_hub(source, REPO, method="int8")
    hub.faults.clear()
    assert set(published(hub, REPO)) == {".gitattributes"}
    convert_to_hub(source, REPO, method="int8")
    check_published(hub, local)


def test_an_answer_to_the_merge_that_is_lost(
    hub: HubServer, source: Path, local: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(hub, monkeypatch, tmp_path / "home")
    hub.faults.append(Fault("/merge", "POST", drop_after=0))
    convert_to_hub(source, REPO, method="int8")
    assert hub.faults[0].times == 0
    check_published(hub, local)


def test_a_pull_request_that_somebody_closed(
    hub: HubServer, source: Path, local: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(hub, monkeypatch, tmp_path / "home")
    hub.faults.append(Fault("/merge", "POST", times=99, status=403))
    with pytest.raises(OmniConvertError, match="no right"):
        convert_to_hub(source, REPO, method="int8")
    hub.faults.clear()
    hub.store.set_status(hub.store.repos[REPO], 1, "closed")
    convert_to_hub(source, REPO, method="int8")
    assert weights_of(published(hub, REPO)) == local
    assert [pull.status for pull in hub.store.repos[REPO].discussions] == ["closed", "merged"]


def test_what_is_refused_before_anything_is_converted(
    hub: HubServer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(hub, monkeypatch, tmp_path / "home", READ_ONLY)
    with pytest.raises(OmniConvertError, match="has no right to do that"):
        convert_to_hub(source, REPO, method="int8", work=tmp_path / "work")
    with pytest.raises(UsageError, match="is no name of a model repository"):
        convert_to_hub(source, "model", method="int8", work=tmp_path / "work")
    with pytest.raises(UsageError, match="convert_to_hub"):
        omni_convert.convert(source, f"hub:{REPO}", method="int8")
    assert not (tmp_path / "work").exists()
    for arguments, text in [
        ((tmp_path / "out", "--private"), "--private: OUT is the folder"),
        ((tmp_path / "out", "--work", tmp_path), "--work: OUT is the folder"),
        ((f"hub:{REPO}", "--engine", "ray"), "--engine ray writes into a folder"),
    ]:
        status, _, err = command(hub, tmp_path / "home", "--method", "int8", source, *arguments)
        assert status == 2
        assert text in err


def test_the_plan_shows_what_the_disk_needs(hub: HubServer, source: Path, tmp_path: Path) -> None:
    status, out, err = command(hub, tmp_path, "--method", "int8", "--dry-run", "--json", source, f"hub:{REPO}")
    assert status == 0, err
    largest = max(path.stat().st_size for path in source.rglob("*.safetensors"))
    small = sum((source / name).stat().st_size for name in ("README.md", "scheduler/scheduler_config.json"))
    small += sum(path.stat().st_size for path in [source / "model_index.json", *source.glob("text_encoder/*.json")])
    assert json.loads(out)["disk_needed"] == 3 * largest + small
    assert hub.requests == []


def test_a_disk_without_room_for_three_shards(
    hub: HubServer, source: Path, local: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.store.add_folder("org/base", source)
    use(hub, monkeypatch, tmp_path / "home")
    largest = max(path.stat().st_size for path in source.rglob("*.safetensors"))
    needed = outlet_bytes(omni_convert.plan(source, method="int8"))
    assert 3 * largest <= needed < 3 * largest + 10_000
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(OmniConvertError, match=rf"take {needed} bytes.* Free 1 bytes, or have the work .*--work"):
        convert_to_hub("org/base", REPO, method="int8")
    assert REPO not in hub.store.repos
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed))
    convert_to_hub("org/base", REPO, method="int8")
    check_published(hub, local)


def test_what_is_read_to_choose_leaves_the_disk(
    hub: HubServer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.store.add_folder("org/base", source)
    home = tmp_path / "home"
    conditions = {"methods": ["int8"], "target": "omni-convert", "budget": "size<=0.8"}
    options = ("--methods", "int8", "--target", "omni-convert", "--budget", "size<=0.8")
    disk = Disk(home)
    status, _, err = command(hub, home, *options, "org/base", f"hub:{REPO}")
    most = disk.stop()
    print(f"{most / SHARD:.2f} shards at most")
    assert status == 0, err
    assert SHARD < most <= 3 * SHARD + SHARD // 5
    assert not list((home / "omni-convert").iterdir())
    use(hub, monkeypatch, tmp_path / "another")
    convert_to_hub("org/base", "me/again", **conditions)  # type: ignore[arg-type]
    omni_convert.convert(source, tmp_path / "out", **conditions)  # type: ignore[arg-type]
    expected = weights_of(folder_files(tmp_path / "out"))
    assert weights_of(published(hub, REPO)) == weights_of(published(hub, "me/again")) == expected
    assert not list((tmp_path / "another" / "hub").rglob("*.safetensors"))


def test_a_damaged_cache_is_not_published(
    hub: HubServer, source: Path, local: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.store.add_folder("org/base", source)
    use(hub, monkeypatch, tmp_path / "home")
    monkeypatch.setattr("omni_convert.converter.hub_downloads._SMALL", 0)
    omni_convert.convert("org/base", tmp_path / "out", method="int8")
    cached = sorted((tmp_path / "home" / "hub").rglob("transformer/*.safetensors"))[2]
    cached.write_bytes(cached.read_bytes()[:-1] + b"?")
    convert_to_hub("org/base", REPO, method="int8")
    check_published(hub, local)


def test_what_is_there_already_leaves_the_disk(
    hub: HubServer, source: Path, local: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(hub, monkeypatch, tmp_path / "home")
    work = tmp_path / "work"
    hub.faults.append(Fault("/commit/refs/pr/1", "POST", drop_after=0))  # committed, and the answer is lost
    hub.faults.append(Fault("/info/lfs/objects/batch", "POST", times=2, slow=1))  # while the next shard is waiting
    with monkeypatch.context() as impatient, pytest.raises(OmniConvertError, match="cannot be reached"):
        impatient.setattr("omni_convert.converter.hub_errors.WAITS", [])
        convert_to_hub(source, REPO, method="int8", work=work)
    assert list(work.rglob("*.safetensors"))
    hub.faults.append(Fault("/merge", "POST", times=99, status=500))
    with pytest.raises(OmniConvertError, match="the Hub is in trouble"):
        convert_to_hub(source, REPO, method="int8", work=work)
    assert not list(work.glob("*/out/**/*.safetensors")), "their scales alone stay"
    hub.faults.clear()
    convert_to_hub(source, REPO, method="int8", work=work)
    check_published(hub, local)
    uploads = [request.path for request in hub.requests if request.method == "PUT"]
    assert len(uploads) == len(set(uploads)), "the first run went on beside the second"


def test_layers_that_share_scales_across_shards(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest weights of a shard that is not there any more, or not yet, are needed."""
    source = write_sharded(
        tmp_path / "model",
        [shard for tensors in qwen_shards() for shard in ({n: t} for n, t in tensors.items())],
        QWEN_CONFIG,
    )
    omni_convert.convert(source, tmp_path / "out", method="int8")
    hub.store.add_folder("org/base", source)
    use(hub, monkeypatch, tmp_path / "home")
    hub.faults.append(Fault("/commit/refs/pr/1", "POST", times=1, status=403))
    with pytest.raises(OmniConvertError, match="no right"):
        convert_to_hub("org/base", REPO, method="int8")
    convert_to_hub("org/base", REPO, method="int8")
    assert weights_of(published(hub, REPO)) == weights_of(folder_files(tmp_path / "out"))
