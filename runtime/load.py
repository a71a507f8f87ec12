"""``load``: a folder on disk -> a model or pipeline that is ready to run."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from omni_convert.formats import FORMATS
from omni_convert.formats.config import asks_online, stored_config
from omni_convert.formats.errors import OmniConvertError, printable
from omni_convert.formats.layout import CONFIG_NAME, MARKER_NAME, PIPELINE_INDEX, read_json
from omni_convert.runtime.component import OPENED, Component, read_component
from omni_convert.runtime.kernels import check_format, device_of
from omni_convert.runtime.npu_device import open_device
from omni_convert.runtime.online import QUANTIZING, Online
from omni_convert.runtime.parallel import LOADING, Rank
from omni_convert.runtime.staging import move

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    online: Mapping[str, Online] | None = None,
    rank: Rank | None = None,
) -> Any:
    """Load a converted checkpoint: a Diffusers pipeline or model, or a Transformers model, in eval mode.

    Args:
        path: folder with ``model_index.json`` (pipeline) or ``config.json`` (one model).
        device: where the model runs.
        dtype: of everything that is not quantized, and so of the activations. None keeps each component in the
            dtype that most of its unquantized weights have on disk.
        online: of a plain checkpoint, by component, what is quantized while it loads; empty: nothing, the checkpoint
            is loaded as it is.
        rank: of several processes that run the model together, and hold a part of it each.

    Raises:
        OmniConvertError: nothing quantized there, an unfinished conversion, a missing or damaged file, tensors that
            are not what the config announces, a device without kernels, or a library that is not installed. Found
            before any model is built. Found while it is filled: a tensor that it needs or does not know.
    """
    folder = Path(path)
    check_folder(folder)
    target = parse_device(device)
    for fmt in {fmt for part in (online or {}).values() for fmt in part.config.formats}:
        check_format(fmt, device_of(target))
    is_pipeline = (folder / PIPELINE_INDEX).is_file()
    rank = rank and replace(rank, device=target.type, in_pipeline=is_pipeline)
    tokens = LOADING.set(rank), OPENED.set({})
    try:
        if is_pipeline:
            return _load_pipeline(folder, target, dtype, online)
        component = read_component(folder)
        _check_online([component], online or {})
        if online is None:
            _check_quantized(folder, [component], target)
        model = _load_model(component, dtype, online[""] if online else None)
        move(model, target)
        return model
    finally:
        LOADING.reset(tokens[0])
        OPENED.reset(tokens[1])


def prepare(
    path: str | os.PathLike[str], *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Callable[[], Any]:
    """Check a checkpoint, plain or converted, as ``load`` does, and return what loads it as it is."""
    folder = Path(path)
    check_folder(folder)
    target = parse_device(device)
    is_pipeline = (folder / PIPELINE_INDEX).is_file()
    components = [read_component(folder / name) for name in (_component_names(folder) if is_pipeline else [""])]
    if any(component.quantization for component in components):
        _check_quantized(folder, components, target)
    return functools.partial(load, folder, device=target, dtype=dtype, online={})


def asked_online(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What configs ask to have done with plain weights while they are loaded: the entry of a model, of a pipeline
    those of its components by name; None if nothing.

    Raises:
        OmniConvertError: there is no whole checkpoint, or the weights are not plain.
    """
    folder = Path(path)
    check_folder(folder)
    if not (folder / PIPELINE_INDEX).is_file():
        return _asked_of(folder)
    asked = {name: _asked_of(folder / name) for name in _component_names(folder)}
    return {name: entry for name, entry in asked.items() if entry} or None


def _asked_of(folder: Path) -> dict[str, Any] | None:
    if not asks_online(stored_config(read_json(folder / CONFIG_NAME))):
        return None
    return dict(read_component(folder).online or {})


def _load_model(component: Component, dtype: torch.dtype | None, online: Online | None) -> Any:
    """``online``: how its plain weights are quantized."""
    model_class, library = _model_class(component)
    kept = dtype or _stored_dtype(component, online)
    options: dict[str, Any] = {"dtype" if library == "transformers" else "torch_dtype": kept}
    token = QUANTIZING.set(online)
    try:
        if online:
            plugin = importlib.import_module(f"omni_convert.runtime.{library}_plugin")
            options["quantization_config"] = plugin.OmniConvertConfig()
        return _from_pretrained(model_class, component.path, **options).eval()
    finally:
        QUANTIZING.reset(token)


