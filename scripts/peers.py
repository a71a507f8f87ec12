"""Other libraries' quantization of one weight, each by its own public functions, in one shape that can be compared.

Every function takes a weight (N, K) in float32 or bfloat16 and returns ``Parts``. It imports its library itself, so
that the others work without it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from importlib import metadata
from typing import Any, NamedTuple

import torch
from demo_models import minilm_path

MATRIX = re.compile(r"encoder\.layer\.\d+\..*(query|key|value|dense)\.weight")
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
Block = tuple[int, int]


class Parts(NamedTuple):
    """Float32 (N, K): the values of the codes, and for every weight the scales that multiply it."""

    codes: torch.Tensor
    scales: tuple[torch.Tensor, ...]

    def dequantized(self) -> torch.Tensor:
        values = self.codes
        for scale in self.scales:
            values = values * scale
        return values


def version(package: str) -> str | None:
    """Of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the libraries' notices out of the table."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def minilm_matrices() -> dict[str, torch.Tensor]:
    """The encoder's linear weights by name, float32."""
    from safetensors.torch import load_file

    stored = load_file(minilm_path() / "model.safetensors")
    return {name: weight for name, weight in stored.items() if MATRIX.fullmatch(name)}


def expand(scale: torch.Tensor, block: Block, weight: torch.Tensor) -> torch.Tensor:
    """A scale for every block, in any shape with rows first -> float32 for every weight."""
    rows, columns = weight.shape
    grid = scale.to(torch.float32).reshape(-(-rows // block[0]), -(-columns // block[1]))
    return grid.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]


def power_of_two(byte: torch.Tensor) -> torch.Tensor:
    return torch.ldexp(torch.ones(byte.shape, dtype=torch.float64), byte.view(torch.uint8).int() - 127).float()


def unpack_e2m1(packed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Two codes to a byte, the even one low."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(weight.shape).long()
    return E2M1[codes & 7] * (1 - 2 * (codes >> 3))


def block_of(granularity: str, weight: torch.Tensor) -> Block:
    rows, columns = weight.shape
    return {"tensor": (rows, columns), "channel": (1, columns), "block": (128, 128)}[granularity]


def torchao_mx(weight: torch.Tensor, method: str, rule: str) -> Parts:
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx

    dtype = torch.float8_e4m3fn if method == "mxfp8" else torch.float4_e2m1fn_x2
    scale, codes = to_mx(weight.contiguous(), dtype, 32, ScaleCalculationMode(rule))
    values = codes.float() if method == "mxfp8" else unpack_e2m1(codes.view(torch.uint8), weight)
    return Parts(values, (expand(power_of_two(scale), (1, 32), weight),))


def torchao_int8(weight: torch.Tensor) -> Parts:
    """With the scale amax / 127; torchao's own configurations have amax / 127.5."""
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

    block = block_of("channel", weight)
    scale, zero = choose_qparams_affine(weight, MappingType.SYMMETRIC, block, torch.int8, -127, 127)
    codes = quantize_affine(weight, block, scale, zero, torch.int8, -127, 127)
    return Parts(codes.float(), (expand(scale, block, weight),))


def torchao_fp8(weight: torch.Tensor, granularity: str) -> Parts:
    from torchao.quantization.quant_primitives import _choose_scale_float8, _quantize_affine_float8

    block = block_of(granularity, weight)
    scale = _choose_scale_float8(weight, list(block))
    return Parts(_quantize_affine_float8(weight, scale).float(), (expand(scale, block, weight),))


def torchao_layer(weight: torch.Tensor, configuration: str) -> Parts:
    """A linear layer through ``quantize_`` with one of torchao's configurations, one scale for every row."""
    import torchao.quantization

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    torchao.quantization.quantize_(layer, getattr(torchao.quantization, configuration)())
    stored: Any = layer.weight
    return Parts(stored.qdata.float(), (expand(stored.scale, block_of("channel", weight), weight),))


def compressed_tensors(weight: torch.Tensor, bits: int, number: str, strategy: str, **more: Any) -> Parts:
    from compressed_tensors.quantization import QuantizationArgs, quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(num_bits=bits, type=number, strategy=strategy, **more)
    block = (1, args.group_size) if strategy == "group" else block_of(strategy, weight)
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % block[1], 0, -rows % block[0]))
    blocks = padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).transpose(1, 2)
    scale, _ = calculate_qparams(blocks.amin(dim=(2, 3)), blocks.amax(dim=(2, 3)), args)
    codes = quantize(padded, scale, None, args)[:rows, :columns]
    return Parts(codes.float(), (expand(scale, block, weight),))


def llm_compressor(weight: torch.Tensor, bits: int, number: str, strategy: str, observer: str, **more: Any) -> Parts:
    """compressed-tensors with a range chosen by one of llm-compressor's observers, such as memoryless_mse."""
    from compressed_tensors.quantization import QuantizationArgs, quantize
    from llmcompressor.observers import Observer

    args = QuantizationArgs(num_bits=bits, type=number, strategy=strategy, **more)
    observe = Observer.load_from_registry(observer, base_name="weight", args=args)
    scale = observe(weight).get_qparams()["scale"]
    block = (1, args.group_size) if strategy == "group" else block_of(strategy, weight)
    return Parts(quantize(weight, scale, None, args).float(), (expand(scale, block, weight),))


def compressed_tensors_mx(weight: torch.Tensor, method: str) -> Parts:
    bits = 8 if method == "mxfp8" else 4
    return compressed_tensors(weight, bits, "float", "group", group_size=32, scale_dtype=torch.uint8)


