"""The module: an ``nn.Linear`` to everyone who looks, INT8 to everyone who casts, copies, saves or compiles it."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn

from omni_convert.formats.int8 import Int8
from omni_convert.runtime import cpu
from omni_convert.runtime.kernels import select_kernel
from omni_convert.runtime.linear import Int8Linear
from omni_convert.runtime.reference import dequantized_linear, reference_linear


def make_layer(rows: int = 24, columns: int = 40, bias: bool = True, seed: int = 0) -> Int8Linear:
    torch.manual_seed(seed)
    layer = Int8Linear(columns, rows, bias=bias, dtype=torch.bfloat16)
    tensors = Int8().quantize(torch.randn(rows, columns))
    layer.load_state_dict({**tensors, **({"bias": torch.randn(rows).bfloat16()} if bias else {})})
    return layer


def expected(layer: Int8Linear, x: torch.Tensor) -> torch.Tensor:
    """What the layer must return, to the bit."""
    operands = (x.reshape(-1, x.shape[-1]), layer.weight, layer.weight_scale, layer.bias)
    if select_kernel("int8", "cpu", (layer.out_features, layer.in_features)).kernel == "dequantize":
        y = dequantized_linear(*operands, layer._handle)  # a CPU whose integer kernels saturate
    else:
        y = reference_linear(*operands)
    return y.reshape(*x.shape[:-1], layer.out_features)


@pytest.fixture
def layer() -> Int8Linear:
    return make_layer()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 40, generator=torch.Generator().manual_seed(2)).bfloat16()


@pytest.mark.parametrize("shape", [(40,), (0, 40), (3, 40), (2, 3, 40), (2, 0, 3, 40), (1, 1, 1, 1, 40)])
@pytest.mark.parametrize("bias", [False, True])
def test_any_leading_dimensions(shape: tuple[int, ...], bias: bool) -> None:
    layer = make_layer(bias=bias)
    x = torch.randn(shape).bfloat16()
    found = layer(x)
    assert found.shape == (*shape[:-1], 24)
    assert torch.equal(found, expected(layer, x))


def test_non_contiguous_input(layer: Int8Linear) -> None:
    x = torch.randn(40, 7, 3).bfloat16().permute(2, 1, 0)
    assert torch.equal(layer(x), expected(layer, x.contiguous()))


def test_is_a_linear_and_says_what_it_is(layer: Int8Linear) -> None:
    assert isinstance(layer, nn.Linear)
    assert "in_features=40, out_features=24, bias=True, format=int8, kernel=" in repr(layer)
    assert "kernel=undecided" in repr(Int8Linear(8, 4, device="meta"))
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert not layer.weight.requires_grad
    assert layer.state_dict().keys() == {"weight", "weight_scale", "bias"}


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.float16), lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double(),
        lambda m: m.type(torch.float16), lambda m: m.to("cpu", torch.float16),
    ],
)  # fmt: skip
def test_casting_leaves_codes_and_scale_alone(layer: Int8Linear, x: torch.Tensor, cast: object) -> None:
    weight, scale, before = layer.weight.clone(), layer.weight_scale.clone(), layer(x)
    model = nn.Sequential(layer)
    cast(model)  # type: ignore[operator]
    assert layer.weight.dtype == torch.int8
    assert layer.weight_scale.dtype == torch.float32
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.weight_scale, scale)
    assert layer.bias.dtype in (torch.float16, torch.bfloat16, torch.float64)
    assert torch.allclose(layer(x).float(), before.float(), rtol=0.02, atol=0.02)


def test_meta_and_back() -> None:
    layer = Int8Linear(8, 4, device="meta", dtype=torch.bfloat16).to(torch.float16)
    assert (layer.weight.dtype, layer.weight_scale.dtype, layer.bias.dtype) == (
        torch.int8, torch.float32, torch.float16,
    )  # fmt: skip
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(make_layer(4, 8).state_dict())
    assert layer(torch.ones(2, 8)).shape == (2, 4)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(layer: Int8Linear, x: torch.Tensor, duplicate: object) -> None:
    before = layer(x)
    other: Int8Linear = duplicate(layer)  # type: ignore[operator]
    assert torch.equal(other(x), before)
    assert int(other._handle) != int(layer._handle)  # or each call would pack the weight again
    with torch.no_grad():
        other.weight.neg_()
    assert torch.equal(other(x), expected(other, x))
    assert torch.equal(layer(x), before)
    del other
    gc.collect()
    assert torch.equal(layer(x), before)


def test_whole_module_can_be_saved(layer: Int8Linear, x: torch.Tensor) -> None:
    before, buffer = layer(x), io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), before)


def test_new_weights_are_noticed(layer: Int8Linear, x: torch.Tensor) -> None:
    layer(x)
    other = make_layer(seed=1)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    layer.weight.data = -layer.weight.data
    assert torch.equal(layer(x), expected(layer, x))
    layer.weight = nn.Parameter(other.weight.clone(), requires_grad=False)
    assert torch.equal(layer(x), other(x))
    with torch.inference_mode():
        layer(x)
    layer.load_state_dict(make_layer(seed=3).state_dict(), assign=True)
    assert torch.equal(layer(x), make_layer(seed=3)(x))


def test_packed_weight_is_built_once_and_freed(x: torch.Tensor) -> None:
    if cpu.refuse_onednn((24, 40)) is not None:
        pytest.skip("no packed weights on this CPU")
    layer = make_layer()
    number = int(layer._handle)
    assert number not in cpu._PACKS
    layer(x)
    packed = cpu._PACKS[number]
    layer(x)
    with torch.inference_mode():
        layer(x)
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert cpu._PACKS[number] is packed
    layer.to(torch.float16)
    assert number not in cpu._PACKS
    layer(x)
    del layer
    gc.collect()
    assert number not in cpu._PACKS


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.ones(24, 40)}, "without its companion"),
        ({"weight_scale": torch.ones(24, 1)}, "without its companion"),
        ({"weight": torch.ones(24, 40), "weight_scale": torch.ones(24, 1)}, "weight is torch.float32, expected"),
        (
            {"weight": torch.ones(24, 40, dtype=torch.int8), "weight_scale": torch.ones(24, 1).bfloat16()},
            "weight_scale is torch.bfloat16, expected",
        ),
    ],
)
def test_wrong_state_is_refused(layer: Int8Linear, state: dict[str, torch.Tensor], message: str) -> None:
    weight = layer.weight.clone()
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state, strict=False)
    assert torch.equal(layer.weight, weight)


def test_gradient_is_that_of_the_dequantized_layer(layer: Int8Linear, x: torch.Tensor) -> None:
    plain = nn.Linear(40, 24)
    plain.load_state_dict({"weight": layer.weight.float() * layer.weight_scale, "bias": layer.bias})
    layer.float()
    inputs = [x.float().reshape(1, 5, 40).requires_grad_() for _ in range(2)]
    for module, value in zip((layer, plain), inputs, strict=True):
        module(value).square().sum().backward()
    for a, b in ((inputs[0].grad, inputs[1].grad), (layer.bias.grad, plain.bias.grad)):
        assert a is not None
        assert b is not None
        assert (a - b).norm() / b.norm() < 0.02
    assert layer.weight.grad is None


def test_compiles_once_for_many_layers(x: torch.Tensor) -> None:
    class Block(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.first, self.second = make_layer(40, 40, seed=seed), make_layer(40, 40, seed=seed + 100)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.silu(self.second(self.first(x))) + x

    torch._dynamo.reset()
    blocks = [Block(seed) for seed in range(3)]
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        for block in blocks:
            assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


def test_compiles_with_inductor(layer: Int8Linear, x: torch.Tensor) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
        assert torch.equal(compiled(x[:3]), layer(x[:3]))
