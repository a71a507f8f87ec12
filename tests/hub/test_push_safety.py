"""What publishing must never do to a repository: take files of somebody else, or show what is not whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hostile.small import write_pipeline
from hub_server import HubServer
from publishing import folder_files, published, use, weights_of

import omni_convert
from omni_convert import OmniConvertError, UsageError
from omni_convert.hub.push import push
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


@pytest.fixture
def here(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HubServer:
    use(hub, monkeypatch, tmp_path / "home")
    return hub


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


@pytest.mark.parametrize("name", ["https://huggingface.co/org/base", "a/b/c", "org/base@main", "[x](y/z)", "base"])
def test_base_models_that_are_none(here: HubServer, source: Path, out: Path, name: str) -> None:
    for publish in (
        lambda: push(out, REPO, base_model=name),
        lambda: convert_to_hub(source, REPO, method="int8", base_model=name),
    ):
        with pytest.raises(UsageError, match=r"--base-model: .* is no name of a model repository"):
            publish()
    assert here.requests == []


def test_a_commit_is_told_of_its_own_repository(here: HubServer, source: Path) -> None:
    commit = here.store.add_folder("org/base", source).commit("main").sha
    convert_to_hub("org/base", REPO, method="int8")
    assert f"org/base/tree/{commit}" in published(here, REPO)["README.md"].decode()
    convert_to_hub("org/base", REPO, method="int8", base_model="org/other")
    card = published(here, REPO)["README.md"].decode()
    assert "https://huggingface.co/org/other)" in card
    assert commit not in card
