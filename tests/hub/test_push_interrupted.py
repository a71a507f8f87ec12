"""What ``push`` says when somebody ends it, when it may not reach the Hub, and when that is no Hub."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from hostile.small import write_pipeline
from hub_server import TOKEN, Fault, HubServer
from publishing import published, start, use

import omni_convert
from omni_convert import OmniConvertError
from omni_convert.hub.push import push

REPO = "me/model"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    omni_convert.convert(write_pipeline(folder / "model"), folder / "out", method="int8")
    return folder / "out"


@pytest.mark.parametrize(
    ("method", "route", "text"),
    [
        ("GET", "whoami", "Interrupted. Nothing was uploaded.\n"),
        ("POST", "/commit/", "kept in the pull request {}/discussions/1: the same command goes on from there.\n"),
    ],
)
def test_an_interrupt(hub: HubServer, out: Path, tmp_path: Path, method: str, route: str, text: str) -> None:
    hub.faults.append(Fault(route, method, times=99, status=503))
    process = start(hub, tmp_path, "push", out, REPO, "--yes")
    while hub.faults[0].times == 99 and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.3)  # it waits for the Hub
    process.send_signal(signal.SIGINT)
    stdout, err = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (1, ""), err
    assert err.endswith(text.format(f"{hub.url}/{REPO}"))


def test_offline(hub: HubServer, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(hub, monkeypatch, tmp_path / "home")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OmniConvertError, match=r"HF_HUB_OFFLINE is set\. Unset it, then run again\.$"):
        push(out, REPO)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("method", "route"),
    [
        ("GET", "whoami"),
        ("GET", "/tree/main"),
        ("POST", "/repos/create"),
        ("GET", "/discussions$"),
        ("POST", "/discussions$"),
        ("POST", "/preupload/"),
        ("POST", "/commit/"),
        ("GET", "/tree/refs/pr/1"),
        ("GET", "/commits/main"),
    ],
)
@pytest.mark.parametrize("body", ["[]", "null", '["hf_secretOfMe"]', '{"x": 1}'])
def test_answers_of_another_shape(
    hub: HubServer, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, route: str, body: str
) -> None:
    use(hub, monkeypatch, tmp_path / "home")
    hub.store.create(REPO)
    hub.faults.append(Fault(route, method, times=99, status=200, body=body))
    try:
        push(out, REPO)
    except OmniConvertError as error:
        assert "hf_" not in str(error)
        assert TOKEN not in str(error)
        assert set(published(hub, REPO)) == {".gitattributes"}
    else:  # of an answer that nobody reads, or that is an empty list of the right shape
        assert "model_index.json" in published(hub, REPO)
    assert hub.faults[0].times < 99
