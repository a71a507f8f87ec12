"""Hooks our formats into Diffusers, Transformers and PEFT when, and only if, those are imported.

Importing either takes seconds and the command line needs neither, so the plugins wait: an import finder imports a
plugin, which registers itself, right after the library's own module. (A package for this exists, wrapt; importing it
takes longer than all the rest of ours.)
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_PLUGINS = {
    "diffusers.quantizers.auto": "omni_convert.runtime.diffusers_plugin",
    "diffusers.models.modeling_utils": "omni_convert.runtime.diffusers_files",
    "transformers.quantizers.auto": "omni_convert.runtime.transformers_plugin",
    "transformers.modeling_utils": "omni_convert.runtime.transformers_files",
    "peft.tuners.tuners_utils": "omni_convert.runtime.peft_plugin",
}


def register_plugins() -> None:
    """Register with what is imported already, and with the rest when it is. Calling it again changes nothing."""
    for name in _PLUGINS:
        if name in sys.modules:
            importlib.import_module(_PLUGINS[name])
    if not any(isinstance(finder, _PluginFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PluginFinder())


class _PluginFinder(MetaPathFinder):
    """Finds those modules as the other finders do, and imports the plugin once the module is there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _PLUGINS:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _then_register(spec.loader.exec_module)  # type: ignore[assignment, method-assign]
        return spec


def _then_register(exec_module: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def exec_and_register(module: ModuleType) -> None:
        exec_module(module)
        if module.__name__ in _PLUGINS:  # the loader of a zip file serves all of its modules
            importlib.import_module(_PLUGINS[module.__name__])

    return exec_and_register
