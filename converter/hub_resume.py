"""A large file by plain HTTP, into a part of it with which the next run goes on, whatever ended this one.

The client of the Hub begins anew in every process, except for what Xet has in its own cache.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import BinaryIO

from omni_convert.converter.hub_errors import GivenUpError, may_pass
from omni_convert.converter.hub_repo import Listing

_PAUSE = 1.0
"""Seconds until an answer that was cut off is asked to go on."""


def comes_by_http(listing: Listing, name: str) -> bool:
    """Whether it is a large file that Xet does not deliver here."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    if listing.files[name].sha256 is None:
        return False
    if constants.HF_HUB_DISABLE_XET or find_spec("hf_xet") is None:
        return True
    url = hf_hub_url(listing.repo.id, name, revision=listing.commit)
    return get_hf_file_metadata(url, library_name="omni-convert").xet_file_data is None


def go_on(listing: Listing, name: str, part: Path, whole: Path, progress: Callable[[int], None], stop: Event) -> bool:
    """Fetch what ``part`` lacks of a file, which is then ``whole``; False if another process does that now.

    ``progress``: receives the bytes that come, and those that are thrown away as a negative number.

    Raises:
        GivenUpError: the run stops. What came is kept, as after any other error.
    """
    size = listing.files[name].size
    for path in (part, whole):
        path.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # or a file system without locks
            return False
        if not part.exists() or not os.path.samestat(part.stat(), os.fstat(file.fileno())):
            return False  # it became whole meanwhile
        if file.tell() > size:
            file.truncate(0)
        while (before := file.seek(0, os.SEEK_END)) < size:
            try:
                _append(listing, name, file, progress, stop)
            except Exception as error:
                if not may_pass(error) or file.tell() <= before:
                    raise
                stop.wait(_PAUSE)
        part.replace(whole)
    return True


def _append(listing: Listing, name: str, file: BinaryIO, progress: Callable[[int], None], stop: Event) -> None:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    wanted = {"Range": f"bytes={file.tell()}-", "Accept-Encoding": "identity"}
    headers = build_hf_headers(library_name="omni-convert", headers=wanted)
    url, timeout = hf_hub_url(listing.repo.id, name, revision=listing.commit), constants.HF_HUB_DOWNLOAD_TIMEOUT
    with http_stream_backoff(
        "GET", url, headers=headers, max_retries=0, follow_redirects=True, timeout=timeout
    ) as response:
        hf_raise_for_status(response)
        if response.status_code == 200 and file.tell():  # it sends the file from its beginning
            progress(-file.tell())
            file.truncate(0)
        for block in response.iter_bytes():
            if stop.is_set():
                raise GivenUpError("Stopped.")
            file.write(block)
            progress(len(block))
    if file.tell() < listing.files[name].size:
        raise ConnectionError("the answer ended early")
