"""Start vLLM-Omni's own code on converted folders, and compare the weights that it would run with the original ones.

    python3 -m venv vo && vo/bin/pip install torch==2.13.0 -e '.[quickstart,test]'
    vo/bin/pip install --no-deps vllm==0.30.0 vllm-omni==0.30.0 diffusers==0.40.0 transformers==5.13.0 \\
        torchvision==0.28.0   # and what their imports ask for, also --no-deps: none of it needs CUDA
    PYTHONPATH=src:tests vo/bin/python scripts/check_vllm_omni.py

Without arguments: every small model of ``tests/families.py`` with every method of ``tests/test_targets.py`` that loads.
With two folders: a converted one against the one that it was converted from, in memory. Exits 1 on any problem.

Executed: the engine's reading of config.json, its pipeline and model classes, its loader with its strict check, and
what it makes of the weights afterwards (int8 on CUDA and on an NPU). Stubbed: see ``vllm_omni_engine``. The reference
is the original folder, loaded by the same code: the engine itself says which weight becomes which parameter.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import vllm_omni_engine as engine
import vllm_omni_models as models
import vllm_omni_stages as stages
from conversions import METHODS, choices
from families import FAMILIES, Family
from hostile.small import read_weights
from test_targets import CASES

import omni_convert

LARGEST_ERROR = {"int8": 0.05, "fp8": 0.05, "mxfp8": 0.05, "mxfp4": 0.2, "mxfp4_dualscale": 0.2}
PLATFORMS = {"int8": ("cuda", "npu"), "fp8": ("cuda",)}
NPU = ("npu",)
INPUT_SCALE = 0.5  # in every folder of ``test_targets``


def _e8m0(scale: torch.Tensor, rows: int) -> torch.Tensor:
    """Powers of two from bytes, one row of groups per output."""
    return torch.exp2(scale.reshape(rows, -1).float() - 127)


def _grouped(weight: torch.Tensor, scales: torch.Tensor, group: int) -> torch.Tensor:
    return weight * scales.repeat_interleave(group, 1)[:, : weight.shape[1]]


def _fp8(layer: Any) -> torch.Tensor:
    weight = layer.weight.float()
    blocks = getattr(layer, "weight_block_size", None)
    if blocks is None:
        return weight.t() * layer.weight_scale.float().reshape(-1, 1)
    scales = getattr(layer, "weight_scale_inv", None)
    scales = (layer.weight_scale if scales is None else scales).float()
    for axis, size in enumerate(blocks):
        scales = scales.repeat_interleave(size, axis)
    return weight * scales[: weight.shape[0], : weight.shape[1]]


def _mxfp8(layer: Any) -> torch.Tensor:
    weight = layer.weight.float().t()
    return _grouped(weight, _e8m0(layer.weight_scale.transpose(0, 1), len(weight)), 32)


def _mxfp4(layer: Any) -> torch.Tensor:
    weight = layer.weight.float()
    return _grouped(weight, _e8m0(layer.weight_scale, len(weight)), 32) * layer.mul_scale.float()


def _dual(layer: Any) -> torch.Tensor:
    weight = layer.weight.view(torch.bfloat16).float()
    fine = _grouped(weight, _e8m0(layer.weight_scale, len(weight)), 32)
    return _grouped(fine, layer.weight_dual_scale.t(), 512) * layer.mul_scale.float()


def _experts(layer: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("w13", "w2"):
        weight = getattr(layer, f"{name}_weight").float()
        scales = getattr(layer, f"{name}_{layer.quant_method.weight_scale_name}").float()
        if layer.quant_method.block_quant:
            for axis, size in enumerate(layer.quant_method.moe_block_shape, 1):
                scales = scales.repeat_interleave(size, axis)
            found[f"{name}_weight"] = weight * scales[:, : weight.shape[1], : weight.shape[2]]
        else:
            found[f"{name}_weight"] = weight * scales.reshape(len(weight), -1, 1)
    return found


def _linear(dequantize: Callable[[Any], torch.Tensor]) -> Callable[[Any], dict[str, torch.Tensor]]:
    return lambda layer: {"weight": dequantize(layer)}


DEQUANTIZE: Mapping[str, Callable[[Any], dict[str, torch.Tensor]]] = {
    "Int8LinearMethod": _linear(lambda layer: layer.weight.float().t() * layer.weight_scale.reshape(-1, 1)),
    "NPUInt8LinearMethod": _linear(lambda layer: layer.weight.float().t() * layer.weight_scale.reshape(-1, 1)),
    "Fp8LinearMethod": _linear(_fp8),
    "Fp8MoEMethod": _experts,
    "ModelOptLinearMethod": _linear(_fp8),
    "NPUMxfp8LinearMethod": _linear(_mxfp8),
    "NPUMxfp4LinearMethod": _linear(_mxfp4),
    "NPUMxfp4DualScaleLinearMethod": _linear(_dual),
}


def compare(
    reference: torch.nn.Module, started: engine.Started, stored: set[str], largest: float, input_scale: float | None
) -> Iterator[str]:
    """Every problem. ``stored``: the folder's quantized layers."""
    yield from started.warnings
    before = {**dict(reference.named_parameters()), **dict(reference.named_buffers())}
    handled: set[str] = set()
    for name, layer in started.pipeline.named_modules():
        method = type(getattr(layer, "quant_method", None)).__name__
        if method not in DEQUANTIZE:
            if "Unquantized" not in method and "KVCache" not in method and method not in ("NoneType", "MagicMock"):
                yield f"{name}: no check for {method}"
            continue
        handled |= {f"{name}.{own}" for own, _ in layer.named_parameters(recurse=False)} - {f"{name}.bias"}
        for own, weight in DEQUANTIZE[method](layer).items():
            original = before[f"{name}.{own}"].float()
            error = ((weight - original).square().mean() / original.square().mean()).sqrt().item()
            if not error <= largest:
                yield f"{name}: {error:.1%} off"
        for own in ("input_scale", "w13_input_scale", "w2_input_scale"):
            scale = getattr(layer, own, None)
            if scale is not None and input_scale is not None and not (scale == input_scale).all():
                yield f"{name}: {own} is {scale.tolist()}"
    after = {**dict(started.pipeline.named_parameters()), **dict(started.pipeline.named_buffers())}
    for name, value in after.items():
        if name not in handled and not (name in before and _same(value, before[name])):
            yield f"{name}: unquantized, and not as it was"
    if not handled:
        yield "nothing is quantized"
    yield from (f"{name}: not read" for name in started.unread if name.rpartition(".")[0] in stored)


