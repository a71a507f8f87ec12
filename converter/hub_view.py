"""A folder that stands for a repository: what a plan reads is in it, the rest are sparse files of the true size.

A stand-in of weights holds their header, which a range request fetched. Stand-ins never go where a library would look.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from omni_convert.converter.hub_downloads import Downloads
from omni_convert.converter.hub_errors import explained, retrying
from omni_convert.converter.hub_needed import check_size, is_planned_from, left_out
from omni_convert.converter.hub_repo import Listing
from omni_convert.formats.header import MAX_HEADER_BYTES

_FIRST_REQUEST = 1 << 16
"""Most headers are shorter."""
_THREADS = 8
_CHANGED = (0, 0)
"""Time of last change of every file, so that nothing depends on when the folder was made."""


def make_view(listing: Listing, downloads: Downloads, folder: Path) -> dict[str, str]:
    """Fill ``folder``; returns the files that are left out, and why.

    Raises:
        OmniConvertError: a file cannot be fetched, or is not what a plan can be made from.
    """
    planned = [name for name in listing.files if is_planned_from(name)]
    for name in planned:
        check_size(name, listing.files[name].size)
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, path in zip(planned, pool.map(downloads.fetch, planned), strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        omitted = left_out(listing.files, folder)
        for name in omitted.keys() & set(planned):
            (folder / name).unlink()
        others = [name for name in listing.files if name not in omitted and name not in planned]
        weights = [name for name in others if name.endswith(".safetensors")]
        heads = dict(zip(weights, pool.map(lambda name: _head(listing, downloads, name), weights), strict=True))
    for name in others:
        _stand_in(folder / name, listing.files[name].size, heads.get(name, b""))
    _age(folder, listing.files)
    return omitted


def _stand_in(path: Path, size: int, head: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)


def _age(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if (folder / name).exists():
            os.utime(folder / name, _CHANGED)


def _head(listing: Listing, downloads: Downloads, name: str) -> bytes:
    """Length field and header of weights; less if the length cannot be, which whoever reads it says."""
    if cached := downloads.cached(name):
        with cached.open("rb") as file:
            prefix = file.read(8)
            return prefix + file.read(_json_length(prefix, listing.files[name].size))
    head = _range(listing, name, 0, min(_FIRST_REQUEST, listing.files[name].size))
    length = 8 + _json_length(head[:8], listing.files[name].size)
    if length > len(head):
        head += _range(listing, name, len(head), length)
    return head[:length]


def _json_length(prefix: bytes, size: int) -> int:
    length = int.from_bytes(prefix, "little")
    return length if len(prefix) == 8 and length <= min(MAX_HEADER_BYTES, size - 8) else 0


def _range(listing: Listing, name: str, start: int, stop: int) -> bytes:
    """Bytes of a file; never more, whatever is sent."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    if stop <= start:
        return b""
    url = hf_hub_url(listing.repo.id, name, revision=listing.commit)
    wanted = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    headers = build_hf_headers(library_name="omni-convert", headers=wanted)

    def fetch() -> bytes:
        found = b""
        with http_stream_backoff("GET", url, headers=headers, max_retries=0, follow_redirects=True) as response:
            hf_raise_for_status(response)
            skip = start if response.status_code == 200 else 0  # it sends the file from its beginning
            for block in response.iter_bytes():
                found += block
                if len(found) >= skip + stop - start:
                    break
        found = found[skip : skip + stop - start]
        if len(found) < stop - start:
            raise ConnectionError("the answer ended early")
        return found

    with explained(listing.repo, name):
        return retrying(fetch)
