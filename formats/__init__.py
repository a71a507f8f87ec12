"""What a quantized weight is: one file per format, the config that announces it, the kernels that make it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from omni_convert.formats.base import Format
from omni_convert.formats.errors import UsageError
from omni_convert.formats.fp8 import Fp8
from omni_convert.formats.int8 import Int8
from omni_convert.formats.mxfp4 import MXFP4
from omni_convert.formats.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.mxfp8 import MXFP8

FORMATS: Mapping[str, Format] = {fmt.name: fmt for fmt in (Int8(), Fp8(), MXFP8, MXFP4, Mxfp4DualScale())}
"""Every format, with the default of every option, by name."""


def make_format(
    method: str,
    *,
    granularity: str | None = None,
    block_size: tuple[int, int] | None = None,
    activation_scheme: str | None = None,
    scale_rule: str | None = None,
    quality: str | None = None,
    fused_scale: str | None = None,
) -> Format:
    """The format ``method`` with some options chosen; None: as ``FORMATS`` has it.

    Args:
        granularity: what shares a scale: ``tensor``, ``channel`` (row) or ``block``.
        block_size: rows and columns of a block; chooses granularity ``block``.
        activation_scheme: ``dynamic`` (measured while running) or ``static`` (one recorded scale per layer).
        scale_rule: how MX formats choose the exponent of a block: ``floor``, ``even`` or ``rceil``.
        quality: ``fast`` (scales from the largest magnitude) or ``balanced`` (scales searched for least error).
        fused_scale: of layers that an engine fuses (int8): ``shared`` or ``per-channel``.

    Raises:
        UsageError: an unknown method, or a choice that the format does not have.
    """
    if method not in FORMATS:
        raise UsageError(f"the method is {method!r}, expected one of {', '.join(FORMATS)}.")
    fmt = FORMATS[method]
    if block_size is not None:
        _check_choice(fmt, "block_size", block_size)
    if block_size is not None and granularity is None:
        granularity = "block"
    given: dict[str, Any] = {
        "granularity": granularity,
        "block_size": block_size,
        "activation_scheme": activation_scheme,
        "scale_rule": scale_rule,
        "quality": quality,
        "fused_scale": fused_scale,
    }
    given = {option: value for option, value in given.items() if value is not None}
    for option, value in given.items():
        _check_choice(fmt, option, value)
    fields = {field.name for field in dataclasses.fields(fmt)}  # type: ignore[arg-type]
    chosen: Format = dataclasses.replace(fmt, **{key: value for key, value in given.items() if key in fields})  # type: ignore[type-var]
    return chosen


def format_options(fmt: Format) -> dict[str, Any]:
    """What ``make_format`` made ``fmt`` from, as JSON holds it: its name is the method."""
    values = {option: getattr(fmt, option, None) for option in fmt.options}
    return {option: list(value) if option == "block_size" else value for option, value in values.items() if value}


def format_label(fmt: Format) -> str:
    """``fmt`` in a few words: its name, and the options that are not the default."""
    default = format_options(FORMATS[fmt.name])
    chosen = {option: value for option, value in format_options(fmt).items() if value != default.get(option)}
    if "block_size" in chosen:
        chosen["block_size"] = "x".join(map(str, chosen["block_size"]))
    words = [f"{_WORDS[option]} {value}" if option in _WORDS else str(value) for option, value in chosen.items()]
    words += ["one scale"] if fmt.is_fused else []
    return f"{fmt.name} ({' '.join(words)})" if words else fmt.name


_WORDS = {"scale_rule": "rule", "fused_scale": "fused"}


def _check_choice(fmt: Format, option: str, value: object) -> None:
    flag = f"--{option.replace('_', '-')}"
    if option not in fmt.options:
        known = ", ".join(f"--{name.replace('_', '-')}" for name in fmt.options)
        raise UsageError(f"{flag}: {fmt.name} has no such choice. It has {known}.")
    choices = fmt.options[option]
    if choices and value not in choices:
        raise UsageError(f"{flag} is {value!r}, {fmt.name} knows only {', '.join(choices)}.")
