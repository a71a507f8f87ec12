"""The command line as a user runs it, against the tests' own Hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hub_server import TOKEN, HubServer

ROOT = Path(__file__).parent.parent


class Cli:
    """``omni-convert`` in processes with a Hub cache (``home``) of its own."""

    def __init__(self, hub: HubServer, folder: Path) -> None:
        self.hub = hub
        self.folder = folder
        self.home = folder / "home"
        folder.mkdir(parents=True, exist_ok=True)

    def environment(self, token: str | None = TOKEN, **more: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        return kept | self.hub.environment(self.home, token) | more

    def command(self, *arguments: object, code: str = "") -> list[str]:
        """``code`` runs before the program does."""
        run = "import sys; from omni_convert.cli import main; sys.argv[0] = 'omni-convert'; main()"
        return [sys.executable, "-c", f"{code}\n{run}", *map(str, arguments)]

    def run(
        self, *arguments: object, token: str | None = TOKEN, code: str = "", **more: str
    ) -> subprocess.CompletedProcess[str]:
        command, environment = self.command(*arguments, code=code), self.environment(token, **more)
        return subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=180)

    def fails(self, *arguments: object, token: str | None = TOKEN, code: str = "", **more: str) -> str:
        """What it says when it fails: one paragraph, nothing on stdout."""
        done = self.run(*arguments, token=token, code=code, **more)
        assert done.returncode in (1, 2) and not done.stdout, done
        assert "Traceback" not in done.stderr
        return done.stderr

    def succeeds(self, *arguments: object, token: str | None = TOKEN, code: str = "", **more: str) -> str:
        done = self.run(*arguments, token=token, code=code, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def cached(self) -> set[str]:
        """Names of the files in the Hub cache, whatever commit they are of."""
        return {path.name for path in self.home.glob("hub/models--*/snapshots/**/*") if path.is_file()}


def contents(folder: Path, without: str = "omni_convert.json") -> dict[str, bytes]:
    """Bytes of all files by relative path, without the manifest, which says where the source was."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != without]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
