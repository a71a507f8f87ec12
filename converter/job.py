"""What makes two runs the same job: the version, the recipe, and the source as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omni_convert.converter.plan import Plan
from omni_convert.converter.source import SourceFile
from omni_convert.formats.errors import printable
from omni_convert.formats.layout import CONFIG_NAME


def job_identity(plan: Plan) -> dict[str, Any]:
    """The job as it is written into the marker; of a source file its size, time of last change and header, or what the
    Hub knows of it."""
    from omni_convert import __version__

    files: dict[str, Any] = {}
    checkpoint = plan.checkpoint
    for component in checkpoint.components:
        for shard in component.shards.headers:
            entry = {"size": shard.file_size, "mtime_ns": shard.mtime_ns, "header_sha256": shard.sha256}
            files[component.relative(shard.path.name)] = entry
        for name in (component.shards.index_name, CONFIG_NAME if component.config is not None else None):
            if name:
                files[component.relative(name)] = _stat(SourceFile.now(component.folder / name))
    files |= {name: _stat(file) for name, file in checkpoint.others.items()}
    job = {"omni_convert": __version__, "recipe": plan.recipe.to_dict()}
    if hub := checkpoint.hub:
        return {**job, "repository": hub.identity(), "source": {name: hub.facts(name) for name in files}}
    return {**job, "source": files}


def difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The first thing in which two jobs differ, for a message; "" if they are the same."""
    version = found.get("omni_convert")
    if version != expected["omni_convert"]:
        return f"it was begun by omni-convert {printable(str(version))}, this is {expected['omni_convert']}"
    for key, title in (("recipe", "the recipe"), ("repository", "the repository"), ("source", "the source")):
        before, now = found.get(key), expected.get(key)
        if before != now:
            before, now = (item if isinstance(item, dict) else {} for item in (before, now))
            names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
            return f"{title} differs: {printable(_change(names[0], before.get(names[0]), now.get(names[0])), 300)}"
    return ""


def _change(name: str, before: object, now: object) -> str:
    if isinstance(before, dict) and isinstance(now, dict) and (before.keys() & now.keys()):
        key = next(key for key in {**now, **before} if before.get(key) != now.get(key))
        return _change(f"{name}: {key}" if name else str(key), before.get(key), now.get(key))
    return f"{name} was {before!r}, now is {now!r}"


def _stat(file: SourceFile) -> dict[str, int]:
    return {"size": file.size, "mtime_ns": file.mtime_ns}
