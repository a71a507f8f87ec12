"""``push`` through huggingface_hub's real client: all of a model is seen or nothing, and every refusal is clear."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hostile.small import write_pipeline
from hub_server import OTHER, READ_ONLY, TOKEN, Fault, HubServer
from publishing import command, folder_files, published, use, weights_of

import omni_convert
from omni_convert import OmniConvertError, UsageError
from omni_convert.hub.push import Change, push

REPO = "me/model-INT8"


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pipeline converted twice, with two methods; the second from a model without its text encoder's index."""
    folder = tmp_path_factory.mktemp("push")
    source = write_pipeline(folder / "model")
    for method in ("int8", "fp8"):
        omni_convert.convert(source, folder / method, method=method)
    return {method: folder / method for method in ("int8", "fp8")}


@pytest.fixture(params=["hub", "xet_hub"])
def any_hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HubServer:
    """Either way of uploading large files, used by this process."""
    hub: HubServer = request.getfixturevalue(request.param)
    use(hub, monkeypatch, tmp_path / "home")
    return hub


def mains(hub: HubServer, repo_id: str = REPO) -> list[set[str]]:
    """What main ever showed, from the first commit on."""
    repo = hub.store.repos[repo_id]
    found, sha = [], repo.refs["main"]
    while sha:
        commit = repo.commits[sha]
        found.append(set(commit.files))
        sha = commit.parent or ""
    return found[::-1]


def states(changes: tuple[Change, ...]) -> set[str]:
    return {change.state for change in changes}


def test_a_folder_is_published_whole_or_not_at_all(any_hub: HubServer, outs: dict[str, Path]) -> None:
    asked = []
    result = push(outs["int8"], REPO, confirm=lambda url, changes: asked.append((url, changes)) or True)  # type: ignore[func-returns-value]
    assert result is not None
    assert result.url == f"{any_hub.url}/{REPO}"
    assert asked == [(result.url, result.changes)]
    assert states(result.changes) == {"new"}
    found = published(any_hub, REPO)
    assert weights_of(found) == weights_of(folder_files(outs["int8"]))
    assert found["README.md"].startswith(b"---\nlibrary_name: diffusers\n")
    assert mains(any_hub) == [{".gitattributes"}, set(found)]
    drafts = [
        commit for commit in any_hub.store.repos[REPO].commits.values() if len(commit.files) not in (1, len(found))
    ]
    assert drafts, "nothing was uploaded before the config"
    assert all("transformer/config.json" not in commit.files for commit in drafts)
    assert all("model_index.json" not in commit.files for commit in drafts)


def test_what_was_published_verifies_and_is_the_same_again(
    any_hub: HubServer, outs: dict[str, Path], tmp_path: Path
) -> None:
    from huggingface_hub import snapshot_download

    push(outs["int8"], REPO)
    copy = Path(snapshot_download(REPO, local_dir=tmp_path / "copy"))
    assert omni_convert.verify(copy).ok
    count = len(any_hub.store.repos[REPO].commits)
    again = push(outs["int8"], REPO)
    assert again is not None
    assert states(again.changes) == {"unchanged"}
    assert len(any_hub.store.repos[REPO].commits) == count


def test_another_conversion_takes_the_place_of_the_first(here: HubServer, outs: dict[str, Path]) -> None:
    push(outs["int8"], REPO)
    here.store.commit(here.store.repos[REPO], "main", "notes", {"notes.txt": here.store.small(b"mine")}, ())
    stale = dict(here.store.repos[REPO].commit("main").files)
    manifest = json.loads(stale["omni_convert.json"].path.read_bytes())
    manifest["files"]["transformer/old.safetensors"] = {"size": 1, "sha256": ""}
    added = {"omni_convert.json": here.store.small(json.dumps(manifest).encode())}
    added["transformer/old.safetensors"] = here.store.small(b"o")
    here.store.commit(here.store.repos[REPO], "main", "as by an earlier version", added, ())
    result = push(outs["fp8"], REPO)
    assert result is not None
    assert {change.name: change.state for change in result.changes}["transformer/old.safetensors"] == "removed"
    found = published(here, REPO)
    assert found.pop("notes.txt") == b"mine"
    assert weights_of(found) == weights_of(folder_files(outs["fp8"]))
    assert "transformer/old.safetensors" in mains(here)[-2]


def test_weights_of_somebody_else_stay(here: HubServer, outs: dict[str, Path]) -> None:
    repo = here.store.create(REPO)
    here.store.commit(repo, "main", "mine", {"transformer/lora.safetensors": here.store.small(b"mine")}, ())
    with pytest.raises(OmniConvertError, match=r"holds transformer/lora\.safetensors, .*remove it there"):
        push(outs["int8"], REPO)
    assert not repo.discussions


