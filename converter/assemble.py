"""Put files together from what workers say of their parts, in whichever order they end."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from omni_convert.converter.execute import Record, output_size
from omni_convert.converter.file_writer import FileRecord
from omni_convert.converter.groups import Groups
from omni_convert.converter.layer_error import LayerErrors
from omni_convert.converter.output import partial_path
from omni_convert.converter.part_work import Converted, Hashed
from omni_convert.converter.parts import Part
from omni_convert.converter.plan import Plan


class Assembly:
    """The files of a run. Only its process, which holds the folder, gives them their names."""

    def __init__(self, plan: Plan, out: Path, parts: Sequence[Part], groups: Groups, record: Record) -> None:
        """``groups``: with the magnitudes of all that lie in several files."""
        self._plan = plan
        self._out = out
        self._groups = groups
        self._record = record
        self._left = Counter(part.name for part in parts)
        self._errors: defaultdict[str, LayerErrors] = defaultdict(LayerErrors)

    def add(self, part: Part, done: Converted) -> bool:
        """A part is written. Returns whether its file waits for nothing but its hash."""
        errors = self._errors[part.name]
        errors.finished.update(done.errors)
        for rows in done.rows:
            errors.add(rows)
        self._left[part.name] -= 1
        if done.file:
            self.name(part, done.file)
        return not done.file and not self._left[part.name]

    def name(self, part: Part, file: Hashed) -> None:
        """Give the file of a part its name: it is whole."""
        path = self._out / part.name
        partial_path(path, file.attempt).replace(path)
        size, errors = output_size(self._plan, part), self._errors.pop(part.name).finished
        self._record(
            part.name, FileRecord(sha256=file.sha256, size=size, errors=errors, largest=self._shared(part.name))
        )

    def _shared(self, name: str) -> dict[str, float]:
        if name not in self._plan.shards:
            return {}
        component, shard = self._plan.shards[name]
        return self._groups.shared(component, shard.tensors)
