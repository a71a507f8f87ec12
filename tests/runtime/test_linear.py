"""The module: an ``nn.Linear`` to everyone who looks, quantized to everyone who casts, copies, saves or compiles it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kinds import KINDS
from loaded import expected_output
from quantized import as_bytes
from torch import nn

from omni_convert.formats import format_label
from omni_convert.formats.base import Facts, Format
from omni_convert.formats.errors import OmniConvertError
from omni_convert.runtime import cpu, prepared
from omni_convert.runtime.linear import QuantizedLinear
from omni_convert.runtime.reference import reference_linear

INT8 = KINDS["int8"]
every = pytest.mark.parametrize("fmt", KINDS.values(), ids=KINDS)


def quantized(fmt: Format, rows: int, columns: int) -> dict[str, torch.Tensor]:
    tensors = fmt.quantize(torch.randn(rows, columns), Facts(input_scale=0.25))
    return tensors | ({"mul_scale": torch.randn(columns).bfloat16().float()} if "mul_scale" in tensors else {})


def make_layer(
    fmt: Format = INT8, rows: int = 24, columns: int = 64, bias: bool = True, seed: int = 0
) -> QuantizedLinear:
    torch.manual_seed(seed)
    layer = QuantizedLinear(columns, rows, bias=bias, dtype=torch.bfloat16, fmt=fmt)
    layer.load_state_dict(quantized(fmt, rows, columns) | ({"bias": torch.randn(rows).bfloat16()} if bias else {}))
    return layer


def expected(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """What the layer must return, to the bit."""
    if "kernel=decode" in repr(layer):  # also for int8, on a CPU whose integer kernels saturate
        return expected_output(layer, x)
    y = reference_linear(x.reshape(-1, x.shape[-1]), layer.weight, layer.weight_scale, layer.bias)
    return y.reshape(*x.shape[:-1], layer.out_features)


def flipped(weight: torch.Tensor) -> torch.Tensor:
    """Other codes."""
    return weight.detach().view(torch.uint8).flip(0).view(weight.dtype)


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def layer(request: pytest.FixtureRequest) -> QuantizedLinear:
    return make_layer(request.param)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).bfloat16()


@pytest.mark.parametrize("shape", [(64,), (0, 64), (3, 64), (2, 3, 64), (2, 0, 3, 64), (1, 1, 1, 1, 64)])
@pytest.mark.parametrize("bias", [False, True])
@every
def test_any_leading_dimensions(shape: tuple[int, ...], bias: bool, fmt: Format) -> None:
    layer = make_layer(fmt, bias=bias)
    x = torch.randn(shape).bfloat16()
    found = layer(x)
    assert found.shape == (*shape[:-1], 24)
    assert torch.equal(found, expected(layer, x))


def test_non_contiguous_input(layer: QuantizedLinear) -> None:
    x = torch.randn(64, 7, 3).bfloat16().permute(2, 1, 0)
    assert torch.equal(layer(x), expected(layer, x.contiguous()))


def test_is_a_linear_and_says_what_it_is(layer: QuantizedLinear) -> None:
    assert isinstance(layer, nn.Linear)
    text = f"in_features=64, out_features=24, bias=True, format={format_label(layer.format)}, kernel="
    assert text in repr(layer)
    assert layer.format == INT8 or "kernel=decode" in repr(layer)
    assert "kernel=undecided" in repr(layer.to("meta"))
    assert [name for name, _ in layer.named_parameters()] == ["bias", "weight"]
    assert (layer.weight.dtype, layer.weight.requires_grad) == (torch.int8, False)
    assert layer.state_dict().keys() == {*layer.format.suffixes, "bias"}
    assert tuple(layer.tensors()) == tuple(layer.format.suffixes)
    for suffix, tensor in layer.tensors().items():
        assert (tensor.dtype, tensor.shape) == layer.stored_tensors()[suffix]
        assert tensor.data_ptr() == getattr(layer, suffix).data_ptr()
    assert nn.Sequential(layer).state_dict().keys() == {f"0.{name}" for name in layer.state_dict()}


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.float16), lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double(),
        lambda m: m.type(torch.float16), lambda m: m.to("cpu", torch.float16),
    ],
)  # fmt: skip
def test_casting_leaves_codes_and_scale_alone(layer: QuantizedLinear, x: torch.Tensor, cast: object) -> None:
    held = {name: tensor.clone() for name, tensor in layer.state_dict().items() if name != "bias"}
    before = layer(x)
    model = nn.Sequential(layer)
    cast(model)  # type: ignore[operator]
    for name, tensor in held.items():
        assert layer.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(as_bytes(layer.state_dict()[name]), as_bytes(tensor))
    assert isinstance(layer.weight, nn.Parameter)
    assert not layer.weight.requires_grad
    assert layer.bias.dtype in (torch.float16, torch.bfloat16, torch.float64)
    assert torch.allclose(layer(x).float(), before.float(), rtol=0.02, atol=0.02)


def test_codes_are_not_cast_in_vain(layer: QuantizedLinear) -> None:
    """Libraries cast what is floating-point; of a large model that takes long, and memory."""
    seen: list[torch.dtype] = []
    layer._apply(lambda tensor: (seen.append(tensor.dtype), tensor)[1])
    assert torch.float8_e4m3fn not in seen
    assert len(seen) == len(layer.state_dict())


@every
def test_meta_and_back(fmt: Format) -> None:
    layer = QuantizedLinear(64, 24, device="meta", dtype=torch.bfloat16, fmt=fmt).to(torch.float16)
    full = make_layer(fmt)
    for name, tensor in full.state_dict().items():
        found = layer.state_dict()[name]
        assert (found.dtype, found.shape) == (torch.float16 if name == "bias" else tensor.dtype, tensor.shape)
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(full.state_dict())
    x = torch.ones(2, 64)
    assert torch.allclose(layer(x), full(x), rtol=0.01)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(layer: QuantizedLinear, x: torch.Tensor, duplicate: object) -> None:
    before = layer(x)
    other: QuantizedLinear = duplicate(layer)  # type: ignore[operator]
    assert torch.equal(other(x), before)
    assert int(other._handle) != int(layer._handle)  # or each call would pack the weight again
    with torch.no_grad():
        other.weight.copy_(flipped(other.weight))
    assert torch.equal(other(x), expected(other, x))
    assert torch.equal(layer(x), before)
    del other
    gc.collect()
    assert torch.equal(layer(x), before)


def test_what_is_prepared_from_codes_follows_the_bytes_that_are_held() -> None:
    held, made = torch.zeros(4, 4, dtype=torch.int8), []
    handle = prepared.new_handle(held)

    def prepare() -> int:
        codes = prepared.reinterpreted(held, torch.float8_e4m3fn)
        assert codes.data_ptr() == held.data_ptr()
        prepared.prepared(handle, [codes], lambda: made.append(codes))
        return len(made)

    assert [prepare(), prepare(), torch.inference_mode()(prepare)()] == [1, 1, 1]
    held.add_(1)
    assert [torch.inference_mode()(prepare)(), prepare()] == [2, 2]


def test_whole_module_can_be_saved(layer: QuantizedLinear, x: torch.Tensor) -> None:
    before, buffer = layer(x), io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), before)


def test_new_weights_are_noticed(layer: QuantizedLinear, x: torch.Tensor) -> None:
    layer(x)
    other = make_layer(layer.format, seed=1)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    with torch.no_grad():
        layer.weight.copy_(flipped(layer.weight))
    assert torch.equal(layer(x), expected(layer, x))
    layer.weight.data.copy_(other.weight)
    layer.to("cpu")  # past all versions: nothing shows that, but moving makes anew what was prepared
    assert torch.equal(layer(x), other(x))
    layer.weight.data = flipped(layer.weight)
    assert torch.equal(layer(x), expected(layer, x))
    layer.weight = nn.Parameter(other.weight.clone(), requires_grad=False)
    assert torch.equal(layer(x), other(x))
    neighbours = torch.stack([other.weight, flipped(other.weight)])  # in one storage
    for codes in neighbours:
        layer.weight = nn.Parameter(codes, requires_grad=False)
        assert torch.equal(layer(x), expected(layer, x))
    layer.weight = nn.Parameter(flipped(other.tensors()["weight"]), requires_grad=False)
    assert (layer.weight.dtype, layer.weight.requires_grad) == (torch.int8, False)
    assert torch.equal(layer(x), expected(layer, x))
    with torch.inference_mode():
        layer(x)
    layer.load_state_dict(make_layer(layer.format, seed=3).state_dict(), assign=True)
    assert torch.equal(layer(x), make_layer(layer.format, seed=3)(x))


def test_packed_weight_is_built_once_and_freed(x: torch.Tensor) -> None:
    if cpu.refuse_onednn((24, 64)) is not None:
        pytest.skip("no packed weights on this CPU")
    layer = make_layer()
    number = int(layer._handle)
    assert number not in prepared._TABLE
    layer(x)
    packed = prepared._TABLE[number]
    layer(x)
    with torch.inference_mode():
        layer(x)
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert prepared._TABLE[number] is packed
    layer.to(torch.float16)
    assert number not in prepared._TABLE
    layer(x)
    del layer
    gc.collect()
    assert number not in prepared._TABLE


@torch.inference_mode()
def test_new_weights_are_noticed_in_inference_mode(layer: QuantizedLinear, x: torch.Tensor) -> None:
    """Where tensors have no versions."""
    first = make_layer(layer.format)
    second = copy.deepcopy(first)
    assert torch.equal(first(x), second(x))
    other = make_layer(layer.format, seed=1)
    second.load_state_dict(other.state_dict())
    assert torch.equal(second(x), other(x))
    assert torch.equal(first(x), layer(x))


def test_threads_prepare_once_and_what_lost_its_source_is_freed() -> None:
    made: list[int] = []
    owners = [nn.Identity() for _ in range(3)]
    handles = [prepared.new_handle(owner) for owner in owners]
    numbers = {int(handle) for handle in handles}
    tensor = torch.zeros(4)

    def make() -> int:
        time.sleep(0.05)
        made.append(1)
        return len(made)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: prepared.prepared(handles[0], [tensor], make), range(8)))
    assert (results, made) == ([1] * 8, [1])
    prepared.prepared(handles[1], [torch.zeros(4)], make)
    assert prepared._TABLE.keys() & numbers == {int(handles[0]), int(handles[1])}
    prepared.prepared(handles[2], [tensor], make)
    assert prepared._TABLE.keys() & numbers == {int(handles[0]), int(handles[2])}
    owners.clear()
    gc.collect()
    assert not (prepared._TABLE.keys() | prepared._LOCKS.keys()) & numbers


@pytest.mark.parametrize("assign", [False, True])
def test_state_comes_from_disk_or_from_another_layer(layer: QuantizedLinear, assign: bool) -> None:
    """On disk codes have the dtype of the format, in ``state_dict`` that in which they are held."""
    other = make_layer(layer.format, seed=1)
    for codes in (other.tensors()["weight"], other.weight):
        state = other.state_dict() | {"weight": codes.clone()}
        layer = make_layer(layer.format)
        layer.load_state_dict(state, assign=assign)
        assert (layer.weight.dtype, layer.weight.requires_grad) == (torch.int8, False)
        assert torch.equal(layer.weight, other.weight)
        assert state["weight"].dtype == codes.dtype


def test_wrong_state_is_refused(layer: QuantizedLinear) -> None:
    """Nothing of what ``copy_`` would silently cast or reshape gets in."""
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    good = quantized(layer.format, 24, 64)
    cases = [({suffix: tensor}, "without its companion") for suffix, tensor in good.items()]
    for suffix, tensor in good.items():
        other = torch.float32 if tensor.dtype != torch.float32 else torch.bfloat16
        cases.append((good | {suffix: tensor.to(other)}, f"{suffix} is {other}, expected {tensor.dtype}"))
        cases.append((good | {suffix: torch.ones(3, 5).to(tensor.dtype)}, f"{suffix} has shape .3, 5., expected"))
    for state, message in cases:
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state, strict=False)
    for name in ("weight", "bias"):
        assert torch.equal(as_bytes(layer.state_dict()[name]), as_bytes(before[name]))


def test_tensors_of_another_shape_or_dtype_do_not_run(layer: QuantizedLinear, x: torch.Tensor) -> None:
    for suffix in layer.format.suffixes[1:]:
        held = getattr(layer, suffix)
        for wrong in (torch.cat((held, held)), held.to(torch.float64)):
            setattr(layer, suffix, wrong)
            with pytest.raises(OmniConvertError, match=f"holds {suffix} "):
                layer(x)
        setattr(layer, suffix, held)
    for wrong in (x.double(), x[:, :32]):
        with pytest.raises(OmniConvertError, match="was given activations of"):
            layer(wrong)


def test_gradient_is_that_of_the_dequantized_layer(layer: QuantizedLinear, x: torch.Tensor) -> None:
    plain = nn.Linear(64, 24)
    plain.load_state_dict({"weight": layer.format.dequantize(layer.tensors()), "bias": layer.bias})
    layer.float()
    inputs = [x.float().reshape(1, 5, 64).requires_grad_() for _ in range(2)]
    for module, value in zip((layer, plain), inputs, strict=True):
        module(value).square().sum().backward()
    for a, b in ((inputs[0].grad, inputs[1].grad), (layer.bias.grad, plain.bias.grad)):
        assert a is not None
        assert b is not None
        assert (a - b).norm() / b.norm() < 0.02
    assert layer.weight.grad is None


@every
def test_compiles_once_for_many_layers(x: torch.Tensor, fmt: Format) -> None:
    class Block(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.first, self.second = make_layer(fmt, 64, seed=seed), make_layer(fmt, 64, seed=seed + 100)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.silu(self.second(self.first(x))) + x

    torch._dynamo.reset()
    blocks = [Block(seed) for seed in range(3)]
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        for block in blocks:
            assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


def test_compiles_with_inductor(layer: QuantizedLinear, x: torch.Tensor) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
        assert torch.equal(compiled(x[:3]), layer(x[:3]))


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64)])
def test_output_can_be_changed_in_place(layer: QuantizedLinear, shape: tuple[int, ...]) -> None:
    """As by ``nn.ReLU(inplace=True)``: also where gradients flow, which forbid it for views."""
    x = torch.randn(shape).bfloat16().requires_grad_()
    before = layer(x)
    y = layer(x)
    y += 1
    y.relu_().sum().backward()
    assert torch.equal(y, (before + 1).relu())
    assert x.grad is not None
    assert torch.equal(x.grad, ((before + 1) > 0).bfloat16() @ layer.format.dequantize(layer.tensors()).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_a_linear(layer: QuantizedLinear, dtype: torch.dtype) -> None:
    layer.float()
    x = torch.randn(5, 64, requires_grad=True)
    expected = layer(x.to(dtype))
    torch._dynamo.reset()
    grads = []
    for module in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", dtype):
            found = module(x)
        assert (found.dtype, torch.equal(found, expected)) == (dtype, True)
        found.float().square().sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
        x.grad = None
    assert torch.equal(*grads)
    assert layer(x).dtype == torch.float32
