"""sha256 of files, several at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

PIECE_BYTES = 4 << 20


def file_sha256(path: Path, progress: Callable[[int], object] = lambda count: None) -> str:
    """sha256 of a file, read in pieces; ``progress`` receives their sizes."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            progress(count)
    return digest.hexdigest()


def file_problems(
    root: Path, expected: Mapping[str, tuple[int, str]], threads: int, progress: Callable[[int], object]
) -> dict[str, str]:
    """Which files below ``root`` are not what they should be, and why.

    Args:
        expected: relative path -> size and sha256.
        progress: receives bytes as they are read; called by one thread at a time.
    """
    lock, stop = Lock(), Event()

    def advance(count: int) -> None:
        with lock:
            progress(count)
        if stop.is_set():
            raise CancelledError

    def problem(name: str) -> str | None:
        path, (size, sha256) = root / name, expected[name]
        if not path.is_file():
            return "is missing."
        found = path.stat().st_size
        if found != size:
            return f"has {found} bytes, expected {size}."
        return None if file_sha256(path, advance) == sha256 else "its sha256 differs: the content changed."

    with ThreadPoolExecutor(threads) as pool:
        try:
            found = dict(zip(expected, pool.map(problem, expected), strict=True))
        except BaseException:  # an interrupt need not wait for the end of a large file
            stop.set()
            raise
    return {name: text for name, text in found.items() if text}
