"""The tests' own Hub, through huggingface_hub's real client and, where Node is there, through the one from npm."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import OTHER, READ_ONLY, TOKEN, Fault, HubServer

_CLIENT = """
import os, sys
from huggingface_hub import HfApi
from huggingface_hub.errors import *
api = HfApi()
"""


def run(hub: HubServer, home: Path, code: str, token: str | None = TOKEN, **more: str) -> str:
    """What a process with the real client prints; its error's last line if it fails."""
    names = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = names | hub.environment(home, token) | more
    command = [sys.executable, "-c", _CLIENT + code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two large files, one of them in a folder, and two small ones."""
    made = tmp_path / "model"
    (made / "part").mkdir(parents=True)
    (made / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(os.urandom(300_000))
    (made / "part" / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def kinds(hub: HubServer) -> list[str]:
    return [f"{request.method} {request.path}" for request in hub.requests]


_ROUND_TRIP = """
api.create_repo("me/new", private=True)
api.create_repo("me/new", exist_ok=True)
api.upload_folder(repo_id="me/new", folder_path={folder!r}, commit_message="all")
api.snapshot_download("me/new", local_dir={copy!r})
print(api.whoami()["name"], api.model_info("me/new").private)
"""


@pytest.mark.parametrize("name", ["hub", "xet_hub"])
def test_a_folder_goes_up_and_comes_back(
    name: str, request: pytest.FixtureRequest, folder: Path, tmp_path: Path
) -> None:
    hub: HubServer = request.getfixturevalue(name)
    copy = tmp_path / "copy"
    assert run(hub, tmp_path / "home", _ROUND_TRIP.format(folder=str(folder), copy=str(copy))) == "me True"
    found = contents(copy)
    assert found.pop(".gitattributes")
    assert found == contents(folder)
    xet = name == "xet_hub"
    assert any("xet-write-token" in kind for kind in kinds(hub)) == xet
    assert any(kind.startswith("PUT ") for kind in kinds(hub)) != xet
    assert ("model.safetensors" in hub.files_sent()) != xet, "Xet files do not come from the Hub itself"
    data = (folder / "model.safetensors").read_bytes()
    assert hub.store.repos["me/new"].commit("main").files["model.safetensors"].etag == hashlib.sha256(data).hexdigest()


def test_an_unchanged_folder_makes_no_commit(xet_hub: HubServer, folder: Path, tmp_path: Path) -> None:
    code = f"api.create_repo('me/new', exist_ok=True)\napi.upload_folder(repo_id='me/new', folder_path={str(folder)!r})"
    for _ in range(2):
        run(xet_hub, tmp_path / "home", code)
    assert len(xet_hub.store.repos["me/new"].commits) == 2


def test_repositories_made_by_a_test_have_xet_files(xet_hub: HubServer, folder: Path, tmp_path: Path) -> None:
    xet_hub.store.add_folder("org/model", folder)
    run(xet_hub, tmp_path / "home", f"api.snapshot_download('org/model', local_dir={str(tmp_path / 'copy')!r})", None)
    assert contents(tmp_path / "copy") == contents(folder)
    assert any("xet-read-token" in kind for kind in kinds(xet_hub))
    assert "model.safetensors" not in xet_hub.files_sent()


_PULL_REQUEST = """
info = api.upload_folder(repo_id="org/model", folder_path={folder!r}, create_pr=True)
print(info.pr_revision, api.file_exists("org/model", "config.json"))
pr = api.get_discussion_details("org/model", 1)
print(pr.status, api.file_exists("org/model", "config.json", revision=pr.git_reference))
api.merge_pull_request("org/model", 1)
print(api.get_discussion_details("org/model", 1).status, api.file_exists("org/model", "config.json"))
print([ref.ref for ref in api.list_repo_refs("org/model", include_pull_requests=True).pull_requests])
"""


@pytest.mark.parametrize("name", ["hub", "xet_hub"])
def test_pull_requests(name: str, request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> None:
    hub: HubServer = request.getfixturevalue(name)
    hub.store.create("org/model")
    found = run(hub, tmp_path / "home", _PULL_REQUEST.format(folder=str(folder))).splitlines()
    assert found == ["refs/pr/1 False", "draft True", "merged True", "['refs/pr/1']"]


_ERRORS = """
def kind(call, *args, **options):
    try:
        call(*args, **options)
        return "fine"
    except Exception as error:
        response = getattr(error, "response", None)
        return f"{type(error).__name__} {response.status_code if response is not None else ''}".strip()

add = [CommitOperationAdd("a.json", b"{}")]
"""


@pytest.mark.parametrize(
    ("call", "token", "kind"),
    [
        ("api.model_info, 'org/none'", None, "RepositoryNotFoundError 401"),
        ("api.model_info, 'org/none'", TOKEN, "RepositoryNotFoundError 404"),
        ("api.model_info, 'org/private'", OTHER, "RepositoryNotFoundError 404"),
        ("api.model_info, 'org/private'", TOKEN, "fine"),
        ("api.model_info, 'org/model'", "hf_wrong", "HfHubHTTPError 401"),
        ("api.model_info, 'org/model', revision='v9'", None, "RevisionNotFoundError 404"),
        ("api.hf_hub_download, 'org/model', 'none.json'", None, "RemoteEntryNotFoundError 404"),
        ("api.model_info, 'org/gated'", None, "fine"),
        ("api.hf_hub_download, 'org/gated', 'config.json'", None, "GatedRepoError 401"),
        ("api.hf_hub_download, 'org/gated', 'config.json'", OTHER, "GatedRepoError 403"),
        ("api.create_repo, 'org/model'", TOKEN, "HfHubHTTPError 409"),
        ("api.create_repo, 'org/new'", READ_ONLY, "HfHubHTTPError 403"),
        ("api.create_repo, 'me/new'", OTHER, "HfHubHTTPError 403"),
        (
            "api.create_commit, 'org/model', add, commit_message='x', parent_commit='0' * 40",
            TOKEN,
            "HfHubHTTPError 412",
        ),
        ("api.create_commit, 'org/model', add, commit_message='x'", OTHER, "HfHubHTTPError 403"),
        ("api.create_commit, 'org/private', add, commit_message='x'", TOKEN, "HfHubHTTPError 403"),
    ],
)
def test_errors(hub: HubServer, folder: Path, tmp_path: Path, call: str, token: str | None, kind: str) -> None:
    hub.store.add_folder("org/model", folder)
    hub.store.add_folder("org/gated", folder, gated=True)
    hub.store.create("org/private", private=True)
    hub.store.quota = 0
    imports = "from huggingface_hub import CommitOperationAdd\n"
    assert run(hub, tmp_path / "home", imports + _ERRORS + f"print(kind({call}))", token) == kind


def test_a_tree_comes_in_pages(folder: Path, tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub", page=2) as hub:
        hub.store.add_folder("org/model", folder)
        code = "print(*sorted(file.path for file in api.list_repo_tree('org/model', recursive=True)))"
        expected = "README.md config.json model.safetensors part part/model.safetensors"
        assert run(hub, tmp_path / "home", code) == expected
        code = "print(*[file.path for file in api.get_paths_info('org/model', ['config.json', 'none'])])"
        assert run(hub, tmp_path / "home", code) == "config.json"


_GET = """
with open(api.hf_hub_download("org/model", "model.safetensors"), "rb") as got, open({path!r}, "rb") as wanted:
    print(got.read() == wanted.read())
"""


@pytest.mark.parametrize(
    "fault",
    [
        Fault("model.safetensors", drop_after=100_000),
        Fault("model.safetensors", method="HEAD", status=500),
        Fault("model.safetensors", method="HEAD", status=429, headers={"Retry-After": "1"}),
    ],
)
def test_the_client_gets_over_one_fault(hub: HubServer, folder: Path, tmp_path: Path, fault: Fault) -> None:
    hub.store.add_folder("org/model", folder)
    hub.faults.append(fault)
    code = _GET.format(path=str(folder / "model.safetensors"))
    assert run(hub, tmp_path / "home", code) == "True"
    assert fault.times == 0


def test_a_server_dies_and_comes_back(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    hub.store.add_folder("org/model", folder)
    hub.faults.append(Fault("model.safetensors", drop_after=100_000, die=True))
    code = _GET.format(path=str(folder / "model.safetensors"))
    assert "Connection refused" in run(hub, tmp_path / "home", code)
    hub.revive()
    before = hub.bytes_sent()
    assert run(hub, tmp_path / "home", code) == "True"
    assert before + 300_000 <= hub.bytes_sent() < before + 310_000


def test_slowness_takes_time(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    hub.store.add_folder("org/model", folder)
    hub.faults.append(Fault("model.safetensors", slow=0.2))
    begin = time.monotonic()
    run(hub, tmp_path / "home", _GET.format(path=str(folder / "model.safetensors")))
    assert time.monotonic() - begin > 1.0


def test_no_token_reaches_the_cdn(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    hub.store.add_folder("org/model", folder, private=True)
    run(hub, tmp_path / "home", "api.snapshot_download('org/model')")
    assert {request.token for request in hub.requests if request.host == "localhost"} == {None}
    assert {request.token for request in hub.requests if request.host == "127.0.0.1"} == {TOKEN}
