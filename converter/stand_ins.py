"""A folder that stands for an output whose weights are not in it: what vLLM-Omni's rules read of them.

A stand-in has the header and the true size; the rest is a hole. It may have the scales too, about a thousandth of the
whole. Stand-ins never go where a library would look.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from omni_convert.converter.contract_methods import COMPANIONS
from omni_convert.converter.hub_needed import is_planned_from
from omni_convert.converter.plan import Plan, encode_json
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.header import MAX_HEADER_BYTES, read_header
from omni_convert.formats.layout import CONFIG_NAME, MANIFEST_NAME


def lay_out(plan: Plan, folder: Path) -> None:
    """Fill ``folder`` with what the plan's output will have: configs, indexes, and stand-ins, but for those it has."""
    for name, (_, shard) in plan.shards.items():
        _stand_in(folder / name, shard.header, shard.size)
    for name, file in plan.checkpoint.others.items():
        if name.endswith(".safetensors"):
            _stand_in(folder / name, _head(file.path), file.size)
        elif is_planned_from(name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.path, folder / name)
    for part in plan.components:
        component = part.component
        (folder / component.relative(CONFIG_NAME)).write_bytes(part.config_bytes)
        if component.shards.index_name:
            (folder / component.relative(component.shards.index_name)).write_bytes(part.index_bytes)
    (folder / MANIFEST_NAME).write_bytes(encode_json({"recipe": plan.recipe.to_dict()}))


def keep_scales(path: Path, stand_in: Path) -> None:
    """Make a stand-in of the weights ``path``, with all that lies beside the codes, but for MX formats' scale bytes."""
    try:
        tensors = read_header(path).tensors
    except OmniConvertError:  # it came with the source, and whoever looks for weights in it will say so
        return
    scales = [tensor for name, tensor in tensors.items() if name.rpartition(".")[2] in COMPANIONS]
    stand_in.parent.mkdir(parents=True, exist_ok=True)
    with path.open("rb") as whole, stand_in.open("wb") as file:
        file.write(_head(path))
        file.truncate(path.stat().st_size)
        for tensor in scales:
            if tensor.spec.dtype != "U8":
                whole.seek(tensor.start)
                file.seek(tensor.start)
                file.write(whole.read(tensor.spec.nbytes))


def _head(path: Path) -> bytes:
    """Length field and header of weights, or of their stand-in."""
    with path.open("rb") as file:
        prefix = file.read(8)
        return prefix + file.read(min(int.from_bytes(prefix, "little"), MAX_HEADER_BYTES))


def _stand_in(path: Path, head: bytes, size: int) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(head)
        with path.open("rb+") as file:
            file.truncate(size)
