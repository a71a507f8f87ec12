"""One reader under libFuzzer, in a process of its own: ``fuzz_targets.py TARGET FOLDER [libFuzzer's options]``.

What no input may do: raise anything but our error, with one printable paragraph; take over 100 MB; be accepted and
then mean something else to the safetensors library, or lead out of the folder. What was measured goes to
``FOLDER/measured``.
"""

from __future__ import annotations

import json
import mmap
import ntpath
import os
import posixpath
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import atheris
from hostile.small import file_bytes
from safetensors import deserialize

with atheris.instrument_imports(
    include=["omni_convert.formats.header", "omni_convert.formats.layout", "omni_convert.formats.strict_json"]
):
    from omni_convert.formats import header as header_reader
    from omni_convert.formats import layout

import fuzz_mutators as mutators
from fuzz import MEASURED, MEASURES, MEMORY_MB
from hostile.malformed import INDEX

from omni_convert.formats.errors import OmniConvertError


class Target(NamedTuple):
    check: Callable[[Path, bytes], bool]
    """Given a folder and the input: whether it was accepted. Raises where the reader is wrong."""
    mutate: Callable[[bytes, int, int], bytes]
    seeds: Callable[[], list[bytes]]


def check_header(folder: Path, data: bytes) -> bool:
    """``read_header``; what it accepts the safetensors library must read to the same end."""
    path = folder / "model.safetensors"
    path.write_bytes(data)
    try:
        header = header_reader.read_header(path)
    except OmniConvertError as error:
        return _refused(error)
    _parse_unique(data[8 : 8 + int.from_bytes(data[:8], "little")])
    found = dict(deserialize(data))
    assert found.keys() == header.tensors.keys(), "other names than in the safetensors library"
    for name, tensor in header.tensors.items():
        expected = found[name]
        assert tuple(tensor.spec) == (expected["dtype"], tuple(expected["shape"])), f"{name!r} is another tensor"
        assert data[tensor.start : tensor.start + tensor.spec.nbytes] == expected["data"], f"{name!r} lies elsewhere"
    return True


def check_index(folder: Path, data: bytes) -> bool:
    """``read_index``, ``read_json`` and ``read_shards`` on an index beside two shards."""
    (folder / INDEX).write_bytes(data)
    try:
        assert [*layout.read_json(folder / INDEX)] == [*json.loads(data.decode())], "other names than json reads"
    except OmniConvertError as error:
        _refused(error)
    try:
        weight_map, _ = layout.read_index(folder / INDEX)
    except OmniConvertError as error:
        return _refused(error)
    assert weight_map == _parse_unique(data)["weight_map"], "another weight_map than json reads"
    for name in weight_map.values():
        plain = name == posixpath.basename(name) == ntpath.basename(name)
        assert plain and name.isprintable() and name.endswith(".safetensors"), f"{name!r} leads elsewhere"
    try:
        shards = layout.read_shards(folder)
    except OmniConvertError as error:
        return _refused(error)
    held = {tensor: header.path.name for tensor, _, header in shards.tensors()}
    assert weight_map.items() <= held.items(), "a tensor is not where the index says"
    return True


TARGETS = {
    "header": Target(check_header, mutators.mutate_header, mutators.header_seeds),
    "index": Target(check_index, mutators.mutate_index, mutators.index_seeds),
}


def _parse_unique(raw: bytes) -> Any:
    """What ``json`` reads, which keeps only the last of a name that appears twice: that must not be accepted."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), "a name appears twice"
        return dict(pairs)

    return json.loads(raw, object_pairs_hook=unique)


def _refused(error: OmniConvertError) -> bool:
    message = str(error)
    assert message.isprintable() and len(message) < 1_200, f"{message[:200]!a} is no printable paragraph"
    return False


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _write_inputs(folder: Path, target: Target) -> None:
    (folder / "corpus").mkdir()
    for number, seed in enumerate(target.seeds()):
        (folder / "corpus" / str(number)).write_bytes(seed)
    tokens = {json.dumps(token)[1:-1] for token in (*mutators.TEXTS, *mutators.TOKENS, *mutators.BITS)}
    usable = [token for token in tokens if 0 < len(token) < 60 and "\\u" not in token]
    (folder / "tokens").write_text("".join(f'"{token}"\n' for token in sorted(usable)))
    for shard, tensors in mutators.SHARDS.items():
        (folder / shard).write_bytes(file_bytes(tensors, bytes(mutators.lay_out(tensors))))


def main() -> None:
    target, folder = TARGETS[sys.argv[1]], Path(sys.argv[2])
    _write_inputs(folder, target)
    (folder / MEASURED).write_bytes(bytes(MEASURES.size))
    start_mb = _peak_mb()
    runs, accepted, slowest = 0, 0, 0.0
    with (folder / MEASURED).open("r+b") as file:
        measured = mmap.mmap(file.fileno(), 0)

    def run(data: bytes) -> None:
        nonlocal runs, accepted, slowest
        started = time.perf_counter()
        taken = target.check(folder, data)
        slowest = max(slowest, time.perf_counter() - started)
        runs, accepted, peak_mb = runs + 1, accepted + taken, _peak_mb()
        MEASURES.pack_into(measured, 0, runs, accepted, slowest, start_mb, peak_mb)
        assert peak_mb - start_mb < MEMORY_MB, f"took {peak_mb - start_mb:.0f} MB"

    limits = [f"-rss_limit_mb={int(start_mb + MEMORY_MB)}", f"-dict={folder / 'tokens'}"]
    os.chdir(folder)
    atheris.Setup([sys.argv[0], *sys.argv[3:], *limits], run, custom_mutator=target.mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
