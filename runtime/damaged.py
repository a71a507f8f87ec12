"""Libraries read some files of a model before they ask its quantizer, and say little about a damaged one."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType
from typing import Any

from omni_convert.formats.config import is_ours, stored_config
from omni_convert.formats.header import read_header
from omni_convert.formats.layout import CONFIG_NAME, INDEX_NAMES, read_index, read_json


def explain(library: ModuleType, function: str, place: int) -> None:
    """Have ``library.function`` say what is wrong with the file that it reads, its argument at ``place``.

    Where it fails, and the file is of a model that we converted, our own reader's error comes first.
    """
    theirs = getattr(library, function)

    @functools.wraps(theirs)
    def read(*args: Any, **kwargs: Any) -> Any:
        try:
            return theirs(*args, **kwargs)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            _check(Path(args[place]))
            raise

    setattr(library, function, read)


def _check(file: Path) -> None:
    config = file.parent / CONFIG_NAME
    announced = stored_config(read_json(config)) if config.is_file() else None
    if not isinstance(announced, dict) or not is_ours(announced):
        return
    if file.name in INDEX_NAMES:
        read_index(file)
    elif file.suffix == ".safetensors":
        read_header(file)
