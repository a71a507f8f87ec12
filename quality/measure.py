"""Every quantized layer beside its source, measured anew: what a conversion gathers while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from omni_convert.converter.checkpoint import open_checkpoint
from omni_convert.converter.compare import compared_rows
from omni_convert.converter.files import processors
from omni_convert.converter.layer_error import LayerError
from omni_convert.converter.statistics import layer_statistics, sample_rows, sample_step
from omni_convert.converter.verify import check_source
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.header import Header, StoredTensor
from omni_convert.quality.codes import Codes


def measure(
    source: Path,
    recorded: Mapping[str, Any],
    codes: Mapping[str, Mapping[str, Codes]],
    progress: Callable[[int], object],
) -> dict[tuple[str, str], LayerError]:
    """The error of every layer, with statistics, in one pass over the source's weights.

    Args:
        recorded: what the manifest says of the source.
        codes: component -> layer -> its codes.
        progress: receives the bytes of the source that are done.

    Raises:
        OmniConvertError: ``source`` is not the model that was converted.
    """
    check = check_source(source, recorded)
    if not check.ok:
        raise OmniConvertError(f"{check.problems[0]} Name the model that was converted with --source.")
    found: dict[tuple[str, str], LayerError] = {}
    names = tuple(name for name in codes if name)
    with ThreadPoolExecutor(processors()) as pool:
        for component in open_checkpoint(source, names).components:
            layers = codes[component.name]
            originals = [
                (layer, tensor, shard)
                for name, tensor, shard in component.tensors()
                if name.endswith(".weight") and (layer := name.removesuffix(".weight")) in layers
            ]
            tasks = {layer: pool.submit(_measure, tensor, shard, layers[layer]) for layer, tensor, shard in originals}
            for layer, tensor, _ in originals:
                found[component.name, layer] = tasks[layer].result()
                progress(tensor.spec.nbytes)
    return found


def _measure(tensor: StoredTensor, shard: Header, codes: Codes) -> LayerError:
    shape = tensor.spec.shape
    power = np.empty((shape[0], 2))
    sample = np.empty((len(sample_rows(shape)), shape[1]), np.float32)
    step = sample_step(shape)
    for start, weight, error, _ in compared_rows(tensor, shard, codes.parts, codes.format):
        stop = start + len(weight)
        power[start:stop, 0] = np.einsum("nk,nk->n", weight, weight, dtype=np.float64)
        power[start:stop, 1] = np.einsum("nk,nk->n", error, error, dtype=np.float64)
        sample[-(-start // step) : -(-stop // step)] = weight[-start % step :: step]
    signal, noise = power.sum(axis=0).tolist()
    return LayerError(signal=signal, noise=noise, statistics=layer_statistics(power, sample))