def compressed_tensors_dual(weight: torch.Tensor) -> Parts:
    """FP4 in groups of 512 for the coarse scale, MXFP4 of the quotients."""
    coarse = compressed_tensors(weight, 4, "float", "group", group_size=512).scales[0]
    fine = compressed_tensors_mx(weight / coarse, "mxfp4")
    return Parts(fine.codes, (*fine.scales, coarse))


def modelopt_mx(weight: torch.Tensor, method: str) -> Parts:
    from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor

    if method == "mxfp8":
        tensor, scale = MXFP8QTensor.quantize(weight)
        values = tensor._quantized_data.float()
    else:
        tensor, scale = MXFP4QTensor.quantize(weight, 32)
        values = unpack_e2m1(tensor._quantized_data, weight)
    return Parts(values, (expand(power_of_two(scale), (1, 32), weight),))


def modelopt(weight: torch.Tensor, method: str, granularity: str) -> Parts:
    from modelopt.torch.quantization.qtensor import FP8QTensor, INT8QTensor

    how: dict[str, dict[str, Any]] = {
        "tensor": {},
        "channel": {"axis": 0},
        "block": {"block_sizes": {-1: 128, -2: 128}},
    }
    library = INT8QTensor if method == "int8" else FP8QTensor
    tensor, scale = library.quantize(weight, **how[granularity])
    return Parts(tensor._quantized_data.float(), (expand(scale, block_of(granularity, weight), weight),))


def modelslim(weight: torch.Tensor, scheme: str, algorithm: str) -> Parts:
    """``scheme``: a name of msmodelslim.ir. MX scales are stored as exponents there."""
    import msmodelslim.ir as schemes
    from msmodelslim.core.quantizer.base import AutoWeightQuantizer, QConfig
    from msmodelslim.ir.qal import QDType, QStorage

    known = getattr(schemes, scheme)
    is_dual = scheme == "mxfp4_dual_scale_sym"
    more = {"axes": -1, "dual_block_size": 512} if is_dual else {"axes": -1}
    config = QConfig(dtype=known.dtype, scope=known.scope, symmetric=True, method=algorithm, ext=more)
    quantizer = AutoWeightQuantizer.from_config(config)
    quantizer.init_weight(QStorage(QDType.FLOAT, weight.clone()), None)
    codes = quantizer.get_q_storage().value.float()
    if scheme.startswith("fp8"):  # rounded when it is saved
        codes = codes.to(torch.float8_e4m3fn).float()
    found = quantizer.get_q_param().ext
    if not scheme.startswith("mx"):
        return Parts(codes, (expand(found["scale"], (1, weight.shape[1]), weight),))
    columns = -(-weight.shape[1] // 32)
    exponents = found["scale"].double().reshape(len(weight), -1)[:, :columns]
    scales = [expand(torch.exp2(exponents), (1, 32), weight)]
    if is_dual:
        scales.append(expand(found["dual_scale"], (1, 512), weight))
    return Parts(codes, tuple(scales))


def gguf_mxfp4(weight: torch.Tensor) -> Parts:
    """17 bytes to a block: the scale, then 16 bytes, each a weight of the first half (low) and of the second."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    stored = torch.from_numpy(quantize(weight.float().numpy(), GGMLQuantizationType.MXFP4)).reshape(-1, 17)
    codes = torch.cat([stored[:, 1:] & 15, stored[:, 1:] >> 4], dim=1).reshape(weight.shape).long()
    values = E2M1[codes & 7] * (1 - 2 * (codes >> 3))
    return Parts(values, (expand(power_of_two(stored[:, 0].contiguous()), (1, 32), weight),))


def autoround_mx(weight: torch.Tensor, method: str, kind: str) -> Parts:
    """``kind``: a name of auto-round's table, such as mx_fp4_rceil. It returns values and exponents."""
    from auto_round.data_type import QUANT_FUNC_WITH_DTYPE

    element = "mx_fp8" if method == "mxfp8" else "mx_fp4"
    values, exponent, _ = QUANT_FUNC_WITH_DTYPE[kind](
        weight.float(), bits=int(element[-1]), group_size=32, data_type=element
    )
    scale = expand(torch.exp2(exponent.double()), (1, 32), weight)
    return Parts(values / scale, (scale,))


def autoround_fp8(weight: torch.Tensor, granularity: str) -> Parts:
    from auto_round.data_type.fp8 import quant_block_fp_sym, quant_fp8_sym

    function, size = {
        "tensor": (quant_fp8_sym, 0),
        "channel": (quant_fp8_sym, -1),
        "block": (quant_block_fp_sym, (128, 128)),
    }[granularity]
    values, scale, _ = function(weight, group_size=size)
    scales = expand(scale, block_of(granularity, weight), weight)
    return Parts((values.float() / scales).to(torch.float8_e4m3fn).float(), (scales,))


def autoround_int8(weight: torch.Tensor) -> Parts:
    """Its data-free search, in float32 as its pipeline does; a scale's sign lets the largest weight be code -128."""
    from auto_round.data_type.int import quant_tensor_opt_rtn_sym

    values, scale, _ = quant_tensor_opt_rtn_sym(weight.float(), bits=8, group_size=-1)
    scales = expand(scale, block_of("channel", weight), weight)
    return Parts((values / scales).round(), (scales,))


def sdnq(weight: torch.Tensor, method: str, granularity: str) -> Parts:
    from sdnq.quant_utils import quantize_weight

    dtype = "int8" if method == "int8" else "float8_e4m3fn"
    codes, scale, _ = quantize_weight(weight, None if granularity == "tensor" else 1, dtype)
    return Parts(codes.float(), (expand(scale, block_of(granularity, weight), weight),))
