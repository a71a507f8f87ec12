"""Converted models of every family, and changes to them that an engine would trip over."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from hostile.small import Stored, Tensor, read_json, read_weights, write_json, write_weights
from kinds import CHOICES

import omni_convert
from omni_convert.converter.check import Check
from omni_convert.converter.contract import PREFIX, check_contract
from omni_convert.converter.verify import Verification

if TYPE_CHECKING:
    from families import Family

METHODS = CHOICES | {"fp8 block": {"method": "fp8", "block_size": (32, 32)}}
_BYTES = {"F8_E4M3": "u1", "I8": "i1", "U8": "u1", "F32": "<f4", "BF16": "<u2", "F16": "<u2", "I64": "<i8"}


def weights(folder: Path) -> dict[str, Stored]:
    return {name: item for path in folder.glob("*.safetensors") for name, item in read_weights(path).items()}


def matrices(stored: dict[str, Stored]) -> list[str]:
    return [name.removesuffix(".weight") for name, item in stored.items() if _is_matrix(name, item)]


def _is_matrix(name: str, item: Stored) -> bool:
    return name.endswith(".weight") and len(item.shape) == 2


def choices(kind: str, source: Path, family: Family) -> dict[str, Any]:
    if kind != "fp8 static":
        return METHODS[kind]
    layers = [layer for part in family.components for layer in matrices(weights(source / part))]
    return METHODS[kind] | {"input_scales": dict.fromkeys(layers, 0.5)}


def write_output(source: Path, out: Path, family: str, kind: str) -> Path:
    from families import FAMILIES  # imports torch, which many tests do without

    omni_convert.convert(source, out, **choices(kind, source, FAMILIES[family]))
    return out


def own_failures(result: Verification) -> list[Check]:
    """Checks that failed, without those of the engine's contract."""
    return [check for check in result.checks if not check.ok and not check.name.startswith(PREFIX)]


def stored(dtype: str, values: Any) -> Stored:
    """A tensor by the values of its elements; of BF16 and FP8, by their bits."""
    array = np.ascontiguousarray(values, _BYTES[dtype])
    return Stored(dtype, array.shape, array.tobytes())


def array(item: Stored) -> np.ndarray[Any, Any]:
    """The inverse of ``stored``, writable."""
    return np.frombuffer(item.data, _BYTES[item.dtype]).reshape(item.shape).copy()


class Output:
    """A copy of a conversion, to break."""

    def __init__(self, whole: Path, folder: Path) -> None:
        self.folder = shutil.copytree(whole, folder / "broken")

    @property
    def main(self) -> Path:
        """The folder of the transformer, or of the one model."""
        return self.folder / "transformer" if (self.folder / "transformer").is_dir() else self.folder

    def edit(self, name: str, change: Callable[[dict[str, Any]], object]) -> None:
        data = read_json(self.folder / name)
        change(data)
        write_json(self.folder / name, data)

    def config(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the main model's ``quantization_config``."""
        path = self.main / "config.json"
        data = read_json(path)
        change(data["quantization_config"])
        if "thinker_config" in data:
            data["thinker_config"]["text_config"]["quantization_config"] = data["quantization_config"]
        write_json(path, data)

    def tensors(self, change: Callable[[dict[str, Stored]], object]) -> None:
        """Change the main model's tensors; they end in one file."""
        found = weights(self.main)
        change(found)
        for path in self.main.glob("*.safetensors*"):
            path.unlink()
        bits = {name: Tensor(item.dtype, array(item)) for name, item in found.items()}
        write_weights(self.main / "diffusion_pytorch_model.safetensors", bits)

    def failed(self) -> dict[str, str]:
        """The rules that do not hold -> every problem, one a line."""
        checks = check_contract(self.folder)
        assert all(check.name.startswith(PREFIX) for check in checks)
        return {check.name.removeprefix(PREFIX): "\n".join(check.problems) for check in checks if not check.ok}
