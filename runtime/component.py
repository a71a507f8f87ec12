"""A quantized component on disk: its config, its tensors by header, and whether they are what the config announces.

No weight is read here. Everything that can be wrong with a checkpoint is found before a model is built.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omni_convert.formats import FORMATS
from omni_convert.formats.base import Format
from omni_convert.formats.config import QuantizationConfig, asks_online, parse_config, stored_config
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.fp8 import Fp8
from omni_convert.formats.header import FLOAT_DTYPES, Header, TensorSpec, read_header
from omni_convert.formats.layout import CONFIG_NAME, INDEX_NAMES, check_weight_map, read_index, read_json, read_shards

_OPTIONS = (Fp8(activation_scheme="static"), Fp8(granularity="block"))
"""With suffixes that ``FORMATS``, which have the default of every option, lack."""

OPENED: ContextVar[dict[Path, Header] | None] = ContextVar("OPENED", default=None)
"""While a checkpoint is loaded, the headers read so far: the libraries' plug-ins are only told the files."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """One model folder. ``quantization`` is None if it holds plain weights; ``online``: the config's entry that has
    them quantized while they are loaded, if there is one."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorSpec]
    quantization: QuantizationConfig | None
    online: Mapping[str, Any] | None = None

    @property
    def kept_dtype(self) -> str | None:
        """The safetensors dtype that most elements of unquantized floating tensors have; None if there are none."""
        scales = () if self.quantization is None else _companions(self.quantization.formats)
        elements: dict[str, int] = {}
        for name, spec in self.tensors.items():
            if spec.dtype in FLOAT_DTYPES and not (scales and name.endswith(scales)):
                elements[spec.dtype] = elements.get(spec.dtype, 0) + spec.numel
        return max(elements, key=lambda dtype: elements[dtype], default=None)


def read_component(path: Path) -> Component:
    """Read and check one model folder.

    Raises:
        OmniConvertError: no or a damaged config, a missing shard, tensors that are not what the config announces.
    """
    config_path = path / CONFIG_NAME
    if not config_path.is_file():
        raise OmniConvertError(
            f"{path}: found no {CONFIG_NAME}, expected a model folder. If a conversion was interrupted, run it again; "
            "it writes this file last."
        )
    config = read_json(config_path)
    shards = read_shards(path)
    if (opened := OPENED.get()) is not None:
        opened.update({header.path: header for header in shards.headers})
    tensors = {name: tensor.spec for name, tensor, _ in shards.tensors()}
    announced, where = stored_config(config), f"{config_path}: quantization_config"
    read = partial(Component, path=path, config=config, tensors=tensors)
    if announced is None:
        _check_plain(tensors, config_path)
        return read(quantization=None)
    if not isinstance(announced, dict):
        raise OmniConvertError(f"{where} is {announced!r}, expected an object.")
    if asks_online(announced):
        _check_flag(announced, tensors, where, (".weight_scale", ".weight_scale_inv"))
        if "quant_method" not in announced:
            raise OmniConvertError(
                f"{where}: found the key method, expected quant_method: libraries know only that one."
            )
        return read(quantization=None, online=announced)
    quantization = parse_config(announced, where)
    quantized_layers(tensors, quantization, str(path))
    return read(quantization=quantization)


def check_flag(files: Iterable[Path]) -> None:
    """Whether a library's own quantizer of the same name as one of our methods may load ``files``.

    Raises:
        OmniConvertError: they hold a ``weight_scale``, which it does not read: it would take codes for weights.
    """
    for folder in {file.parent for file in files}:
        path = folder / CONFIG_NAME
        announced = stored_config(read_json(path)) if path.is_file() else None
        if announced and asks_online(announced):
            _check_flag(announced, read_tensors(files), f"{path}: quantization_config", (".weight_scale",))


