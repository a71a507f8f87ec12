"""Convert a checkpoint with other libraries, as their documentation shows it; ``bench_convert.py`` measures this.

    python scripts/bench_peers.py                                        list what is installed here, as JSON
    python scripts/bench_peers.py --imports 'llm-compressor fp8 channel' import the library only
    python scripts/bench_peers.py 'llm-compressor fp8 channel' MODEL OUT

It imports nothing of omni-convert, so that any Python that has the libraries can run it. All work on the CPU with as
many threads as they like, without calibration data, on the same layers: every matrix of MODEL.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple


class Peer(NamedTuple):
    """A distribution, and what converts a folder into another with it, which imports ``module`` itself."""

    package: str
    module: str
    convert: Callable[[Path, Path], None]


def llm_compressor(model: Path, out: Path, choice: str) -> None:
    from llmcompressor import model_free_ptq

    model_free_ptq(model_stub=str(model), save_directory=str(out), scheme=choice, device="cpu")


def quark(model: Path, out: Path, choice: str) -> None:
    from quark.torch import LLMTemplate, ModelQuantizer

    template = LLMTemplate(model_type="bench", kv_layers_name=[], q_layer_name="", exclude_layers_name=[])
    quantizer = ModelQuantizer(template.get_config(scheme=choice))
    quantizer.direct_quantize_checkpoint(pretrained_model_path=str(model), save_path=str(out), device="cpu")


def auto_round(model: Path, out: Path, choice: str) -> None:
    """Round to nearest; without ``quant_nontext_module`` it leaves out layers with ``img`` in their names."""
    from auto_round.compressors.model_free import ModelFreeCompressor

    ModelFreeCompressor(str(model), str(out), scheme=choice, quant_nontext_module=True, disable_opt_rtn=True).run()


def torchao(model: Path, out: Path, choice: str) -> None:
    """A live model of ``torch.nn.Linear``: load, ``quantize_``, save."""
    import torch
    import torchao.quantization
    from safetensors.torch import load_file, save_file
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    live = torch.nn.Module()
    for path in sorted(model.glob("*.safetensors")):
        for name, weight in load_file(path).items():
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            live.add_module(name.removesuffix(".weight").replace(".", "_"), layer)
    torchao.quantization.quantize_(live, getattr(torchao.quantization, choice)())
    tensors, header = flatten_tensor_state_dict(live.state_dict())
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata=header)


LIBRARIES: Sequence[tuple[str, str, str, Callable[[Path, Path, str], None], Mapping[str, str]]] = (
    (
        "llm-compressor",
        "llmcompressor",
        "llmcompressor",
        llm_compressor,
        {"int8": "INT8", "fp8 channel": "FP8_DYNAMIC", "fp8 block": "FP8_BLOCK", "mxfp8": "MXFP8", "mxfp4": "MXFP4"},
    ),
    (
        "Quark",
        "amd-quark",
        "quark.torch",
        quark,
        {"int8": "int8", "fp8": "fp8", "fp8 channel": "ptpc_fp8", "mxfp4": "mxfp4"},
    ),
    (
        "auto-round",
        "auto-round",
        "auto_round.compressors.model_free",
        auto_round,
        {"int8": "W8A16", "mxfp8": "MXFP8", "mxfp4": "MXFP4"},
    ),
    (
        "torchao",
        "torchao",
        "torchao.quantization",
        torchao,
        {"int8": "Int8WeightOnlyConfig", "fp8 channel": "Float8WeightOnlyConfig"},
    ),
)
PEERS: Mapping[str, Peer] = {
    f"{name} {kind}": Peer(package, module, partial(convert, choice=choice))
    for name, package, module, convert, choices in LIBRARIES
    for kind, choice in choices.items()
}
"""Library and what our name for the method is -> how to have it."""


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main() -> None:
    if len(sys.argv) == 1:
        print(json.dumps({name: version(peer.package) for name, peer in PEERS.items()}))
        return
    if sys.argv[1] == "--imports":
        importlib.import_module(PEERS[sys.argv[2]].module)
        return
    name, model, out = sys.argv[1:]
    PEERS[name].convert(Path(model), Path(out))


if __name__ == "__main__":
    main()
