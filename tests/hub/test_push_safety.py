"""What publishing must never do to a repository: take files of somebody else, or show what is not whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hostile.small import write_pipeline
from hub_server import Fault, HubServer
from publishing import folder_files, published, weights_of

import omni_convert
from omni_convert import OmniConvertError, UsageError
from omni_convert.hub.push import push
from omni_convert.hub.repository import Draft
from omni_convert.hub.transfer import convert_to_hub

REPO = "me/model"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_pipeline(tmp_path_factory.mktemp("safety") / "model")
    (folder / "README.md").unlink(missing_ok=True)  # not text, which no repository of the Hub has
    return folder


@pytest.fixture(scope="module")
def out(source: Path) -> Path:
    omni_convert.convert(source, source.with_name("int8"), method="int8")
    return source.with_name("int8")


def put(hub: HubServer, files: dict[str, bytes], ref: str = "main") -> None:
    """A commit of somebody else."""
    added = {name: hub.store.small(data) for name, data in files.items()}
    hub.store.commit(hub.store.repos[REPO], ref, "meanwhile", added, ())


def test_the_originals_are_not_replaced(here: HubServer, source: Path, out: Path) -> None:
    here.store.add_folder(REPO, source)
    before = published(here, REPO)
    for publish in (lambda: push(out, REPO), lambda: convert_to_hub(source, REPO, method="int8")):
        with pytest.raises(
            OmniConvertError, match=r"holds .*, which no omni_convert\.json .*Choose another repository"
        ):
            publish()
    for publish in (
        lambda: push(out, REPO, base_model="Me/Model"),
        lambda: convert_to_hub(REPO, REPO, method="int8"),
    ):
        with pytest.raises(UsageError, match="me/model: is the base model"):
            publish()
    assert published(here, REPO) == before
    assert not here.store.repos[REPO].discussions


@pytest.mark.parametrize("name", ["transformer/config.json", "model_index.json"])
def test_configs_of_somebody_else_stay(here: HubServer, out: Path, name: str) -> None:
    here.store.create(REPO)
    put(here, {name: b"{}"})
    with pytest.raises(OmniConvertError, match=f"holds {name}, .*this would replace"):
        push(out, REPO)


def test_what_was_published_may_be_replaced(here: HubServer, source: Path, out: Path) -> None:
    push(out, REPO)
    convert_to_hub(source, REPO, method="fp8")
    omni_convert.convert(source, fp8 := out.with_name("fp8"), method="fp8")
    assert weights_of(published(here, REPO)) == weights_of(folder_files(fp8))


def test_settings_and_card_of_the_repository_are_not_removed(here: HubServer, out: Path) -> None:
    push(out, REPO)
    manifest = json.loads(published(here, REPO)["omni_convert.json"])
    manifest["files"] |= {name: {"size": 1, "sha256": ""} for name in (".gitattributes", "README.md", "old.txt")}
    put(here, {"omni_convert.json": json.dumps(manifest).encode(), "old.txt": b"o"})
    push(out, REPO)
    assert {".gitattributes", "README.md"} < set(published(here, REPO))
    assert "old.txt" not in published(here, REPO)


def test_what_everybody_sees_is_not_private(here: HubServer, source: Path, out: Path) -> None:
    here.store.create(REPO)
    for publish in (
        lambda: push(out, REPO, private=True),
        lambda: convert_to_hub(source, REPO, method="int8", private=True),
    ):
        with pytest.raises(UsageError, match=r"is there and public, .*me/model/settings\), or leave out --private"):
            publish()
    here.store.repos[REPO].private = True
    push(out, REPO, private=True)
    assert "model_index.json" in published(here, REPO)


@pytest.mark.parametrize("name", ["https://x.example/org/base", "a/b/c", "org/base@main", "[x](y/z)", "base model"])
def test_base_models_that_are_none(here: HubServer, source: Path, out: Path, name: str) -> None:
    for publish in (
        lambda: push(out, REPO, base_model=name),
        lambda: convert_to_hub(source, REPO, method="int8", base_model=name),
    ):
        with pytest.raises(UsageError, match=r"--base-model: .* is no name of a model repository"):
            publish()
    assert here.requests == []


def test_a_base_model_of_the_first_days_has_no_organization(here: HubServer, out: Path) -> None:
    push(out, REPO, base_model="gpt2")
    assert b"\nbase_model: gpt2\n" in published(here, REPO)["README.md"]
    with pytest.raises(UsageError, match="'gpt2' is no name of a model repository, expected ORGANIZATION/NAME or YOU"):
        push(out, "gpt2")


def test_a_commit_is_told_of_its_own_repository(here: HubServer, source: Path) -> None:
    commit = here.store.add_folder("org/base", source).commit("main").sha
    convert_to_hub("org/base", REPO, method="int8")
    assert f"org/base/tree/{commit}" in published(here, REPO)["README.md"].decode()
    convert_to_hub("org/base", REPO, method="int8", base_model="org/other")
    card = published(here, REPO)["README.md"].decode()
    assert "https://huggingface.co/org/other)" in card
    assert commit not in card


def stop_at(monkeypatch: pytest.MonkeyPatch, hub: HubServer, step: str, files: dict[str, bytes]) -> None:
    """Somebody else commits ``files`` right before the draft's ``step``, once."""
    original = getattr(Draft, step)

    def changed(self: Draft, *arguments: object) -> None:
        monkeypatch.setattr(Draft, step, original)
        put(hub, files)
        original(self, *arguments)

    monkeypatch.setattr(Draft, step, changed)


