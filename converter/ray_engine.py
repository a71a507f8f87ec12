"""Carry out a plan on a Ray cluster: every part of every file is a task, wherever a processor is free.

The process that was started holds the folder, hands out parts, and names files; it neither reads nor writes weights.
Ray begins a task anew whose worker was lost. All nodes see source and output under the same paths, which is checked.
"""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from omni_convert.converter.assemble import Assembly
from omni_convert.converter.execute import Record, Settings
from omni_convert.converter.groups import Group, Groups
from omni_convert.converter.part_work import Converted, Hashed, convert_part, hash_file, measure_part, new_attempt
from omni_convert.converter.parts import Part, part_bytes, shared_groups, split, whole_file
from omni_convert.converter.plan import Plan
from omni_convert.converter.ray_cluster import Call, check_nodes, cluster, run_calls, workers
from omni_convert.converter.shared_storage import View
from omni_convert.formats.errors import OmniConvertError


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What every task of a run needs. ``attempt``: in the partial names of files that have several parts."""

    plan: Plan
    out: Path
    settings: Settings
    view: View
    attempt: str


def execute(
    plan: Plan,
    out: Path,
    names: Sequence[str],
    settings: Settings,
    *,
    known: Mapping[Group, float],
    record: Record,
    progress: Callable[[int], None],
) -> None:
    """As ``execute.execute``; ``settings.threads`` are those of one task, for which it asks as many processors.

    Raises:
        OmniConvertError: also if the cluster cannot be reached, or a node sees other files.
    """
    files = sorted((whole_file(plan, name) for name in names), key=lambda file: -file.size)
    view = View.of(out, [file.source for file in files])
    with cluster() as ray:
        run = ray.put(_Run(plan=plan, out=out, settings=settings, view=view, attempt=new_attempt()))
        check_nodes(ray, _look, [run])
        size = part_bytes(sum(file.size for file in files), workers(ray, settings.threads))
        parts = [part for file in files for part in _parts(plan, file, size, settings)]
        try:
            shared = shared_groups(plan, parts, known.keys())
            known = {**known, **_measure(ray, run, shared, settings.threads)}
            assembly = Assembly(plan, out, parts, Groups(plan, settings.piece_bytes, known), record)
            _convert(ray, (run, ray.put(known)), parts, settings.threads, assembly, progress)
        except OmniConvertError:
            view.check_source()  # if it changed, that is why, and nothing can be kept
            raise


def _parts(plan: Plan, file: Part, size: int, settings: Settings) -> list[Part]:
    """A file that is linked is only read, from front to back."""
    return [file] if settings.link and file.name not in plan.shards else split(plan, file, size)


def _measure(ray: Any, run: Any, shared: Mapping[Part, frozenset[Group]], threads: int) -> dict[Group, float]:
    """The magnitudes of all groups that lie in several parts."""
    found: dict[Group, float] = {}

    def add(largest: Mapping[Group, float]) -> None:
        for group, value in largest.items():
            found[group] = max(found.get(group, 0.0), value)

    calls = [Call(f"measure {part.name}", _measure_task, ([run], part, groups), add) for part, groups in shared.items()]
    run_calls(ray, deque(calls), threads)
    return found


def _convert(
    ray: Any,
    refs: tuple[Any, Any],
    parts: Sequence[Part],
    threads: int,
    assembly: Assembly,
    progress: Callable[[int], None],
) -> None:
    """Convert parts, and hash the files that have several as soon as these are written.

    ``refs``: the run, and the magnitudes.
    """
    run, known = refs
    calls: deque[Call] = deque()

    def add(part: Part, done: Converted) -> None:
        progress(part.size)
        if assembly.add(part, done):
            calls.appendleft(Call(f"hash {part.name}", _hash_task, ([run], part), partial(assembly.name, part)))

    for part in parts:
        calls.append(Call(f"convert {part.name}", _convert_task, ([run], part, known), partial(add, part)))
    run_calls(ray, calls, threads)


def _look(run: list[Any]) -> None:
    """Nothing but what every worker does first."""
    _fetch(run[0])


def _measure_task(run: list[Any], part: Part, groups: frozenset[Group]) -> dict[Group, float]:
    ours = _fetch(run[0])
    return measure_part(ours.plan, part, groups, ours.settings)


def _convert_task(run: list[Any], part: Part, known: Mapping[Group, float]) -> Converted:
    ours = _fetch(run[0])
    return convert_part(ours.plan, part, ours.out, ours.settings, known=known, attempt=ours.attempt)


def _hash_task(run: list[Any], part: Part) -> Hashed:
    ours = _fetch(run[0])
    return hash_file(ours.out / part.name, part.source, ours.attempt)


@lru_cache(maxsize=1)
def _fetch(run: Any) -> _Run:
    """The run, once in every worker (in a list it arrives as a reference); a node that joins late is checked too."""
    import ray

    found: _Run = ray.get(run)
    found.view.check(f"{platform.node()} ({ray.util.get_node_ip_address()})")
    return found
