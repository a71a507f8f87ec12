"""A Hugging Face Hub on loopback, for tests: real HTTP, as huggingface_hub's real client speaks it.

``HubServer.store`` holds the repositories, ``requests`` what was asked, ``faults`` what goes wrong next. Large files
are redirected to another host name, as the Hub sends them to its CDN, where no token belongs.
"""

from __future__ import annotations

import re
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from hub_handler import Handler
from hub_store import Store, User

TOKEN, READ_ONLY, OTHER = "hf_tokenOfMe", "hf_readOnlyTokenOfMe", "hf_tokenOfSomebodyElse"


@dataclass
class Fault:
    """What happens to the next ``times`` requests whose method and path match.

    One of: an answer of ``status`` with ``body``, the connection closed when ``drop_after`` bytes of the body went out,
    the server gone at that point (``die``), or every 64 KiB delayed by ``slow`` seconds.
    """

    pattern: str
    method: str = "GET"
    times: int = 1
    status: int | None = None
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    drop_after: int | None = None
    die: bool = False
    slow: float = 0.0


@dataclass
class Request:
    method: str
    path: str
    token: str | None
    host: str
    range: str | None = None
    status: int = 0
    sent: int = 0


class HubServer:
    """``with HubServer(folder) as hub:`` serves at ``hub.url``.

    ``xet=False`` leaves out the Xet headers, as a Hub without it; ``page`` is the number of files in a page of a tree.
    """

    def __init__(self, folder: Path, xet: bool = False, page: int = 1000) -> None:
        self.store = Store(folder, xet)
        self.page = page
        self.store.users = {
            TOKEN: User("me", orgs=("org",)),
            READ_ONLY: User("me", write=False),
            OTHER: User("somebody"),
        }
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.connections: set[Any] = set()
        self._listen(0)
        self.port: int = self._http.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def cdn(self) -> str:
        return f"http://localhost:{self.port}"

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """What makes a child process use this Hub, with a cache of its own. Leave out ``HF_HUB_OFFLINE``."""
        names = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
        names["HF_HUB_OFFLINE"] = "0"
        if not self.store.xet:
            names["HF_HUB_DISABLE_XET"] = "1"
        return names | ({"HF_TOKEN": token} if token else {})

    def next_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    def files_sent(self) -> set[str]:
        """Paths of the repositories' files whose content went out, wholly or in part."""
        found = (
            re.fullmatch(r"/.+?/resolve/(?:refs/pr/\d+|[^/]+)/(.+)", request.path)
            for request in self.requests
            if request.sent
        )
        return {match[1] for match in found if match}

    def bytes_sent(self) -> int:
        return sum(request.sent for request in self.requests)

    def _listen(self, port: int) -> None:
        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self._http.block_on_close = False
        self._http.hub = self  # type: ignore[attr-defined]
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def die(self) -> None:
        """Stop listening and cut all connections; ``revive`` listens again at the same port."""
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self.connections):
            with suppress(OSError):  # it ended by itself
                connection.shutdown(socket.SHUT_RDWR)

    def revive(self) -> None:
        self._listen(self.port)

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.die()
