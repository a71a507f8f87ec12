"""Small files go up together: however many there are, few of them are on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile.small import QWEN_CONFIG, qwen_shards, write_sharded
from hub_server import Fault, HubServer
from publishing import folder_files, published, use, weights_of

import omni_convert
from omni_convert import OmniConvertError
from omni_convert.hub.repository import Draft
from omni_convert.hub.transfer import convert_to_hub

REPO = "me/model"
SIZE, COUNT, TOGETHER = 50_000, 20, 200_000


def test_many_small_files(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with an end before the merge, after which those that left are written and compared again."""
    source = write_sharded(tmp_path / "model", qwen_shards(), QWEN_CONFIG)
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    for number in range(COUNT):
        (source / f"notes-{number:02}.txt").write_text(f"{number:02}" * (SIZE // 2))
    omni_convert.convert(source, tmp_path / "out", method="int8")
    use(hub, monkeypatch, tmp_path / "home")
    monkeypatch.setattr("omni_convert.hub.transfer.SMALL_BYTES", TOGETHER)
    work, held = tmp_path / "work", [0]
    original = Draft.commit

    def commit(self: Draft, *arguments: object) -> None:
        held.append(sum(path.stat().st_size for path in work.rglob("out/notes-*")))
        original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Draft, "commit", commit)
    hub.faults.append(Fault("/merge", "POST", times=99, status=403))
    with pytest.raises(OmniConvertError, match="no right"):
        convert_to_hub(source, REPO, method="int8", work=work)
    assert TOGETHER <= max(held) <= 2 * (TOGETHER + SIZE) < COUNT * SIZE
    hub.faults.clear()
    convert_to_hub(source, REPO, method="int8", work=work)
    assert weights_of(published(hub, REPO)) == weights_of(folder_files(tmp_path / "out"))
    assert b"license: mit" in published(hub, REPO)["README.md"]
    repo = hub.store.repos[REPO]
    titles = [commit.title for commit in repo.history("refs/pr/1")]
    assert titles.count("Add 4 files") == COUNT * SIZE // TOGETHER
    before = repo.commits[repo.commit("refs/pr/1").parent or ""].files
    assert not [name for name in before if name.endswith(".json")], "seals come last"
    again = convert_to_hub(source, REPO, method="int8", work=work)[1]
    assert {change.state for change in again.changes} == {"unchanged"}
