"""Settings with which the Hub's client cannot work, and what answers in the Hub's place: one paragraph each."""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile.small import QWEN_CONFIG, qwen_shards, write_sharded
from hub_cli import Cli
from hub_server import TOKEN, Fault, HubServer
from publishing import use

import omni_convert
from omni_convert import OmniConvertError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sharded(tmp_path_factory.mktemp("source") / "model", qwen_shards(), QWEN_CONFIG)


@pytest.fixture(scope="module")
def out(model: Path) -> Path:
    omni_convert.convert(model, model.with_name("out"), method="int8")
    return model.with_name("out")


@pytest.fixture
def base(hub: HubServer, model: Path, out: Path) -> HubServer:
    """The Hub with ``org/base``, and its conversion as ``org/int8``."""
    hub.store.add_folder("org/base", model)
    hub.store.add_folder("org/int8", out)
    return hub


@pytest.mark.parametrize("path", ["/revision/", "/tree/"])
@pytest.mark.parametrize("body", ["<html>login</html>", "null", '{"x": 1}', '[{"type": "file"}]'])
def test_answers_of_something_else(
    base: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, body: str
) -> None:
    use(base, monkeypatch, tmp_path / "home")
    base.faults.append(Fault(path, status=200, body=body, times=99))
    with pytest.raises(OmniConvertError, match=rf"^org/base: {base.url} answered something that is not the Hub's"):
        omni_convert.plan("org/base", method="int8")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1", "a SOCKS proxy is set"),
        ("HTTP_PROXY", "foo:bar", "no address can be made of {url} and the proxies"),
        ("HF_ENDPOINT", "http://[bad", "Invalid IPv6 URL"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "x", "huggingface_hub cannot start (invalid literal for int() with base 10: 'x')"),
        ("HF_TOKEN", "hf_ünicode", "the token has characters that no token has"),
        ("SSL_CERT_FILE", "/nonexistent", "there are no certificates where SSL_CERT_FILE"),
        ("HF_HOME", "/dev/null", "/dev/null/hub: "),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "push"])
def test_settings_that_cannot_work(
    base: HubServer, cli: Cli, out: Path, command: str, name: str, value: str, text: str
) -> None:
    arguments = {"inspect": ("inspect", "org/base"), "push": ("push", out, "org/int8", "--yes")}[command]
    impatient = "from omni_convert.converter import hub_errors; hub_errors.WAITS[:] = []"
    found = cli.fails(*arguments, token=TOKEN, code=impatient, **{"NO_PROXY": "", name: value})
    assert text.format(url=base.url) in found
    assert "cannot be reached" not in found


def test_a_file_that_is_gone(base: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(base, monkeypatch, tmp_path / "home")
    base.faults.append(Fault("cdn.*00002", status=404, times=99))
    with pytest.raises(OmniConvertError, match=r"org/base: .*00002.*: is not on the Hub any more .*Run again"):
        omni_convert.plan("org/base", method="int8")