def _same(value: torch.Tensor, other: torch.Tensor) -> bool:
    return value.dtype == other.dtype and value.shape == other.shape and torch.equal(value, other)


def stored_layers(folder: Path) -> set[str]:
    """Layers with scales, below the name of their component as the loader hands them out."""
    tensors = (
        (path.parent.relative_to(folder), name) for path in folder.rglob("*.safetensors") for name in read_weights(path)
    )
    return {
        ".".join([*part.parts, name.rpartition(".")[0]]) for part, name in tensors if name.rpartition(".")[2] != "bias"
        and "scale" in name.rpartition(".")[2]
    }  # fmt: skip


def _start(name: str, folder: Path, platform: str = "cuda") -> engine.Started:
    return stages.start(folder, name) if name in stages.STAGES else engine.start(folder, platform)


def check(
    name: str, converted: Path, reference: torch.nn.Module, method: str, input_scale: float | None = None
) -> tuple[int, list[str]]:
    """How many of the engine's layers are quantized, and all problems on all platforms."""
    problems, layers = [], 0
    for platform in PLATFORMS.get(method, NPU):
        try:
            started = _start(name, converted, platform)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            problems.append(f"{platform}: {type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})")
            continue
        found = compare(reference, started, stored_layers(converted), LARGEST_ERROR[method], input_scale)
        problems += [f"{platform}: {problem}" for problem in found]
        methods = [type(getattr(layer, "quant_method", None)).__name__ for layer in started.pipeline.modules()]
        layers = sum(name in DEQUANTIZE for name in methods)
    return layers, problems


def write_encoder(folder: Path, name: str) -> None:
    """The text encoders that the engine builds with the transformer's config, in small."""
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 32}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    model: Any
    if name == "Z-Image":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))
    elif name == "FLUX.2-dev":
        vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = {"model_type": "mistral", **sizes}
        config = transformers.Mistral3Config(
            text_config=text, vision_config={"model_type": "pixtral", **vision}, tie_word_embeddings=False
        )
        model = transformers.Mistral3ForConditionalGeneration(config)
    else:
        return
    for path in (folder / "text_encoder").iterdir():
        path.unlink()
    model.to(torch.bfloat16).save_pretrained(folder / "text_encoder")


def check_family(family: Family, folder: Path, kinds: list[str]) -> Iterator[tuple[str, int, list[str]]]:
    source = folder / "source"
    if family.name in models.FILES:
        models.write_configs(source, family.name)
        models.write_weights(source, family.name, engine.shapes(source))
    else:
        family.write(source)
        write_encoder(source, family.name)
    if family.name in stages.STAGES:
        stages.complete(source, family.name)
    reference = _start(family.name, source).pipeline
    for kind in kinds:
        out = folder / kind.replace(" ", "_")
        omni_convert.convert(source, out, **choices(kind, source, family))
        yield kind, *check(family.name, out, reference, METHODS[kind]["method"], INPUT_SCALE)


def rows(names: Iterable[str]) -> Iterator[tuple[str, str, int, list[str]]]:
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                for row in check_family(FAMILIES[name], Path(folder), [kind for own, kind in CASES if own == name]):
                    yield name, *row
            except Exception:
                yield name, "", 0, [traceback.format_exc(limit=-2).replace("\n", " ")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="the original and the converted one")
    parser.add_argument("--method", choices=LARGEST_ERROR, help="of the converted folder")
    parser.add_argument("--family", action="append", choices=FAMILIES, metavar="NAME", help="only these families")
    args = parser.parse_args()
    if args.folders and (len(args.folders) != 2 or args.method is None):
        parser.error("expected two folders, the original and the converted one, and --method")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills parameters that nothing is loaded into with NaN
    found = rows(args.family or FAMILIES)
    if args.folders:
        source, converted = args.folders
        name = stages.name_of(source) or source.name
        found = iter([(name, args.method, *check(name, converted, _start(name, source).pipeline, args.method))])
    print("| model | method | quantized | result |\n|---|---|---|---|")
    failed = 0
    for name, kind, layers, problems in found:
        failed += bool(problems)
        shown = problems[:4] + [f"{len(problems) - 4} more"] * (len(problems) > 4)
        print(f"| {name} | {kind} | {layers} | {'; '.join(shown) or 'ok'} |", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
