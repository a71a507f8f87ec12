"""What may become the card of a repository, asked before anything is uploaded, and the cards of people, which stay."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile.small import write_pipeline
from hub_server import TOKEN, HubServer
from publishing import command, published
from signals import default_signals

import omni_convert
from omni_convert import OmniConvertError, UsageError
from omni_convert.hub.push import push
from omni_convert.hub.transfer import convert_to_hub

REPO = "me/model"
MINE = b"---\nlicense: mit\n---\n# By hand\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("place") / "model")


@pytest.fixture(scope="module")
def out(source: Path) -> Path:
    omni_convert.convert(source, source.with_name("int8"), method="int8")
    return source.with_name("int8")


def put(hub: HubServer, files: dict[str, bytes]) -> None:
    """A commit of somebody else."""
    added = {name: hub.store.small(data) for name, data in files.items()}
    hub.store.commit(hub.store.repos[REPO], "main", "by hand", added, ())


def both(source: Path, out: Path, **choices: object) -> list[Callable[[], object]]:
    """Both ways to publish, with another method than what ``push`` has."""
    return [
        lambda: push(out, REPO, **choices),  # type: ignore[arg-type]
        lambda: convert_to_hub(source, REPO, method="fp8", **choices),  # type: ignore[arg-type]
    ]


def test_metadata_that_the_hub_refuses_is_found_first(here: HubServer, source: Path, out: Path, tmp_path: Path) -> None:
    (card := tmp_path / "card.md").write_text("---\nbase_model_relation: quantized\n---\n")
    for publish in both(source, out, card=card):
        with pytest.raises(OmniConvertError, match=r"metadata of its card .*base_model_relation needs base_model"):
            publish()
    assert here.store.repos == {}
    assert not [request for request in here.requests if request.method == "PUT"]


def test_an_empty_card_is_none(here: HubServer, source: Path, out: Path, tmp_path: Path) -> None:
    (card := tmp_path / "card.md").write_text(" \n")
    for publish in both(source, out, card=card):
        with pytest.raises(OmniConvertError, match=r"card\.md: is empty, expected a model card"):
            publish()
    assert here.requests == []
    card.write_text("# Without metadata\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        push(out, REPO, card=card)
    assert published(here, REPO)["README.md"] == b"# Without metadata\n"


def test_the_users_token_is_not_published(here: HubServer, source: Path, out: Path, tmp_path: Path) -> None:
    (card := tmp_path / "card.md").write_text(f"export HF_TOKEN={TOKEN}\n")
    for choices, what in (({"card": card}, "--card .*card.md"), ({"message": f"with {TOKEN}"}, "--message")):
        for publish in both(source, out, **choices):
            with pytest.raises(UsageError, match=f"{what}: holds your token") as caught:
                publish()
            assert TOKEN not in str(caught.value)
    assert here.requests == []


@pytest.mark.parametrize("changed", [True, False])
def test_a_card_that_a_person_wrote_stays(
    here: HubServer, source: Path, out: Path, tmp_path: Path, changed: bool
) -> None:
    """Of a repository without a model, and one that a person changed after it was published."""
    if changed:
        push(out, REPO)
    else:
        here.store.create(REPO)
    put(here, {"README.md": MINE})
    for publish in both(source, out):
        with pytest.raises(OmniConvertError, match=r"its README\.md was not written by omni-convert, .*--card"):
            publish()
    assert published(here, REPO)["README.md"] == MINE
    assert not [pull for pull in here.store.repos[REPO].discussions if pull.status != "merged"]
    (card := tmp_path / "card.md").write_text("# By hand, too\n")
    for publish in both(source, out, card=card):
        publish()
    assert published(here, REPO)["README.md"] == b"# By hand, too\n"
    with pytest.raises(OmniConvertError, match="was not written by omni-convert"):
        push(out, REPO)


def test_our_own_card_is_replaced(here: HubServer, source: Path, out: Path) -> None:
    for publish in (*both(source, out), *both(source, out)):
        publish()
        found = published(here, REPO)
        assert json.loads(found["omni_convert.json"])["card_sha256"]
        assert b"omni-convert" in found["README.md"]


def test_anybody_may_propose_another_card(here: HubServer, out: Path) -> None:
    here.store.create(REPO)
    put(here, {"README.md": MINE})
    push(out, REPO, create_pr=True)
    assert published(here, REPO)["README.md"] == MINE


def test_private_is_refused_also_if_nothing_changed(here: HubServer, out: Path) -> None:
    push(out, REPO)
    with pytest.raises(UsageError, match="is there and public, so --private would not be kept"):
        push(out, REPO, private=True)


def test_one_is_asked_once_who_one_is(here: HubServer, out: Path) -> None:
    push(out, REPO)
    assert sum("whoami" in request.path for request in here.requests) == 1


def test_no_bars_of_the_hubs_client(
    here: HubServer, out: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    push(out, REPO)
    assert capfd.readouterr() == ("", "")
    status, _, err = command(here, tmp_path / "other", "push", out, "me/other", "--yes")
    assert status == 0
    assert "Upload" not in err
    assert "it/s" not in err


def test_ctrl_c_at_the_question(here: HubServer, out: Path, tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    names = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    with (tmp_path / "said").open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "omni_convert", "push", str(out), REPO],
            env=names | here.environment(tmp_path), stdin=follower, stderr=file, preexec_fn=default_signals,
        )  # fmt: skip
    end = time.monotonic() + 120
    while "Upload? [y/N]" not in (tmp_path / "said").read_text() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.2)  # until it reads
    process.send_signal(signal.SIGINT)
    status, said = process.wait(timeout=60), (tmp_path / "said").read_text()
    os.close(leader)
    os.close(follower)
    assert status == 1
    assert said.partition("Upload? [y/N]: ")[2].strip() == "Error: Interrupted. Nothing was uploaded."
    assert here.store.repos == {}