def _check_flag(
    announced: Mapping[str, Any], tensors: Mapping[str, TensorSpec], where: str, suffixes: tuple[str, ...]
) -> None:
    """Whether a config that does not say "quantized already" is wrong: some tensor has one of ``suffixes``."""
    scale = next((name for name in tensors if name.endswith(suffixes)), None)
    if scale is None:
        return
    flag = str(FORMATS[announced.get("quant_method", announced.get("method"))].serialized_flag)
    found = f"{flag} is {announced[flag]!r}" if flag in announced else f"has no {flag}"
    raise OmniConvertError(
        f"{where}: {found}, but the tensors are quantized ({scale} is there), so the config is wrong, expected true. "
        f"Engines would take the codes for plain weights. Set {flag} to true, or convert the checkpoint again."
    )


def read_tensors(files: Iterable[Path]) -> dict[str, TensorSpec]:
    """Name -> dtype and shape of every tensor in ``files``.

    Raises:
        OmniConvertError: a file is not a well-formed safetensors file, two files hold the same tensor, or the index
            beside them places one elsewhere.
    """
    tensors: dict[str, TensorSpec] = {}
    origin: dict[str, Path] = {}
    opened = OPENED.get() or {}
    headers = [opened.get(file) or read_header(file) for file in files]
    for header in headers:
        for name, stored in header.tensors.items():
            if name in tensors:
                raise OmniConvertError(
                    f"{header.path}: holds tensor {name}, which {origin[name].name} holds too; expected each tensor "
                    "once. Remove shards of another conversion."
                )
            tensors[name], origin[name] = stored.spec, header.path
    if not opened:  # ``read_component`` has seen it
        _check_index(headers)
    return tensors


def _check_index(headers: Sequence[Header]) -> None:
    """Whether the index of these files, if they have one, fits them: libraries take names from either."""
    for path in {header.path.parent / name for header in headers for name in INDEX_NAMES}:
        if path.is_file():
            weight_map, _ = read_index(path)
            if set(weight_map.values()) == {header.path.name for header in headers}:
                check_weight_map(path, weight_map, headers)


def quantized_layers(
    tensors: Mapping[str, TensorSpec], config: QuantizationConfig, where: str
) -> dict[str, tuple[int, int]]:
    """Layers that are quantized on disk, by checkpoint name, with the shape (N, K) of their weight.

    The tensors decide: a layer is quantized if it has a scale. ``config.ignored_layers`` may name more layers than
    exist (engines' fused spellings) and fewer than are kept, but none that is quantized. ``config.layers`` name
    exactly the layers that have another format than the rest.

    Raises:
        OmniConvertError: a weight without scale, a scale without weight, a scale of an ignored layer, a dtype or
            shape that is not the format's, a scale of another format, a layer with a format of its own that is not
            there, or no quantized layer at all.
    """
    companions = _companions(config.formats)
    names = {name.rpartition(".")[0] for name in tensors if name.endswith(companions)}
    code_dtypes = {fmt.tensors((1, 1))["weight"].dtype for fmt in config.formats}
    for name, spec in tensors.items():
        layer = name.removesuffix(".weight")
        is_code = spec.dtype in code_dtypes or spec.dtype.startswith(("I", "U"))  # weights are never integers
        if layer != name and is_code and layer not in names:
            scale = config.format_on_disk(layer).suffixes[1]
            raise OmniConvertError(
                f"{where}: tensor {name} is {spec.dtype} without {layer}.{scale}, expected both. "
                "The codes mean nothing without their scale: convert the checkpoint again."
            )
    if not names:
        raise OmniConvertError(
            f"{where}: the config announces {config.format.name}, but no tensor ends with {companions[0]}. "
            "Convert the checkpoint again, or remove quantization_config if its weights are plain."
        )
    for rule in config.layers:
        if rule.name not in names:
            raise OmniConvertError(
                f"{where}: the config names layer {rule.name}, but no quantized layer has that name. "
                "Convert the checkpoint again."
            )
    for layer in sorted(names.intersection(config.ignored_layers)):
        raise OmniConvertError(
            f"{where}: layer {layer} is in ignored_layers but has {_scale_of(layer, tensors, config)}, expected one or "
            "the other. Convert the checkpoint again."
        )
    shapes = {layer: _layer_shape(layer, tensors, config, where) for layer in sorted(names)}
    _check_others(tensors, names, config, where)
    return shapes