@pytest.mark.parametrize("step", ["add_folder", "open"])
def test_weights_that_arrive_during_the_upload(
    here: HubServer, out: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    stop_at(monkeypatch, here, step, {"transformer/lora.safetensors": b"mine"})
    with pytest.raises(OmniConvertError, match=r"holds transformer/lora\.safetensors, .*remove it there"):
        push(out, REPO)
    assert set(published(here, REPO)) == {".gitattributes", "transformer/lora.safetensors"}


def test_another_conversion_that_arrives_during_the_upload(
    here: HubServer, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.dumps({"files": {"transformer/old.safetensors": {}}}).encode()
    stop_at(monkeypatch, here, "add_folder", {"omni_convert.json": manifest, "transformer/old.safetensors": b"o"})
    with pytest.raises(OmniConvertError, match="holds another conversion than before the upload"):
        push(out, REPO)
    with pytest.raises(OmniConvertError, match=r"main changed omni_convert\.json since .*discussions/1 was begun"):
        push(out, REPO)
    push(out, REPO)
    assert [pull.status for pull in here.store.repos[REPO].discussions] == ["closed", "merged"]
    assert weights_of(published(here, REPO)) == weights_of(folder_files(out))


@pytest.mark.parametrize("late", [True, False])
def test_a_card_that_somebody_changes_meanwhile(
    here: HubServer, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Before the comparison of main, or after it, where the Hub finds the conflict."""
    stop_at(monkeypatch, here, "open", {"README.md": b"mine"})
    if late:
        monkeypatch.setattr(Draft, "_clashes", lambda self, names: [])
    with pytest.raises(OmniConvertError, match=r"main changed .* since .*discussions/1 was begun, .*run again"):
        push(out, REPO)
    assert published(here, REPO)["README.md"] == b"mine"
    (card := tmp_path / "card.md").write_text("yours")
    push(out, REPO, card=card)
    assert [pull.status for pull in here.store.repos[REPO].discussions] == ["closed", "merged"]


def test_other_files_that_arrive_meanwhile_stay(
    here: HubServer, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.faults.append(Fault("/merge", "POST", times=99, status=500))
    for publish in (lambda: push(out, REPO), lambda: convert_to_hub(source, REPO, method="fp8")):
        with pytest.raises(OmniConvertError, match="the Hub is in trouble"):
            publish()
    here.faults.clear()
    put(here, {"notes.txt": b"mine"})
    push(out, REPO)
    assert published(here, REPO).pop("notes.txt") == b"mine"
    with pytest.raises(OmniConvertError, match=r"main changed .* since .*discussions/2 was begun"):
        convert_to_hub(source, REPO, method="fp8")
    convert_to_hub(source, REPO, method="fp8")
    assert published(here, REPO).pop("notes.txt") == b"mine"
    assert [pull.status for pull in here.store.repos[REPO].discussions] == ["merged", "closed", "merged"]


def test_a_file_that_was_there_and_changes_meanwhile(
    here: HubServer, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not part of the pull request, so a merge would show the others with it."""
    push(out, REPO)
    put(here, {"README.md": b"older"})
    stop_at(monkeypatch, here, "open", {"model_index.json": b"{}"})
    (card := tmp_path / "card.md").write_text("newer")
    with pytest.raises(OmniConvertError, match=r"main changed model_index\.json since"):
        push(out, REPO, card=card)
    assert published(here, REPO)["README.md"] == b"older"
