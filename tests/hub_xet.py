"""The Xet storage behind the tests' Hub: folders, which the real ``hf_xet`` writes and reads by ``local://`` addresses.

A folder's database is open to one process at a time, so that every client gets a copy of its own, and work on the main
copy is done in processes that end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path

_ENTRY = 48  # bytes of every entry of a shard
_VERIFICATION, _METADATA = 1 << 31, 1 << 30  # flags of a file: what follows its segments

_ADOPT = """
import sys, time, hf_xet
view, main, sha256, xet_hash, size, path = sys.argv[1:]
access = dict(token="x", token_expiry_unix_secs=int(time.time()) + 3600)
session = hf_xet.XetSession()
if xet_hash:
    with session.new_file_download_group(endpoint=view, **access) as group:
        group.start_download_file(hf_xet.XetFileInfo(xet_hash, int(size)), path)
with session.new_upload_commit(endpoint=main, **access) as commit:
    handle = commit.start_upload_file(path, sha256=sha256)
print(handle.result().xet_info.hash)
"""


class XetStore:
    def __init__(self, folder: Path) -> None:
        self.main = folder / "main"
        self.views = folder / "views"
        self.lock = threading.Lock()
        self.numbers = count()
        (self.main / "xet" / "xorbs").mkdir(parents=True)

    def view(self) -> str:
        """Address of a copy, for one client."""
        with self.lock:
            copy = self.views / str(next(self.numbers))
            shutil.copytree(self.main, copy, copy_function=_link)
            return f"local://{copy}"

    def adopt(self, sha256: str, size: int, path: Path) -> str | None:
        """Take what a client uploaded into the main copy and write it to ``path``; its Xet hash, None if there is none.

        A file that is there already is taken from there.
        """
        with self.lock:
            view, xet_hash = ("", "") if path.exists() else self._uploaded(sha256)
            if not (path.exists() or xet_hash):
                return None
            command = [sys.executable, "-c", _ADOPT, view, f"local://{self.main}", sha256, xet_hash, str(size), path]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

    def _uploaded(self, sha256: str) -> tuple[str, str]:
        for view in sorted(self.views.iterdir(), key=lambda view: -int(view.name)) if self.views.exists() else ():
            for shard in (view / "xet" / "xorbs" / "shards").glob("*.mdb"):
                for xet_hash, found in _files(shard.read_bytes()):
                    if found == sha256:
                        copy = self.views.parent / "reading" / str(next(self.numbers))  # its client may hold it open
                        shutil.copytree(view / "xet" / "xorbs", copy / "xet" / "xorbs", copy_function=_link)
                        return f"local://{copy}", xet_hash
        return "", ""


def _link(source: str, target: str) -> None:
    (shutil.copyfile if source.endswith(".redb") else os.link)(source, target)


def _files(shard: bytes) -> Iterator[tuple[str, str]]:
    """(Xet hash, SHA-256) of every file in a shard (xet-core's ``file_structs.rs``)."""
    at = _ENTRY
    while (entry := shard[at : at + _ENTRY])[:32] != b"\xff" * 32:
        flags, segments = (int.from_bytes(entry[32 + i : 36 + i], "little") for i in (0, 4))
        at += _ENTRY * (1 + segments * (2 if flags & _VERIFICATION else 1))
        if flags & _METADATA:
            yield _hex(entry[:32]), _hex(shard[at : at + 32])
            at += _ENTRY


def _hex(value: bytes) -> str:
    """A hash as Xet spells it: four little-endian numbers."""
    return "".join(f"{int.from_bytes(value[i : i + 8], 'little'):016x}" for i in range(0, 32, 8))
