"""How the tests' Hub speaks HTTP: connections, bodies, tokens, faults. What it answers is in hub_routes.py."""

from __future__ import annotations

import json
import socket
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_routes import answer
from hub_store import HubError, Repo, Store, User

if TYPE_CHECKING:
    from hub_server import Fault, HubServer, Request

_BLOCK = 1 << 16


class GoneError(Exception):
    """The connection is cut here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body go out apart, and the second would wait
    record: Request
    fault: Fault | None

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined,no-any-return]

    @property
    def store(self) -> Store:
        return self.hub.store

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *values: Any) -> None:
        """Requests are in ``HubServer.requests``."""

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, GoneError):
            self.close_connection = True

    def do_GET(self) -> None:
        from hub_server import Request

        split = urlsplit(self.path)
        self.route, self.query = unquote(split.path), {k: v[-1] for k, v in parse_qs(split.query).items()}
        self.parts = [unquote(part) for part in split.path.strip("/").split("/")]
        header = self.headers.get("Authorization", "")
        self.token = header.removeprefix("Bearer ") or None
        host = (self.headers.get("Host") or "").split(":")[0]
        self.record = Request(self.command, self.route, self.token, host, self.headers.get("Range"))
        self.hub.requests.append(self.record)
        self.body = self._read()
        self.fault = self.hub.next_fault(self.command, self.route)
        try:
            if self.fault and self.fault.status:
                self.send(self.fault.status, self.fault.body.encode(), self.fault.headers)
                return
            if self.token and self.token not in self.store.users:
                text = "Invalid credentials in Authorization header"
                self.send(401, json.dumps({"error": text}).encode(), {"X-Error-Message": text})
                return
            answer(self)
        except HubError as error:
            headers = {"X-Error-Message": error.text} | ({"X-Error-Code": error.code} if error.code else {})
            self.json({"error": error.text} | error.body, error.status, headers)

    do_POST = do_PUT = do_HEAD = do_DELETE = do_GET  # noqa: N815

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            found = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def user(self) -> User | None:
        return self.store.users.get(self.token or "")

    def writer(self, owner: str) -> User:
        """Who asks.

        Raises:
            HubError: They may not write there.
        """
        user = self.user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if not user.write or owner not in (user.name, *user.orgs):
            raise HubError(403, f"You don't have the rights to write to the namespace {owner!r}")
        return user

    def repo(self, id: str) -> Repo:
        """A repository as far as the one who asks may know of it."""
        repo, user = self.store.repos.get(id), self.user()
        hidden = repo is not None and repo.private and (user is None or repo.owner not in (user.name, *user.orgs))
        if repo is None or hidden:
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def send(self, status: int, data: bytes | Path, headers: dict[str, str], at: int = 0, size: int = -1) -> None:
        """Answer with bytes, or with ``size`` bytes of a file from ``at`` on."""
        size = len(data) if isinstance(data, bytes) else data.stat().st_size if size < 0 else size
        self.record.status = status
        self.send_response(status)
        for name, value in ({"Content-Length": str(size)} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if isinstance(data, bytes):
            self._body(data)
            return
        with data.open("rb") as file:
            file.seek(at)
            while size > 0:
                block = file.read(min(size, _BLOCK))
                self._body(block)
                size -= len(block)

    def _body(self, block: bytes) -> None:
        fault = self.fault
        left = fault.drop_after - self.record.sent if fault and fault.drop_after is not None else len(block)
        self.wfile.write(block[:left])
        self.record.sent += len(block[:left])
        if fault and fault.slow:
            time.sleep(fault.slow)
        if fault and fault.drop_after is not None and left <= len(block):
            if fault.die:
                self.hub.die()
            self.connection.shutdown(socket.SHUT_RDWR)
            raise GoneError