def test_a_pull_request_may_stay_open(any_hub: HubServer, outs: dict[str, Path]) -> None:
    any_hub.store.create("org/theirs")
    result = push(outs["int8"], "org/theirs", create_pr=True, message="Please take this")
    assert result is not None
    assert result.url == f"{any_hub.url}/org/theirs/discussions/1"
    (pull,) = any_hub.store.repos["org/theirs"].discussions
    assert pull.title.startswith("Please take this (omni-convert ")
    assert pull.status == "open"
    assert set(published(any_hub, "org/theirs")) == {".gitattributes"}
    assert weights_of(published(any_hub, "org/theirs", "refs/pr/1")) == weights_of(folder_files(outs["int8"]))
    push(outs["int8"], "org/theirs", create_pr=True)
    assert len(any_hub.store.repos["org/theirs"].discussions) == 1


def test_whoever_may_not_write_may_open_a_pull_request(
    here: HubServer, outs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    here.store.create("org/theirs")
    monkeypatch.setenv("HF_TOKEN", OTHER)
    with pytest.raises(OmniConvertError, match="has no right to do that"):
        push(outs["int8"], "org/theirs")
    assert not here.store.repos["org/theirs"].discussions
    push(outs["int8"], "org/theirs", create_pr=True)
    assert here.store.repos["org/theirs"].discussions[0].author == "somebody"


def test_nothing_is_written_if_one_says_no(here: HubServer, outs: dict[str, Path]) -> None:
    assert push(outs["int8"], REPO, confirm=lambda url, changes: False) is None
    assert here.store.repos == {}


def test_a_card_of_ones_own(here: HubServer, outs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    push(outs["int8"], REPO, card=tmp_path / "card.md")
    assert published(here, REPO)["README.md"] == (tmp_path / "card.md").read_bytes()


@pytest.mark.parametrize("name", ["model", "a/b/c", "me/-x", "me/a b", "datasets/me/x", "me/x.git", ""])
def test_names_that_are_none(here: HubServer, outs: dict[str, Path], name: str) -> None:
    with pytest.raises(UsageError, match="is no name of a model repository, expected ORGANIZATION/NAME"):
        push(outs["int8"], name)
    assert here.requests == []


def test_an_unfinished_or_damaged_folder_is_refused(here: HubServer, outs: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(outs["int8"], tmp_path / "out")
    shard = next((copy / "transformer").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    with pytest.raises(OmniConvertError, match=rf"does not pass verify, .*{shard.name}: its sha256 differs"):
        push(copy, REPO)
    (copy / ".omni_convert.partial").write_text("")
    with pytest.raises(OmniConvertError, match="unfinished output"):
        push(copy, REPO)
    (copy / ".omni_convert.partial").unlink()
    (copy / "omni_convert.json").unlink()
    with pytest.raises(OmniConvertError, match=r"found no omni_convert\.json"):
        push(copy, REPO)
    assert here.store.repos == {}


@pytest.mark.parametrize(
    ("token", "text"),
    [
        (None, "nobody is logged in. Run: hf auth login"),
        ("hf_wrongTokenOfNobody", "the Hub does not take the token .*correct HF_TOKEN"),
        (READ_ONLY, "the token has no right to do that .*settings/tokens"),
        (OTHER, "the token has no right to do that .*settings/tokens"),
    ],
)
def test_rights(
    here: HubServer, outs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, token: str | None, text: str
) -> None:
    here.store.create(REPO)
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(OmniConvertError, match=text) as caught:
        push(outs["int8"], REPO)
    assert "hf_" not in str(caught.value)
    assert mains(here) == [{".gitattributes"}]


def test_a_private_repository_and_its_quota(here: HubServer, outs: dict[str, Path]) -> None:
    here.store.quota = 100
    with pytest.raises(OmniConvertError, match=r"the storage is full \(Private repository storage limit"):
        push(outs["int8"], REPO, private=True)
    assert here.store.repos[REPO].private
    assert mains(here) == [{".gitattributes"}]
    here.store.quota = None
    push(outs["int8"], REPO)
    assert len(here.store.repos[REPO].discussions) == 1, "it went on in another pull request"
    assert len(mains(here)) == 2


_ROUTES = [
    ("GET", "whoami"),
    ("GET", "/tree/main"),
    ("POST", "/repos/create"),
    ("GET", "/auth-check/write"),
    ("GET", "/discussions$"),
    ("POST", "/discussions$"),
    ("POST", "/preupload/"),
    ("POST", "/commit/"),
    ("POST", "/validate-yaml"),
    ("GET", "/tree/refs/pr/1"),
    ("POST", "/status$"),
    ("POST", "/merge$"),
]


@pytest.mark.parametrize(("method", "route"), _ROUTES)
@pytest.mark.parametrize("fault", [{"status": 429}, {"status": 500}, {"drop_after": 0}])
def test_what_passes_by_itself_is_waited_for(
    here: HubServer, outs: dict[str, Path], method: str, route: str, fault: dict[str, int]
) -> None:
    here.faults.append(Fault(route, method, times=1, **fault))  # type: ignore[arg-type]
    push(outs["int8"], REPO)
    assert here.faults[0].times == 0, "the fault did not happen"
    assert len(mains(here)) == 2
    assert weights_of(published(here, REPO)) == weights_of(folder_files(outs["int8"]))
    pulls = here.store.repos[REPO].discussions
    assert [pull.status for pull in pulls if pull.status != "draft"] == ["merged"]


def test_a_hub_that_stays_in_trouble(here: HubServer, outs: dict[str, Path]) -> None:
    here.faults.append(Fault("/commit/", "POST", times=99, status=503))
    with pytest.raises(OmniConvertError, match=r"the Hub is in trouble \(503: .*the same command goes on from there"):
        push(outs["int8"], REPO)
    here.faults.clear()
    push(outs["int8"], REPO)
    assert [pull.status for pull in here.store.repos[REPO].discussions] == ["merged"]


def test_a_hub_that_dies_in_the_middle(here: HubServer, outs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    here.faults.append(Fault("/commit/", "POST", drop_after=0, die=True))
    match = r"cannot be reached .*the same command goes on from there"
    with monkeypatch.context() as impatient, pytest.raises(OmniConvertError, match=match):
        impatient.setattr("omni_convert.converter.hub_errors.WAITS", [])
        push(outs["int8"], REPO)
    here.revive()
    assert mains(here) == [{".gitattributes"}]
    push(outs["int8"], REPO)
    assert weights_of(published(here, REPO)) == weights_of(folder_files(outs["int8"]))
    assert len(here.store.repos[REPO].discussions) == 1


def test_an_upload_that_is_not_what_it_should_be_is_not_merged(
    here: HubServer, outs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from omni_convert.hub.repository import Draft

    original = Draft.commit

    def commit(self: Draft, *arguments: object) -> None:
        original(self, *arguments)  # type: ignore[arg-type]
        repo = here.store.repos[REPO]
        here.store.commit(repo, "refs/pr/1", "meanwhile", {"model_index.json": here.store.small(b"{}")}, ())

    monkeypatch.setattr(Draft, "commit", commit)
    with pytest.raises(OmniConvertError, match=r"model_index\.json differs after the upload, so nothing was published"):
        push(outs["int8"], REPO)
    assert mains(here) == [{".gitattributes"}]


def test_the_command(hub: HubServer, outs: dict[str, Path], tmp_path: Path) -> None:
    status, out, err = command(hub, tmp_path, "push", outs["int8"], REPO)
    assert (status, out) == (2, "")
    assert err.endswith("Error: Nobody can be asked whether to upload that: pass --yes.\n")
    status, out, err = command(hub, tmp_path, "push", outs["int8"], REPO, "--yes", "--base-model", "org/base")
    assert (status, out) == (0, f"{hub.url}/{REPO}\n"), err
    assert "transformer/config.json" in err
    status, out, err = command(hub, tmp_path, "push", outs["int8"], REPO, "--json", "--base-model", "org/base")
    assert status == 0
    assert {file["state"] for file in json.loads(out)["files"]} == {"unchanged"}
    assert b"base_model: org/base\n" in published(hub, REPO)["README.md"]
    assert TOKEN not in out + err
    assert all(TOKEN.encode() not in data for data in published(hub, REPO).values())


def test_no_message_holds_a_token_or_what_signs_an_address(
    here: HubServer, outs: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    said = f"no {TOKEN} nor hf_abcdefgh at https://storage/x?signature=secret"
    for status, times in ((500, 1), (403, 99)):
        here.faults.append(Fault("/commit/", "POST", times=times, status=status, headers={"X-Error-Message": said}))
    with pytest.raises(OmniConvertError, match=r"\(no \[token\] nor \[token\] at https://storage/x\)") as caught:
        push(outs["int8"], REPO)
    assert here.faults[0].times == 0
    for text in (str(caught.value), caplog.text):
        assert TOKEN not in text
        assert "secret" not in text
