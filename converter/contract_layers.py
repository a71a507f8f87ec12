"""Rules about layers: which are quantized, which are ignored, and what must stand beside the codes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from omni_convert.converter.contract_folder import TRANSFORMERS, Folder, Layer, Part
from omni_convert.converter.contract_methods import COMPANIONS, MAX_NPU_ROWS, METHODS
from omni_convert.converter.contract_models import Encoder
from omni_convert.formats.errors import OmniConvertError, printable
from omni_convert.formats.layout import CONFIG_NAME, read_json

Count = Callable[[Folder, Part], int]
Problems = Callable[[Folder, Part], Iterator[str]]
_AGAIN = "Convert again"
_MISSING = "the engine builds it: a ValueError when it has read all weights. Convert again"
_BLOCK = re.compile(r"(\D+?)\.(\d{1,9})\.(.+)")
_GLOB = re.compile(r"[*?\[]|^re:")


def _ignored(folder: Folder, part: Part) -> Iterator[str]:
    """Every linear that takes the config is quantized or ignored by the name by which the engine decides."""
    if part.model is None and part.lent is None:
        for layer in part.quantized:
            if entry := part.ignored.entry(layer.name):
                yield f"{part.where}: ignores {entry}, but the weights of {layer.name} are {layer.dtype}. {_AGAIN}"
    for name, layers in part.grouped("name").items():
        entry, quantized = part.ignored.entry(name), [layer for layer in layers if layer.is_quantized]
        if entry is not None and len(quantized) == len(layers) and not part.is_forgiving:
            yield (
                f"{part.where}: ignores {printable(entry)}, so that the engine builds {name} in BF16, but the weights "
                f"of {layers[0].name} are {layers[0].dtype}: their codes would be taken for weights. Remove the name"
            )
        if entry is None and not quantized:
            yield f"{part.where}: {_unnamed(part, name, layers)}"
    yield from _meaningless(part)


def _unnamed(part: Part, name: str, layers: Sequence[Layer]) -> str:
    listed = [layer.name for layer in layers if layer.name in part.announced.ignored and layer.name != name]
    hint = f" (it lists {', '.join(listed)}, which the engine never asks for)" if listed else ""
    return (
        f"does not ignore {name}{hint}, but the weights of {layers[0].name} are {layers[0].dtype}: the engine builds "
        f"it for {part.kind} and casts the weights to codes, without a word. Add {name} to the list"
    )


def _meaningless(part: Part) -> Iterator[str]:
    """Names that stand for a layer to a reader, but not to the engine, which compares whole names."""
    if part.announced.modelopt:
        return
    known = {layer.name for layer in part.layers.values() if layer.is_linear} | part.grouped("name").keys()
    for entry in part.announced.ignored:
        if entry in known:
            continue
        if _GLOB.search(entry) and any(fnmatchcase(name, entry) for name in known):
            yield f"{part.where}: ignores {printable(entry)}: the engine knows no patterns. List whole names"
        folder, _, rest = entry.partition(".")
        if folder in TRANSFORMERS and rest in known:
            yield f"{part.where}: ignores {printable(entry)}: its names have no {folder} in front. List {rest}"


def _others(folder: Folder, part: Part) -> Iterator[str]:
    """Everything that is built without the config keeps plain weights."""
    never = {layer.name for layer in part.never_quantized}
    for layer in part.layers.values():
        if part.model and layer.is_quantized and not layer.built and layer.name not in never and not part.is_forgiving:
            yield (
                f"{layer.name}: its weights are {layer.dtype}, but the engine builds it without {part.kind}: it would "
                f"take codes for weights. {_AGAIN}, with its weights as they were"
            )


def _never(folder: Folder, part: Part) -> Iterator[str]:
    for layer in part.never_quantized:
        found = layer.companions + ([f"{layer.dtype} weights"] if layer.is_quantized else [])
        if part.model and part.model.never and found and not part.is_forgiving:
            yield f"{layer.name}: has {' and '.join(found)}, but of {part.model.name} {part.model.never[1]}. {_AGAIN}"


def _scales(folder: Folder, part: Part) -> Iterator[str]:
    """Every quantized weight has all that its method needs beside it."""
    for layer in part.quantized:
        rows, columns = (*layer.shape, 0, 0)[:2]
        required = part.announced.required(METHODS[part.kind].scales(rows, columns, part.announced.block))
        missing = [suffix for suffix in required if suffix not in layer.tensors]
        if missing:
            yield (
                f"{layer.name}: lacks {', '.join(missing)}, which {part.kind} needs: the engine stops, or warns and "
                f"computes with what its memory held. {_AGAIN}"
            )


def _strays(folder: Folder, part: Part) -> Iterator[str]:
    """No scale belongs to a layer that has none in the engine, or to another method."""
    does = part.model.stray if part.model else "does not know it"
    never = {layer.name for layer in part.never_quantized}
    accepted = METHODS[part.kind].scales(1, 1, part.announced.block)
    for layer in part.layers.values():
        if not layer.companions or layer.name in never or (part.is_forgiving and not layer.built):
            continue
        if not layer.is_quantized:
            found = f"the weights beside it are {layer.dtype}"
            yield f"{layer.name}.{layer.companions[0]}: {found}: the engine {does}. {_AGAIN}"
        elif layer.built or not part.model:
            for suffix in layer.companions:
                if suffix not in accepted:
                    yield f"{layer.name}.{suffix}: {part.kind} has no such tensor: the engine {does}. {_AGAIN}"
    yield from _unknown(part)


def _unknown(part: Part) -> Iterator[str]:
    """Tensors that are neither of a linear nor of anything else in the model."""
    plain = re.compile("|".join(part.model.plain)) if part.model and part.model.plain else None
    for name in part.tensors if plain else ():
        layer, _, suffix = name.rpartition(".")
        of_linear = suffix == "weight" and part.layers[layer].built is not None
        if plain and part.model and suffix not in COMPANIONS and not of_linear and not plain.fullmatch(name):
            yield f"{name}: {part.model.name} has no such tensor: the engine {part.model.stray}. Remove it"


def _absent(folder: Folder, part: Part) -> Iterator[str]:
    """All linears that the engine builds are there, if only in part: in every block, what its siblings have."""
    if part.model is None or part.file_problems:
        return
    names = [name for name, layer in part.layers.items() if layer.is_linear]
    for linear in part.model.linears:
        wanted = not linear.optional and (not linear.methods or part.kind in linear.methods)
        if wanted and not any(linear.pattern.fullmatch(name) for name in names):
            yield f"{part.title}: has no layer {linear.layers} (a regular expression), and {_MISSING}"
    for kind, blocks in _blocks(part).items():
        every = set[str]().union(*blocks.values())
        for number, found in blocks.items():
            yield from (f"{kind}.{number}.{name}: is not there, and {_MISSING}" for name in sorted(every - found))
        gap = next(number for number in range(len(blocks) + 1) if number not in blocks)
        if gap < len(blocks):
            yield f"{kind}.{gap}: is not there, but {kind}.{max(blocks)} is, and {_MISSING}"


def _blocks(part: Part) -> Mapping[str, Mapping[int, set[str]]]:
    """Where blocks lie -> number -> parameters of linears in it."""
    found: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for param in _needed(part):
        if match := _BLOCK.fullmatch(param):
            found[match[1]][int(match[2])].add(match[3])
    return found


def _needed(part: Part) -> Mapping[str, Sequence[Layer]]:
    groups = part.grouped("param").items()
    return {param: layers for param, layers in groups if layers[0].built and not layers[0].built.linear.optional}


def _fused(folder: Folder, part: Part) -> Iterator[str]:
    """Layers decided by one name are quantized together; all shards of a stacked one are there."""
    for name, layers in part.grouped("name").items():
        kept = [layer.name for layer in layers if not layer.is_quantized]
        if 0 < len(kept) < len(layers):
            other = next(layer.name for layer in layers if layer.is_quantized)
            yield (
                f"{kept[0]}: is unquantized, but {other} is not, and the engine has one {name} for both: it casts one "
                f"to the other's kind. {_AGAIN}, both or none"
            )
    for param, layers in part.grouped("param").items():
        shards = layers[0].built.linear.shards if layers[0].built else ()
        if shards and len(layers) != len(shards):
            yield (
                f"{param}: is stacked from {len(shards)} layers, but only {', '.join(item.name for item in layers)} "
                f"are there: the rest of it would be what its memory held. {_AGAIN}"
            )


def _shapes(folder: Folder, part: Part) -> Iterator[str]:
    method = METHODS[part.kind]
    for layer in part.quantized:
        if layer.dtype != method.weight or len(layer.shape) != 2:
            yield f"{layer.name}.weight: is {layer.dtype} {layer.shape}, expected {method.weight} (N, K). {_AGAIN}"
            continue
        rows, columns = layer.shape
        if columns % method.columns:
            yield f"{layer.name}.weight: has K = {columns}, {part.kind} needs a multiple of {method.columns}. {_AGAIN}"
        if part.kind == "int8" and rows > MAX_NPU_ROWS:
            yield (
                f"{layer.name}.weight: has {rows} rows, and an NPU builds linears with more than {MAX_NPU_ROWS} in "
                f"BF16: it would take codes for weights. {_AGAIN}, with --ignore"
            )
        for suffix, (dtype, shapes) in method.scales(rows, columns, part.announced.block).items():
            place = layer.tensors.get(suffix)
            spec = place.tensor.spec if place else None
            if spec and (spec.dtype not in (dtype, *method.wider) or spec.shape not in shapes):
                expected = f"{dtype} {' or '.join(map(str, shapes))}"
                yield f"{layer.name}.{suffix}: is {spec.dtype} {spec.shape}, expected {expected}. {_AGAIN}"
    if part.kind == "fp8 block":
        yield from _uneven_blocks(part)


def _uneven_blocks(part: Part) -> Iterator[str]:
    """No block of rows reaches over two of the matrices that are stacked, whether here or in the engine."""
    size = part.announced.block[0]
    for layer in part.quantized:
        built = layer.built
        if built is None or len(layer.shape) != 2 or not built.is_stacked:
            continue
        rows = layer.shape[0] // built.linear.widths
        if rows % size and (built.linear.widths > 1 or built.shard < len(built.linear.shards) - 1):
            yield (
                f"{layer.name}.weight: is stacked into {built.param} with {rows} rows, which blocks of {size} do not "
                f"divide: a ValueError. {_AGAIN}, with another --block-size or --ignore"
            )


def _encoder_of(folder: Folder, part: Part) -> Encoder | None:
    encoder = part.model.encoder if part.model else None
    there = (folder.root / "text_encoder" / CONFIG_NAME).is_file()
    return (
        encoder if encoder and part.name == "transformer" and there and folder.pipeline in encoder.pipelines else None
    )


def _encoder(folder: Folder, part: Part) -> Iterator[str]:
    """A text encoder that is built with the same config is ignored, linear by linear, or quantized too."""
    encoder = _encoder_of(folder, part)
    if encoder is None:
        return
    where = f"text_encoder/{CONFIG_NAME}"
    count = _layer_count(folder, encoder)
    if count is None:
        yield f"{where}: {'.'.join(encoder.count)} is no number of layers, so its linears cannot be named. Correct it"
        return
    own = next((other.layers for other in (*folder.parts, *folder.elsewhere) if other.name == "text_encoder"), {})
    quantized = {layer.name for layer in own.values() if layer.is_quantized}
    for template, ends in encoder.linears.items():
        for number in range(count if "{}" in template else 1):
            name = template.format(number)
            parts = [any(f".{layer}".endswith(f".{end.format(number)}") for layer in quantized) for end in ends]
            if part.ignored.entry(name) is None and not all(parts):
                yield (
                    f"{part.where}: does not ignore {name}, which this pipeline builds with the transformer's config: "
                    f"the encoder's BF16 weights would be cast to {part.kind} codes, without a word. Add it"
                )
            elif part.ignored.entry(name) and any(parts):
                yield f"{part.where}: ignores {name}, but text_encoder/ holds codes of it. Remove it from the list"


def _layer_count(folder: Folder, encoder: Encoder) -> int | None:
    try:
        found: object = read_json(folder.root / "text_encoder" / CONFIG_NAME)
    except OmniConvertError:
        return None
    for key in encoder.count:
        found = found.get(key) if isinstance(found, dict) else None
    return found if type(found) is int and 0 <= found < 10_000 else None


def _linears(folder: Folder, part: Part) -> int:
    return len(part.grouped("name")) if part.model else len(part.quantized)


def _plain_layers(folder: Folder, part: Part) -> int:
    return sum(not layer.built for layer in part.layers.values()) if part.model else 0


def _fused_groups(folder: Folder, part: Part) -> int:
    return sum(len(layers) > 1 for layers in part.grouped("name").values())


def _quantized(folder: Folder, part: Part) -> int:
    return len(part.quantized)


RULES: Mapping[str, tuple[str, Count, Problems]] = {
    "ignored layers": ("linears by the names that the engine asks for", _linears, _ignored),
    "other layers": ("layers that it builds without a config", _plain_layers, _others),
    "unquantizable layers": (
        "layers of which none may be quantized", lambda folder, part: len(list(part.never_quantized)), _never,
    ),
    "text encoder": (
        "encoders built with the transformer's config", lambda folder, part: bool(_encoder_of(folder, part)), _encoder,
    ),
    "scales": ("layers with all that belongs to the codes", _quantized, _scales),
    "unknown tensors": ("tensors by name", lambda folder, part: len(part.tensors), _strays),
    "all layers": (
        "linears that the engine builds", lambda folder, part: len(_needed(part)) if part.model else 0, _absent,
    ),
    "fused layers": ("groups of layers that become one", _fused_groups, _fused),
    "shapes": ("layers by dtype and shape", _quantized, _shapes),
}  # fmt: skip
