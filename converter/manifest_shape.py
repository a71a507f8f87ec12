"""What a manifest must hold: names and kinds of everything that is read from it, checked once, before it is used.

People edit manifests, downloads damage them, and those of a repository may come from anybody.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_convert.converter.recipe import Recipe
from omni_convert.formats.errors import OmniConvertError, printable
from omni_convert.formats.layout import read_json

_MOST_BYTES = 1 << 63
_MOST_DB = 10_000


def load_manifest(path: Path) -> dict[str, Any]:
    """The manifest in a file.

    Raises:
        OmniConvertError: unreadable, or not what this version writes; names the key, what it holds, what is expected.
    """
    manifest = read_json(path)
    problem = next(_problems(manifest, _MANIFEST, ""), None) or _recipe_problem(manifest)
    if problem:
        raise OmniConvertError(
            f"{path}: {problem}. It was edited, damaged, or another version wrote it. Convert again."
        )
    return manifest


@dataclass(frozen=True, kw_only=True)
class _Value:
    """A value that is no object. ``title``: of what it should be."""

    title: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True, kw_only=True)
class _Each:
    """An object of any names, with such values. ``title``: of the names, and what is expected of them."""

    shape: _Shape
    title: str = "a name"
    fits: Callable[[str], bool] = lambda name: True
    may_be_empty: bool = True


@dataclass(frozen=True, kw_only=True)
class _Object:
    """An object of these names; those of ``optional`` may be absent. Others are no harm."""

    required: Mapping[str, _Shape]
    optional: Mapping[str, _Shape]


_Shape = _Value | _Each | _Object


def _problems(value: object, shape: _Shape, where: str) -> Iterator[str]:
    if isinstance(shape, _Value):
        if not shape.fits(value):
            yield f"{where} is {printable(repr(value))}, expected {shape.title}"
    elif not isinstance(value, dict) or (isinstance(shape, _Each) and not (value or shape.may_be_empty)):
        yield f"{where} is {printable(repr(value))}, expected an object{' that is not empty' * (value == {})}"
    elif isinstance(shape, _Each):
        for name, item in value.items():
            if not shape.fits(name):
                yield f"{where} has the name {printable(repr(name))}, expected {shape.title}"
            yield from _problems(item, shape.shape, _below(where, name))
    else:
        yield from (f"found no {_below(where, name)}" for name in shape.required if name not in value)
        for name, inner in (*shape.required.items(), *shape.optional.items()):
            if name in value:
                yield from _problems(value[name], inner, _below(where, name))


def _below(where: str, name: str) -> str:
    """The address of a member, names of files and tensors in brackets."""
    plain = name.isidentifier()
    return f"{where}{'.' * bool(where)}{name}" if plain else f"{where}[{printable(repr(name))}]"


def _recipe_problem(manifest: Mapping[str, Any]) -> str | None:
    try:
        recipe = Recipe.from_dict(manifest["recipe"])
    except (OmniConvertError, KeyError, TypeError, ValueError, AttributeError) as error:
        said = str(error).rstrip(".") if isinstance(error, OmniConvertError) else printable(repr(error))
        return f"recipe cannot be read: {said}"
    unknown = [name for name in manifest["components"] if not recipe.formats_of(name)]
    return f"components has {printable(repr(unknown[0]))}, which recipe does not quantize" if unknown else None


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST_BYTES


def _is_db(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_MOST_DB < value < _MOST_DB


def _is_inside(name: str) -> bool:
    return all(part not in ("", ".", "..") for part in name.split("/")) and "\0" not in name


def _matching(pattern: str) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


_TEXT = _Value(title="text", fits=lambda value: isinstance(value, str))
_COUNT = _Value(title="a whole number", fits=_is_count)
_SHA256 = _Value(title="64 hexadecimal digits", fits=_matching("[0-9a-f]{64}"))
_DB = _Value(title="a number of dB", fits=_is_db)
_FILE: Mapping[str, _Shape] = {"size": _COUNT}
_PATH = "a path in the folder"

_SOURCE = _Object(
    required={
        "name": _TEXT,
        "kind": _Value(title="pipeline, model or file", fits=lambda value: value in ("pipeline", "model", "file")),
        "files": _Each(
            shape=_Object(required=_FILE, optional={"header_sha256": _SHA256}), title=_PATH, fits=_is_inside
        ),
    },
    optional={
        "repo": _Value(title="a repository's name", fits=_matching(r"[\w.-]+(/[\w.-]+)?")),
        "revision": _Value(title="a commit", fits=_matching(r"[0-9a-f]+")),
    },
)
_TENSOR = _Object(
    required={"action": _TEXT, "why": _TEXT},
    optional={
        "format": _TEXT,
        "sqnr_db": _Value(title="a number of dB or null", fits=lambda value: value is None or _is_db(value)),
        "shared_scale_db": _DB,
    },
)
_COMPONENT = _Object(
    required={
        "class": _TEXT,
        "weights": _Value(title="a positive whole number", fits=lambda value: _is_count(value) and value > 0),
        "bytes_before": _COUNT,
        "bytes_after": _COUNT,
        "tensors": _Each(shape=_TENSOR, may_be_empty=False),
    },
    optional={},
)
_MANIFEST = _Object(
    required={
        "omni_convert": _TEXT,
        "recipe": _Each(shape=_Value(title="anything", fits=lambda value: True), may_be_empty=False),  # it has a reader
        "files": _Each(shape=_Object(required={**_FILE, "sha256": _SHA256}, optional={}), title=_PATH, fits=_is_inside),
        "source": _SOURCE,
        "components": _Each(
            shape=_COMPONENT,
            title="the name of a folder, or nothing",
            fits=lambda name: not name or (_is_inside(name) and "/" not in name),
            may_be_empty=False,
        ),
        "cautions": _Value(
            title="a list of texts",
            fits=lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
        ),
    },
    optional={},
)
