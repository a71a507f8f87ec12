"""Seeds and mutations that know the grammar of safetensors headers and of indexes, so that they get past the parser."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from typing import Any

import atheris
from hostile import malformed
from hostile.small import entry, file_bytes

BITS = {"F4": 4, "F6_E2M3": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E8M0": 8, "BF16": 16, "F16": 16}
BITS |= {"F32": 32, "I32": 32, "U64": 64, "F64": 64, "C64": 64}
MAX_DATA = 2048
_NUMBER = re.compile(rb"-?\d+")
SPELLINGS = ("-0", "00", "0.0", "0e0", "+0", "1e999999", "-1e999999", "1e-999999", "NaN", "Infinity", "9" * 4301, '"0"')
TENSORS = {"a.weight": entry("BF16", [2, 3], 0, 12), "b": entry("U8", [4], 12, 16)}
SHARDS = {malformed.SHARD: TENSORS, malformed.SHARD.replace("00001", "00002"): {"c": entry("F4", [2, 5], 0, 5)}}
WEIGHT_MAP = {tensor: shard for shard, tensors in SHARDS.items() for tensor in tensors}

NUMBERS = (0, 1, -1, 2, 4, 7, 8, 64, 255, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63))
ODD: tuple[Any, ...] = (*NUMBERS, 1.0, -0.0, 1e308, float("nan"), float("inf"), None, True, False, "", [], {}, [[]])
TEXTS = ("a", "dtype", "shape", "data_offsets", "__metadata__", "weight_map", "metadata", "\ud800", "\0", "\u202e", "é")
NAMES = [name for name in (*malformed.TENSOR_NAMES.values(), *malformed.FILE_NAMES.values()) if len(str(name)) < 400]
TOKENS = ("1e999999", "NaN", "-Infinity", "9" * 4301, "\\ud800", "\\u0000", "\\/", '"a":', "{", "}", "[", "]", ",", " ")
TOKENS += ("[" * 1100, '{"a":' * 400, "[0,0]", "-0", "1E0", "0x1", "//", "\ufeff", '"__metadata__":{},', '"a":{},')


def header_seeds() -> list[bytes]:
    """A valid file, and every malformed one that the tests have."""
    data = malformed.DATA
    seeds = [file_bytes({"__metadata__": {"format": "pt"}} | TENSORS, bytes(16)), file_bytes({}), file_bytes(b"{}  ")]
    seeds += [*malformed.LENGTHS.values()]
    seeds += [file_bytes(text, data) for text in malformed.TEXTS.values()]
    seeds += [file_bytes({"a": tensor}, data) for tensor in malformed.ENTRIES.values()]
    seeds += [file_bytes({"one": one, "two": two}, data) for one, two in malformed.PAIRS.values()]
    seeds += [file_bytes({"__metadata__": found, "a": malformed.GOOD}, data) for found in malformed.METADATA.values()]
    return seeds + [file_bytes({name: malformed.GOOD}, data) for name in malformed.TENSOR_NAMES.values()]


def index_seeds() -> list[bytes]:
    """A valid index, and every malformed one that the tests have."""
    whole = {"metadata": {"total_size": 16}, "weight_map": WEIGHT_MAP}
    seeds = [whole, *({"weight_map": WEIGHT_MAP | {"b": name}} for name in NAMES)]
    broken = [*malformed.BROKEN_JSON.values(), *malformed.INDEXES.values()]
    return [json.dumps(seed).encode() for seed in seeds] + broken


def mutate_header(data: bytes, max_size: int, seed: int) -> bytes:
    """Another file: its JSON changed as JSON, as text or as bytes, its length field and data usually made to fit."""
    rng = random.Random(seed)
    if len(data) < 10 or rng.random() < 0.05:
        return bytes(atheris.Mutate(data, max_size))
    end = 8 + int.from_bytes(data[:8], "little")
    raw, rest = data[8:end], data[end:]
    document = _valid_header(rng) if rng.random() < 0.2 else _parsed(raw) if rng.random() < 0.6 else None
    if document is None:
        return file_bytes(_mutate_text(rng, raw, max_size), rest)[:max_size]
    if rng.random() < 0.8:
        document = _mutate_json(rng, document)
    if rng.random() < 0.7:
        rest = bytes(lay_out(document))
        _shift(rng, document)
    return file_bytes(_dumps(rng, document), rest)[:max_size]


def mutate_index(data: bytes, max_size: int, seed: int) -> bytes:
    """Another index, changed as JSON, as text or as bytes."""
    rng = random.Random(seed)
    document = _valid_index(rng) if rng.random() < 0.2 else _parsed(data) if rng.random() < 0.6 else None
    if document is None:
        return _mutate_text(rng, data, max_size)
    if rng.random() < 0.8:
        document = _mutate_json(rng, document)
    return _dumps(rng, document)[:max_size]


def _valid_header(rng: random.Random) -> dict[str, Any]:
    """Of some small tensors, any of which may have no element or no dimension."""
    names = [str(rng.choice([*NAMES, *TEXTS])) for _ in range(rng.randrange(6))]
    tensors = {name: _tensor(rng) for name in names if name != "__metadata__"}
    if rng.random() < 0.5:
        tensors["__metadata__"] = {str(rng.choice(TEXTS)): str(rng.choice(ODD)) for _ in range(3)}
    return tensors


def _valid_index(rng: random.Random) -> dict[str, Any]:
    weight_map = {name: shard for name, shard in WEIGHT_MAP.items() if rng.random() < 0.8}
    return {"weight_map": weight_map, "metadata": {rng.choice(TEXTS): rng.choice(ODD) for _ in range(3)}}


def _tensor(rng: random.Random) -> dict[str, Any]:
    return entry(rng.choice([*BITS]), [rng.randrange(5) for _ in range(rng.randrange(4))], 0, 0)


def _parsed(raw: bytes) -> Any:
    if raw.count(b"[") + raw.count(b"{") > 200:  # nesting that deep is a matter of text
        return None
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _dumps(rng: random.Random, document: Any) -> bytes:
    separators = rng.choice([(",", ":"), (", ", ": "), (" ,\n", "\t: ")])
    text = json.dumps(document, ensure_ascii=rng.random() < 0.7, separators=separators)
    if rng.random() < 0.03 and len(text) > 2 and text[0] == "{":
        text = f"{text[:-1]},{text[1:]}"  # every name twice
    return text.encode(errors="surrogatepass") + b" " * rng.choice([0, 0, 1, 7])


def _mutate_text(rng: random.Random, raw: bytes, max_size: int) -> bytes:
    place, other = sorted(rng.randint(0, len(raw)) for _ in range(2))
    kind = rng.randrange(5)
    numbers = [*_NUMBER.finditer(raw)]
    if kind == 4 and numbers:  # a number written in another way
        number = rng.choice(numbers)
        raw = raw[: number.start()] + rng.choice(SPELLINGS).encode() + raw[number.end() :]
    elif kind == 0:  # a token more
        raw = raw[:place] + rng.choice(TOKENS).encode() + raw[place:]
    elif kind == 1:  # a piece twice: a name, a member, a bracket
        raw = raw[:other] + raw[place : min(other, place + 200)] + raw[other:]
    else:
        raw = bytes(atheris.Mutate(raw or b"{}", max_size))
    return raw[:max_size]


def _mutate_json(rng: random.Random, document: Any) -> Any:
    """One to three places changed."""
    odd = [*ODD, *NAMES, *TEXTS, *BITS]
    texts = [name for name in odd if isinstance(name, str)]
    for _ in range(rng.randint(1, 3)):
        home = document
        while isinstance(home, (dict, list)) and home:
            key = rng.choice([*home]) if isinstance(home, dict) else rng.randrange(len(home))
            if not home[key] or not isinstance(home[key], (dict, list)) or rng.random() < 0.4:
                _change(rng, home, key, odd, texts)
                break
            home = home[key]
        if not home:
            document = {rng.choice(texts): rng.choice(odd)}
    return document


def _change(rng: random.Random, home: Any, key: Any, odd: list[Any], texts: list[str]) -> None:
    """One member or element changed, renamed, doubled, moved or removed."""
    value, other = copy.deepcopy(home[key]), copy.deepcopy(rng.choice(odd))
    changes: list[Callable[[], Any]] = [
        lambda: home.__setitem__(key, other),
        lambda: home.__setitem__(key, value + rng.choice([-1, 1, 2**32]) if type(value) is int else [value]),
        lambda: home.pop(key),
    ]
    if isinstance(home, dict):
        changes += [lambda: home.__setitem__(rng.choice([*home]), value)]
        changes += [lambda: home.update({rng.choice(texts): home.pop(key)})]
        changes += [lambda: home.update({str(value)[:9]: _tensor(rng)})]
    else:
        changes += [lambda: home.append(value), lambda: home.insert(0, rng.choice(NUMBERS))]
    rng.choice(changes)()


def _shift(rng: random.Random, document: Any) -> None:
    """Rarely one tensor lies a little elsewhere: a gap, an overlap, or out of the data."""
    tensor = rng.choice([*document.values()]) if isinstance(document, dict) and document else None
    if isinstance(tensor, dict) and "data_offsets" in tensor and rng.random() < 0.1:
        place, size = rng.randrange(8), rng.randrange(4)
        tensor["data_offsets"] = [place, place + size]
        tensor.update(dtype="U8", shape=[size])


def lay_out(document: Any) -> int:
    """Offsets that fit dtypes and shapes, as far as these make sense; the size of the data."""
    end = 0
    for tensor in document.values() if isinstance(document, dict) else ():
        if not isinstance(tensor, dict) or not isinstance(tensor.get("shape"), list):
            continue
        size = BITS.get(str(tensor.get("dtype")), 8)
        for length in tensor["shape"]:
            size *= length if type(length) is int and 0 <= length < MAX_DATA else 1
        if end + size // 8 <= MAX_DATA:
            tensor["data_offsets"] = [end, end + size // 8]
            end += size // 8
    return end
