"""What a model card says of loading: no more than is known of the engine, the libraries and the folder."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omni_convert.converter.recipe import Recipe
from omni_convert.formats.layout import CONFIG_NAME, PIPELINE_INDEX, read_json
from omni_convert.formats.target import TARGETS
from omni_convert.hub.markdown import as_code, as_text

_TITLES = {"diffusers": "Diffusers", "transformers": "Transformers"}


def library_of(folder: Path, kind: str) -> str | None:
    """Whose layout the folder has, as its files say; None if they name no model."""
    if kind == "pipeline":
        return "diffusers"
    config = _config(folder)
    if "_class_name" in config:
        return "diffusers"
    return "transformers" if "architectures" in config or "model_type" in config else None


def loading(
    folder: Path, manifest: Mapping[str, Any], recipe: Recipe, repo_id: str, library: str | None
) -> Iterator[str]:
    """Paragraphs: which engine loads it and on what condition, and the calls that do."""
    part = _part(manifest, library)
    yield _natively(manifest, recipe, part)
    if recipe.target == "vllm-omni" and not part and not manifest["cautions"]:
        yield f"vLLM-Omni, without any quantization option:\n\n```bash\nvllm serve {repo_id} --omni\n```"
    if library is None:
        return
    title, class_name = _TITLES[library], _class_name(folder, manifest, library)
    if _has_class(library, class_name):
        name = "DiffusionPipeline" if _is_pipeline(folder, library) else class_name
        yield f"{title}, with omni-convert installed:\n\n```python\n{_call(library, name, repo_id)}\n```"
        yield f'omni-convert itself:\n\n```python\nimport omni_convert\n\nmodel = omni_convert.load("{repo_id}")\n```'
    elif auto := _auto_class(folder, library):
        call = _call(library, auto, repo_id, ", trust_remote_code=True")
        yield f"{title}, with omni-convert installed; this runs code of the repository:\n\n```python\n{call}\n```"
    else:
        yield f"No call is given here, because {title} has no class {as_code(class_name)}."


def _part(manifest: Mapping[str, Any], library: str | None) -> str:
    """What keeps an engine from serving it by itself; "" if it is a whole model."""
    if library is None:
        return "These are weights alone: no config names their model, so nothing loads them by themselves."
    if library == "diffusers" and manifest["source"]["kind"] != "pipeline":
        return "It is one component of a pipeline: to serve it, put it where the base model's pipeline has its own."
    return ""


def _natively(manifest: Mapping[str, Any], recipe: Recipe, part: str) -> str:
    """Which engine has these formats, on which hardware, and on what conditions."""
    target = TARGETS[recipe.target]
    every = [target.hardware(fmt) for fmt in recipe.formats]
    hardware = " and ".join(item for item in every[0] if all(item in other for other in every))
    conditions = [part, *(as_text(text[:1].upper() + text[1:]) for text in manifest["cautions"])]
    if any(conditions):
        return " ".join(filter(None, [f"Converted for {target.title}, on {hardware}.", *conditions]))
    return f"Converted for {target.title}, which loads it on {hardware} without more."


def _is_pipeline(folder: Path, library: str) -> bool:
    return library == "diffusers" and (folder / PIPELINE_INDEX).is_file()


def _class_name(folder: Path, manifest: Mapping[str, Any], library: str) -> str:
    """Of the pipeline, or of the model, as the files name it."""
    if _is_pipeline(folder, library):
        return str(read_json(folder / PIPELINE_INDEX).get("_class_name"))
    return str(next(iter(manifest["components"].values()))["class"])


def _has_class(library: str, name: str) -> bool:
    """Whether the library has it, as far as can be told: if it is not installed, it has any name."""
    if not name.isidentifier():
        return False
    try:
        return name in dir(importlib.import_module(library))
    except ImportError:
        return True


def _auto_class(folder: Path, library: str) -> str | None:
    """The class of Transformers that loads a model by code that lies beside it; None if there is no such code."""
    code = _config(folder).get("auto_map") if library == "transformers" else None
    names = code if isinstance(code, dict) else {}
    return next((name for name in names if re.fullmatch(r"AutoModel\w*", name, re.ASCII)), None)


def _call(library: str, name: str, repo_id: str, more: str = "") -> str:
    """``from_pretrained``."""
    dtype = "torch_dtype" if library == "diffusers" else "dtype"
    return (
        f"import torch\nfrom {library} import {name}\n\nimport omni_convert\n\n"
        f'model = {name}.from_pretrained("{repo_id}", {dtype}=torch.bfloat16{more})'
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    return read_json(path) if path.is_file() else {}
