"""What every command shares: results on stdout, as a table or as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from omni_convert.formats.errors import OmniConvertError, UsageError
from omni_convert.formats.layout import MANIFEST_NAME

WRITTEN = "omni_convert.written"
"""In the meta of click's context: whether a result that the user asked for is there."""
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def note_local(source: Path) -> None:
    """Say that a folder or file here was meant, where a repository on the Hub could have been."""
    from omni_convert.converter.hub_repo import parse_repo

    ours = (source / MANIFEST_NAME).exists()  # nobody takes that for a repository
    if parse_repo(str(source)) and source.exists() and not ours:
        click.echo(f"Note: {source} is what lies here, not the repository of that name on the Hub.", err=True)


def check_place(path: Path, option: str, *, outside: Iterable[Path] = (), is_folder: bool = False) -> None:
    """Whether a command may write its result there; asked before it works for hours.

    ``outside``: files, and folders with all they hold, that it must leave as they are: what it reads, and OUT.

    Raises:
        UsageError: ``path`` is in one of these, has no folder to be in, or is a folder (a file, if it ``is_folder``).
    """
    for other in outside:
        if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(other)):
            raise UsageError(f"{option} {path}: lies in {other}, which must stay as it is. Choose another place.")
    wrong = path.exists() and path.is_dir() != is_folder
    if wrong or not path.absolute().parent.is_dir():
        found = "is a folder" if path.is_dir() else "is a file" if wrong else f"found no folder {path.parent}"
        example = "a folder to write into, such as pictures" if is_folder else "a file to write, such as report.html"
        raise UsageError(f"{option} {path}: {found}, expected the name of {example}.")


def write_text(path: Path, text: str) -> None:
    """Write a result that the user asked for, and say so.

    Raises:
        OmniConvertError: the operating system refuses.
    """
    with writing(path):
        path.write_text(text, encoding="utf-8")
    note_written(path)


def note_written(path: Path) -> None:
    """Say that a result is there, also to an interruption that comes later."""
    click.echo(f"Wrote {path}", err=True)
    click.get_current_context().meta[WRITTEN] = True


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """For what writes ``path``, a file or into a folder.

    Raises:
        OmniConvertError: the operating system refuses.
    """
    try:
        yield
    except OSError as error:
        raise OmniConvertError(
            f"{error.filename or path}: cannot be written ({error.strerror or error}). Check its rights and the disk."
        ) from error


def print_result(result: str | dict[str, Any]) -> None:
    """Raises:
    OmniConvertError: stdout is full; a pipe that is closed is click's business.
    """
    try:
        click.echo(result if isinstance(result, str) else json.dumps(result, indent=2, allow_nan=False))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OmniConvertError(
            f"stdout cannot be written ({error.strerror or error}), expected a place with room."
        ) from error
