"""What the tests of publishing share."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server import HubServer
from publishing import use


@pytest.fixture
def here(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HubServer:
    """The Hub, used by this process too."""
    use(hub, monkeypatch, tmp_path / "home")
    return hub