def _load_pipeline(
    folder: Path, device: torch.device, dtype: torch.dtype | None, online: Mapping[str, Online] | None
) -> Any:
    components = {name: read_component(folder / name) for name in _component_names(folder)}
    _check_online(components.values(), online or {})
    if online is None:
        _check_quantized(folder, components.values(), device)
    diffusers = import_library("diffusers")
    if any(_library(component) == "transformers" for component in components.values()):
        import_library("transformers")
    dtypes = dtype or {
        "default": torch.float32,  # Diffusers' own; for parts without weights
        **{name: _stored_dtype(component) for name, component in components.items()},
    }
    parts = {name: _load_model(components[name], dtype, part) for name, part in (online or {}).items()}
    # Its own class takes all parts; that of all pipelines would load optional ones again (Wan's transformer_2).
    name = str(read_json(folder / PIPELINE_INDEX).get("_class_name"))
    pipeline_class = getattr(diffusers, name, diffusers.DiffusionPipeline)
    pipeline = _from_pretrained(pipeline_class, folder, torch_dtype=dtypes, **parts)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            move(part.eval(), device)
    return pipeline.to(device)


def _from_pretrained(library_class: Any, folder: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        # Newer versions say `dtype`, but this is the name that all of them know.
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        # Beside the one in the file; both become ours.
        warnings.filterwarnings("ignore", "You passed `quantization_config`", UserWarning)
        return library_class.from_pretrained(str(folder), **options)


def _component_names(folder: Path) -> list[str]:
    """The models of a pipeline; schedulers, tokenizers and the like have no weights to check."""
    names = []
    for name, entry in read_json(folder / PIPELINE_INDEX).items():
        if name.startswith("_") or not isinstance(entry, list) or not entry or entry[0] is None:
            continue
        if Path(name).name != name or not (folder / name).is_dir():
            raise OmniConvertError(
                f"{folder / PIPELINE_INDEX}: names component {name!r}, but {folder / name} is not a folder. "
                "Convert or download the checkpoint again."
            )
        if (folder / name / CONFIG_NAME).is_file() and _has_weights(folder / name):
            names.append(name)
    return names


def _has_weights(folder: Path) -> bool:
    """Image processors have a ``config.json`` too, but nothing else to load."""
    config = read_json(folder / CONFIG_NAME)
    return "quantization_config" in config or any(folder.glob("*.safetensors*"))


def check_folder(folder: Path) -> None:
    """Raises:
    OmniConvertError: there is no whole checkpoint.
    """
    if folder.is_file():
        raise OmniConvertError(
            f"{folder}: is a file, expected a folder with {PIPELINE_INDEX} or {CONFIG_NAME}. "
            "Pass the folder that holds it."
        )
    if not folder.is_dir():
        raise OmniConvertError(
            f"{folder}: does not exist, expected a local folder, or org/name[@revision] of a repository on the Hub. "
            "Check the path."
        )
    for root in (folder, folder.parent):
        if (root / MARKER_NAME).is_file():
            raise OmniConvertError(
                f"{root}: holds {MARKER_NAME}, the mark of a conversion that has not finished, expected a whole "
                "checkpoint. Run the same omni-convert command again."
            )
    if not (folder / PIPELINE_INDEX).is_file() and not (folder / CONFIG_NAME).is_file():
        raise OmniConvertError(
            f"{folder}: found neither {PIPELINE_INDEX} nor {CONFIG_NAME}, expected one of them. Pass the folder of a "
            "pipeline or of one of its models; if a conversion was interrupted, run it again."
        )


def _check_online(components: Iterable[Component], online: Mapping[str, Online]) -> None:
    """Whether everything that is to be quantized while it is loaded will be."""
    for component in components:
        if component.online and not ({"", component.path.name} & online.keys()):
            raise OmniConvertError(
                f"{component.path / CONFIG_NAME}: quantization_config asks to quantize plain weights while they are "
                f"loaded, but `quantization` names {', '.join(online) or 'nothing'}, expected {component.path.name} "
                "among them. Add it, or remove the entry."
            )


def _check_quantized(folder: Path, components: Iterable[Component], device: torch.device) -> None:
    formats = [fmt for component in components if component.quantization for fmt in component.quantization.formats]
    if not formats:
        raise OmniConvertError(
            f"{folder}: found no quantization_config, expected one of {', '.join(FORMATS)}. Convert the checkpoint "
            "with omni-convert first, or load plain weights with the from_pretrained of their library."
        )
    for fmt in formats:
        check_format(fmt, device_of(device))


def parse_device(device: str | torch.device) -> torch.device:
    if str(device).partition(":")[0] == "npu":  # a name that PyTorch knows only with torch-npu installed
        return open_device(str(device))
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise OmniConvertError(
            f"device {device!r} is not known to PyTorch, expected 'cpu', 'cuda', 'cuda:1' or the like."
        ) from error
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise OmniConvertError(
            f"device {device!r} was asked for, but PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
            "devices. Use device='cpu', or a PyTorch build and driver that see the GPU."
        )
    try:
        torch.empty(0, device=parsed)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise OmniConvertError(
            f"device {device!r} was asked for, but PyTorch {torch.__version__} cannot use it here "
            f"({printable(str(error).splitlines()[0])}). Use device='cpu', or a PyTorch build for that device."
        ) from error
    return parsed


def _library(component: Component) -> str:
    return "diffusers" if "_class_name" in component.config else "transformers"


def _model_class(component: Component) -> tuple[Any, str]:
    library = _library(component)
    module = import_library(library)
    config_path = component.path / CONFIG_NAME
    if library == "diffusers":
        name = component.config["_class_name"]
        model_class = getattr(module, str(name), None)
        if model_class is None:
            raise OmniConvertError(
                f"{config_path}: _class_name is {name!r}, which Diffusers {module.__version__} does not have. "
                "Install the version that the model needs: pip install -U diffusers"
            )
        return model_class, library
    if "model_type" not in component.config:
        raise OmniConvertError(
            f"{config_path}: names no class (_class_name or model_type), expected one: weights that were converted "
            "from a single file carry no model. Build the model yourself, or convert its folder."
        )
    return _transformers_class(module, component.config, config_path), library


def _transformers_class(module: Any, config: Mapping[str, Any], config_path: Path) -> Any:
    """What a Transformers config names; the model without a head where it names nothing."""
    architectures = config.get("architectures")
    if not architectures:
        return module.AutoModel
    name = architectures[0] if isinstance(architectures, list) else architectures
    found = getattr(module, name, None) if isinstance(name, str) and isinstance(architectures, list) else None
    if not isinstance(found, type) or not issubclass(found, module.PreTrainedModel):
        remedy = (
            "It comes with code of its own, which the library runs, after import omni_convert: "
            "from_pretrained(..., trust_remote_code=True)"
            if "auto_map" in config
            else "Install the version that the model needs: pip install -U transformers"
        )
        raise OmniConvertError(
            f"{config_path}: architectures is {printable(architectures)}, expected a list with a model class of "
            f"Transformers {module.__version__}. {remedy}"
        )
    return found


def _stored_dtype(component: Component, online: Online | None = None) -> torch.dtype:
    quantized = {f"{layer}.weight" for layer in online.layers} if online else set()
    kept = {name: spec for name, spec in component.tensors.items() if name not in quantized}
    stored = replace(component, tensors=kept).kept_dtype
    return _DTYPES[stored] if stored is not None else torch.get_default_dtype()


def import_library(name: str) -> ModuleType:
    """``diffusers`` or ``transformers``, with the accelerate that both need to load quantized weights."""
    for package in (name, "accelerate"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
            raise OmniConvertError(
                f"the package {package} is not installed, expected because this checkpoint is loaded with {name}. "
                f"Run: pip install 'omni-convert[{name}]'"
            ) from error
    return importlib.import_module(name)
