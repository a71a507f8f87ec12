"""Publishing on the tests' Hub, in this process or in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer
from signals import default_signals


def use(hub: HubServer, monkeypatch: pytest.MonkeyPatch, home: Path, token: str | None = TOKEN) -> None:
    """Have huggingface_hub in this process talk to ``hub``; it reads these once, when it is imported."""
    from huggingface_hub import constants

    values = {"ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": False}
    values |= {"HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}"}
    values |= {"HF_HUB_DISABLE_XET": not hub.store.xet, "HF_TOKEN_PATH": str(home / "token")}
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("omni_convert.converter.hub_errors.WAITS", [0.01])


def start(hub: HubServer, home: Path, *arguments: object, token: str | None = TOKEN) -> subprocess.Popen[str]:
    """The command line, in a process of its own."""
    names = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.Popen(
        [sys.executable, "-m", "omni_convert", *map(str, arguments)],
        env=names | hub.environment(home, token),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )


def command(hub: HubServer, home: Path, *arguments: object, token: str | None = TOKEN) -> tuple[int, str, str]:
    """Its exit status, stdout and stderr."""
    process = start(hub, home, *arguments, token=token)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def published(hub: HubServer, repo_id: str, revision: str = "main") -> dict[str, bytes]:
    """What a repository holds."""
    return {name: blob.path.read_bytes() for name, blob in hub.store.repos[repo_id].commit(revision).files.items()}


def weights_of(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """What must be the same wherever a conversion went."""
    own = ("README.md", "omni_convert.json", "omni_convert_sqnr.png", ".gitattributes")
    return {name: data for name, data in files.items() if name not in own}


def folder_files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
