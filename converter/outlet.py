"""Where whole files go from an output folder that does not keep them: another place, such as a repository."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from omni_convert.converter.file_writer import FileRecord
from omni_convert.converter.folder import OutputFolder
from omni_convert.converter.plan import Plan

LARGE = 10 << 20
"""Bytes above which a file is large, as weights always are."""
SMALL_BYTES = 32 << 20
"""Small files leave the folder together, when they have so many bytes."""


class Outlet(Protocol):
    """Takes files as they become whole, and deletes them from the folder when they are safe there."""

    @property
    def there(self) -> Mapping[str, str]:
        """sha256 of the large files that are in that place already, by name."""

    def make_room(self) -> None:
        """Called before a file is begun: waits until few enough are under way.

        Raises:
            OmniConvertError: one cannot be sent, or the run ends.
        """

    def send(self, name: str, path: Path, record: FileRecord) -> None:
        """Take a file that is whole, for which room was made. Called by any thread; does not wait."""

    def wait(self) -> None:
        """Until every file is there.

        Raises:
            OmniConvertError: one cannot be sent.
        """

    def publish(self, folder: Path) -> None:
        """Let the world see it: all files are there, or in the folder."""

    def give_up(self) -> None:
        """Nothing more is sent, and nobody waits: the run ends early. May be called at any time."""


def outlet_bytes(plan: Plan) -> int:
    """About what a run with an outlet takes, its downloads included: of the largest file a source, an output, and one
    that is on its way; and of small files those that wait, and those that are on their way."""
    sizes = [max(shard.size, shard.source.file_size) for part in plan.components for shard in part.shards]
    sizes += [file.size for file in plan.checkpoint.others.values()]
    small = sum(file.size for name, file in plan.checkpoint.others.items() if is_small(name, file.size))
    return 3 * max(sizes, default=0) + min(small, 2 * (SMALL_BYTES + LARGE))


def is_small(name: str, size: int) -> bool:
    return size <= LARGE and not name.endswith(".safetensors")


def write_out(
    outlet: Outlet, folder: OutputFolder, execute: Callable[..., None], *arguments: Any, **options: Any
) -> None:
    """Call ``execute``, with ``outlet`` taking what earlier runs and this one make whole, until it has it."""

    def record(name: str, record: FileRecord) -> None:
        folder.record(name, record)
        outlet.send(name, folder.path / name, record)

    try:
        for name, known in folder.records.items():
            outlet.make_room()
            outlet.send(name, folder.path / name, known)
        execute(*arguments, **options, record=record, outlet=outlet)
        outlet.wait()
    except BaseException:
        outlet.give_up()
        raise
