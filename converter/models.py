"""What each target is known to load: architectures by kinds of formats, as a table and as data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from omni_convert.formats.architectures import Architecture
from omni_convert.formats.target import TARGETS, Rule, Target, kind_flags
from omni_convert.formats.text import format_table

LOADED = "loaded"
REFUSED = "refused"
_LEGEND = """\
yes: a small checkpoint was loaded by the engine's own classes and loader on CPU, without its kernels; nothing was run
on the hardware that is named. Any other class: not verified."""


def models_dict() -> dict[str, Any]:
    """Every target with its formats and architectures, and for each method the hardware or the reason against it."""
    return {
        target.name: {
            "title": target.title,
            "formats": {kind: list(hardware) for kind, hardware in target.formats.items()},
            "architectures": [_architecture_dict(target, table) for table in _tables(target)],
        }
        for target in TARGETS.values()
    }


def models_text() -> str:
    """The same facts for people; of a target that runs any linear, one line."""
    return "\n\n".join([*map(_target_text, TARGETS.values()), _LEGEND])


def _tables(target: Target) -> Sequence[Architecture]:
    return target.architectures or ()


def _architecture_dict(target: Target, table: Architecture) -> dict[str, Any]:
    refusals = {kind: target.refusal(table.name, kind) for kind in target.formats}
    return {
        "name": table.name,
        "classes": list(table.classes),
        "pipelines": list(table.pipelines),
        "methods": {
            kind: {
                "flags": kind_flags(kind),
                "status": REFUSED if refusals[kind] else LOADED,
                "hardware": [] if refusals[kind] else list(hardware),
                "refused": refusals[kind],
                "kept_by_default": [rule.layers for rule in _rules(target.kept, table, kind)],
                "cautions": [rule.reason for rule in _rules(target.cautions, table, kind)],
            }
            for kind, hardware in target.formats.items()
        },
    }


def _rules(rules: Iterable[Rule], table: Architecture, kind: str) -> list[Rule]:
    return [rule for rule in rules if rule.holds(table.name, kind)]


def _target_text(target: Target) -> str:
    formats = [f"{kind} on {' and '.join(hardware)}" for kind, hardware in target.formats.items()]
    title = f"--target {target.name} ({target.title}): {', '.join(formats)}"
    if target.architectures is None:
        return f"{title}; any linear of any class."
    rows = [["model", *target.formats]]
    notes: dict[str, int] = {}
    for table in target.architectures:
        cells = [_cell(target, table, kind, notes) for kind in target.formats]
        rows.append([table.name, *cells])
    lines = [title, format_table(rows), *(f"{number}: {note}" for note, number in notes.items())]
    return "\n".join(lines)


def _cell(target: Target, table: Architecture, kind: str, notes: dict[str, int]) -> str:
    """``yes`` or ``no``, and the numbers of what must be said about it."""
    refusal = target.refusal(table.name, kind)
    if refusal:
        said = [refusal]
    else:
        said = [f"kept by default: {rule.layers} ({rule.reason})" for rule in _rules(target.kept, table, kind)]
        said += [rule.reason for rule in _rules(target.cautions, table, kind)]
    numbers = [str(notes.setdefault(note, len(notes) + 1)) for note in said]
    return " ".join(["no" if refusal else "yes", *numbers])