def _check_others(
    tensors: Mapping[str, TensorSpec], layers: Collection[str], config: QuantizationConfig, where: str
) -> None:
    """Whether quantized layers have tensors that their formats do not know, and others the scales of any format."""
    suffixes = {suffix for fmt in (*FORMATS.values(), *_OPTIONS) for suffix in fmt.suffixes} - {"weight"}
    for name in tensors:
        layer, _, suffix = name.rpartition(".")
        if layer in layers:
            fmt = config.format_on_disk(layer)
            if suffix not in (*fmt.suffixes, "bias"):
                raise OmniConvertError(
                    f"{where}: layer {layer} is announced as {fmt.name} but has {name}, expected no such tensor beside "
                    f"{', '.join(fmt.suffixes)} and bias. Convert the checkpoint again."
                )
        elif suffix in suffixes:
            raise OmniConvertError(
                f"{where}: found tensor {name}, expected none because layer {layer} is not quantized. Convert the "
                "checkpoint again."
            )
        elif above := next((above for above in _above(layer) if above in layers), None):
            raise OmniConvertError(
                f"{where}: found tensor {name} within layer {above}, which is quantized, expected no such tensor. "
                "Convert the checkpoint again."
            )


def _above(layer: str) -> Iterator[str]:
    """The modules that hold a layer, from the inside."""
    while layer := layer.rpartition(".")[0]:
        yield layer


def _check_plain(tensors: Mapping[str, TensorSpec], config_path: Path) -> None:
    """Libraries load codes as if they were weights where the config does not say what they are."""
    codes = {fmt.tensors((1, 1))["weight"].dtype for fmt in FORMATS.values()}
    for name, spec in tensors.items():
        scale = next((scale for scale in (f"{name}_scale", f"{name}_scale_inv") if scale in tensors), None)
        if spec.dtype in codes and scale is not None:
            raise OmniConvertError(
                f"{config_path}: found no quantization_config, expected one because tensor {name} is {spec.dtype} and "
                f"{scale} is there. Its codes would be taken for weights: restore the entry, or convert again."
            )


def _layer_shape(
    layer: str, tensors: Mapping[str, TensorSpec], config: QuantizationConfig, where: str
) -> tuple[int, int]:
    fmt = config.format_on_disk(layer)
    weight = tensors.get(f"{layer}.weight")
    if weight is None:
        raise OmniConvertError(
            f"{where}: layer {layer} has a scale but no {layer}.weight, expected both. Convert the checkpoint again."
        )
    refusal = fmt.refusal(weight.shape)
    if refusal is not None:
        raise OmniConvertError(f"{where}: tensor {layer}.weight has shape {weight.shape}: {refusal}.")
    for suffix, expected in fmt.tensors(weight.shape).items():
        found = tensors.get(f"{layer}.{suffix}")
        if found != expected:
            text = "nothing" if found is None else f"{found.dtype} {found.shape}"
            raise OmniConvertError(
                f"{where}: tensor {layer}.{suffix} is {text}, expected {expected.dtype} {expected.shape} for "
                f"{fmt.name}. Convert the checkpoint again."
            )
    bias = tensors.get(f"{layer}.bias")
    if bias is not None and (bias.dtype not in FLOAT_DTYPES or bias.shape != weight.shape[:1]):
        dtypes = ", ".join(sorted(FLOAT_DTYPES))
        raise OmniConvertError(
            f"{where}: tensor {layer}.bias is {bias.dtype} {bias.shape}, expected one of {dtypes} and "
            f"{weight.shape[:1]}. Convert the checkpoint again."
        )
    return weight.shape[0], weight.shape[1]


def _companions(formats: Iterable[Format]) -> tuple[str, ...]:
    """What the names of scales end with."""
    return tuple(dict.fromkeys(f".{suffix}" for fmt in formats for suffix in fmt.suffixes[1:]))


def _scale_of(layer: str, tensors: Mapping[str, TensorSpec], config: QuantizationConfig) -> str:
    return next(f"{layer}{companion}" for companion in _companions(config.formats) if f"{layer}{companion}" in tensors)
