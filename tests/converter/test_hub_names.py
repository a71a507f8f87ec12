"""What a name means: which repository, at which commit, or nothing that is here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hostile.small import QWEN_CONFIG, qwen_shards, write_sharded
from hub_server import HubServer
from publishing import use

import omni_convert
from omni_convert import OmniConvertError
from omni_convert.converter.hub_repo import Repo, parse_repo


@pytest.mark.parametrize(
    ("text", "repo"),
    [
        ("org/name", Repo("org/name")),
        ("org/name@v1", Repo("org/name", "v1", is_pinned=True)),
        ("org/name@main", Repo("org/name", "main", is_pinned=True)),
        ("https://huggingface.co/org/name", Repo("org/name")),
        ("https:/huggingface.co/org/name/", Repo("org/name")),
        ("https://huggingface.co/org/name/tree/refs/pr/1", Repo("org/name", "refs/pr/1", is_pinned=True)),
        ("hf://org/name@v1", Repo("org/name", "v1", is_pinned=True)),
        ("https://example.com/org/name", None),
        ("https://huggingface.co/org/name/blob/main/config.json", None),
        ("org/name/transformer", None),
        ("org/name@", None),
        ("./org/name", None),
        ("name", None),
    ],
)
def test_which_repository_is_meant(text: str, repo: Repo | None) -> None:
    assert parse_repo(text) == repo


@pytest.mark.parametrize("name", ["org/base/transformer", "org/base@"])
def test_names_of_nothing(name: str) -> None:
    with pytest.raises(OmniConvertError, match=r"found nothing there, .* ORGANIZATION/NAME\[@REVISION\]"):
        omni_convert.inspect(name)


def test_what_must_be_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for look in (omni_convert.verify, omni_convert.report, lambda out: omni_convert.push(out, "me/x")):
        with pytest.raises(OmniConvertError, match=r"org/base: .* hf download ORGANIZATION/NAME --local-dir DIR"):
            look("org/base")


def test_a_source_that_moved_since(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_sharded(tmp_path / "model", qwen_shards(), QWEN_CONFIG)
    commit = hub.store.add_folder("org/base", model).refs["main"]
    use(hub, monkeypatch, tmp_path / "home")
    omni_convert.convert("org/base", tmp_path / "out", method="int8")
    changed = shutil.copytree(model, tmp_path / "changed")
    for path in changed.glob("*.safetensors"):
        path.write_bytes(path.read_bytes() + b"  ")
    hub.store.add_folder("org/base", changed)
    found = omni_convert.verify(tmp_path / "out", source="org/base")
    assert found.ok and found.layers
    (said,) = [check.checked for check in found.checks if check.name == "source"]
    assert said.endswith(f", of org/base@{commit}, which was converted")
    assert omni_convert.report(tmp_path / "out", source="org/base").to_html()
    assert not omni_convert.verify(tmp_path / "out", source="org/base@main").ok
    assert "Fetching" not in capsys.readouterr().err, "this is no terminal"
