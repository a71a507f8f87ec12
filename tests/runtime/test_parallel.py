"""Two processes that hold a part each give the result of one that holds all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import CHOICES, KINDS
from quantized import as_bytes
from ranks import Job, convert, run_ranks

import omni_convert
from omni_convert import OmniConvertError, UsageError
from omni_convert.formats.base import Facts, Format
from omni_convert.runtime.linear import QuantizedLinear
from omni_convert.runtime.parallel import Rank, Split, check_split, local_tensors, split_linears

SPLIT = ("attn.to_q", "attn.to_out.0", "img_mlp.net.0.proj", "img_mlp.net.2")
FITS = [kind for kind in CHOICES if kind != "mxfp4_dualscale"]  # its groups of 512 columns are wider than a part here


@pytest.fixture(scope="module")
def wide_plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        num_layers=1, num_attention_heads=4, attention_head_dim=32, joint_attention_dim=48, axes_dims_rope=(8, 12, 12)
    )
    path = tmp_path_factory.mktemp("wide")
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def test_two_processes_are_one(wide_plain: Path, qwen_inputs: dict[str, Any], tmp_path: Path) -> None:
    kinds = ("int8", "fp8 tensor", "fp8 block", "mxfp4")
    folders = [convert(wide_plain, tmp_path / kind, kind, ignore=["txt_mlp"]) for kind in kinds]
    done = run_ranks([Job(folder, {}, qwen_inputs) for folder in folders], tmp_path)
    for folder, ((first, _, state), (second, *_)) in zip(folders, done, strict=True):
        whole = omni_convert.load(folder)
        assert torch.equal(first, second)
        assert is_close(first, whole, qwen_inputs)
        block = "transformer_blocks.0."
        for name in (*SPLIT, "txt_mlp.net.2"):
            assert state[f"{block}{name}.weight"].numel() * 2 == whole.state_dict()[f"{block}{name}.weight"].numel()
        assert torch.equal(state[f"{block}img_mod.1.weight"], whole.state_dict()[f"{block}img_mod.1.weight"])


def is_close(found: torch.Tensor, whole: Any, inputs: dict[str, Any]) -> bool:
    with torch.inference_mode():
        expected = whole(**inputs)[0]
    return bool((found - expected).norm() / expected.norm() < 0.01)


FLUX: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "FLUX.1": (
        "FluxTransformer2DModel",
        {"in_channels": 16, "joint_attention_dim": 32, "pooled_projection_dim": 32},
        {"pooled_projections": (1, 32)},
    ),
    "FLUX.2": (
        "Flux2Transformer2DModel",
        {"in_channels": 16, "joint_attention_dim": 32, "guidance_embeds": False, "mlp_ratio": 4.0},
        {},
    ),
}


def flux(name: str, folder: Path) -> dict[str, Any]:
    """Writes a model; its inputs."""
    import diffusers

    model_class, sizes, more = FLUX[name]
    axes = (8, 12, 12) if name == "FLUX.1" else (8, 8, 8, 8)
    torch.manual_seed(0)
    model = getattr(diffusers, model_class)(
        num_layers=1, num_single_layers=1, num_attention_heads=4, attention_head_dim=32, axes_dims_rope=axes, **sizes
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    return {
        "hidden_states": torch.randn(1, 6, 16).bfloat16(),
        "encoder_hidden_states": torch.randn(1, 5, 32).bfloat16(),
        "timestep": torch.tensor([0.5]).bfloat16(),
        "img_ids": torch.zeros(6, len(axes)),
        "txt_ids": torch.zeros(5, len(axes)),
        "return_dict": False,
        **{key: torch.randn(shape).bfloat16() for key, shape in more.items()},
    }


def test_packed_layers_are_split_block_by_block(tmp_path: Path) -> None:
    """Diffusers notes on some linears of FLUX which blocks they are made of."""
    jobs: dict[tuple[str, str], Job] = {}
    for name in FLUX:
        inputs = flux(name, tmp_path / name)
        for kind in ("int8", "mxfp8"):
            omni_convert.convert(tmp_path / name, tmp_path / f"{name} {kind}", **CHOICES[kind])
            jobs[name, kind] = Job(tmp_path / f"{name} {kind}", {}, inputs)
    done = run_ranks([*jobs.values()], tmp_path)
    for ((name, _), job), ((first, _, state), (second, *_)) in zip(jobs.items(), done, strict=True):
        whole = omni_convert.load(job.folder)
        assert torch.equal(first, second)
        assert is_close(first, whole, job.inputs)
        key = f"single_transformer_blocks.0.{'proj_out' if name == 'FLUX.1' else 'attn.to_out'}"
        assert isinstance(whole.get_submodule(key), QuantizedLinear)
        assert state[f"{key}.weight"].numel() * 2 == whole.state_dict()[f"{key}.weight"].numel()


@pytest.mark.parametrize("kind", FITS)
def test_parts_make_the_whole(kind: str, wide_plain: Path, tmp_path: Path) -> None:
    """Every rank's codes and scales, put together, are those on disk."""
    folder = convert(wide_plain, tmp_path / "model", kind)
    whole = omni_convert.load(folder)
    parts = [omni_convert.load(folder, tp_rank=rank, tp_size=2) for rank in (0, 1)]
    for name in SPLIT:
        full = whole.get_submodule(f"transformer_blocks.0.{name}")
        ranks = [part.get_submodule(f"transformer_blocks.0.{name}") for part in parts]
        assert isinstance(full, QuantizedLinear)
        dim = 1 if name.endswith(("to_out.0", "net.2")) else 0
        values = torch.cat([rank.format.dequantize(rank.tensors()) for rank in ranks], dim)
        assert torch.equal(values, full.format.dequantize(full.tensors()))
        bias = ranks[0].bias + ranks[1].bias if dim else torch.cat([rank.bias for rank in ranks])
        assert torch.equal(bias, full.bias)
        held = sum(as_bytes(tensor).numel() for rank in ranks for tensor in rank.state_dict().values())
        assert held < 1.3 * sum(as_bytes(tensor).numel() for tensor in full.state_dict().values())


def test_quantized_while_loading(wide_plain: Path, tmp_path: Path) -> None:
    folder = convert(wide_plain, tmp_path / "model", "int8")
    for rank in (0, 1):
        offline = omni_convert.load(folder, tp_rank=rank, tp_size=2)
        online = omni_convert.load(wide_plain, method="int8", target="omni-convert", tp_rank=rank, tp_size=2)
        for name, value in offline.state_dict().items():
            assert torch.equal(as_bytes(online.state_dict()[name]), as_bytes(value)), name


@pytest.mark.parametrize("fmt", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("blocks", [(1024, 1024), (2048,), (1024, 3072)])
def test_every_tensor_is_cut_with_the_weight(fmt: Format, dim: int, blocks: tuple[int, ...]) -> None:
    shape = (sum(blocks), 512) if dim == 0 else (48, sum(blocks))
    generator = torch.Generator().manual_seed(0)
    tensors = fmt.quantize(torch.randn(shape, generator=generator), Facts(input_scale=0.25))
    if "mul_scale" in tensors:
        tensors["mul_scale"] = torch.rand(shape[1], generator=generator)
    values, split = fmt.dequantize(tensors), Split(dim, blocks)
    for index in (0, 1):
        found = fmt.dequantize(local_tensors(fmt, tensors, split, Rank(index, 2)))
        expected = torch.cat([values.narrow(dim, a, b - a) for a, b in split.ranges(Rank(index, 2))], dim)
        assert torch.equal(found, expected)


def test_cuts_within_a_block_are_refused(wide_plain: Path, tmp_path: Path) -> None:
    folder = convert(wide_plain, tmp_path / "dual", "mxfp4_dualscale")
    with pytest.raises(OmniConvertError, match=r"columns from 0 to 64, expected multiples of 512"):
        omni_convert.load(folder, tp_rank=0, tp_size=2)
    folder = convert(wide_plain, tmp_path / "block", "fp8 block")
    with pytest.raises(OmniConvertError, match="4 attention heads, expected a multiple of tp_size, which is 3"):
        omni_convert.load(folder, tp_rank=0, tp_size=3)


def test_mx_blocks_are_cut_apart_but_for_ascend(wide_plain: Path, tmp_path: Path) -> None:
    folder = convert(wide_plain, tmp_path / "mxfp8", "mxfp8")
    part = omni_convert.load(folder, tp_rank=1, tp_size=4)
    assert part.transformer_blocks[0].attn.to_out[0].weight.shape == (128, 32)
    split = Split(1, (128,))
    with pytest.raises(OmniConvertError, match="from 32 to 64, expected multiples of 64, which mxfp8 keeps together"):
        check_split("layer", KINDS["mxfp8"], split, Rank(1, 4, "npu"))
    with pytest.raises(OmniConvertError, match="from 16 to 32, expected multiples of 32"):
        check_split("layer", KINDS["mxfp8"], split, Rank(1, 8))


def test_what_cannot_be_split(zimage: Path, qwen: Path, qwen_inputs: dict[str, Any]) -> None:
    with pytest.raises(OmniConvertError, match="has no plan for tensor parallelism"):
        omni_convert.load(zimage, tp_rank=0, tp_size=2)
    for rank, size in ((None, 2), (0, None), (2, 2), (-1, 2), ("0", 2), (0, "2"), (True, 2)):
        with pytest.raises(UsageError, match="tp_rank is"):
            omni_convert.load(qwen, tp_rank=rank, tp_size=size)  # type: ignore[arg-type]
    part = omni_convert.load(qwen, tp_rank=0, tp_size=2)
    with pytest.raises(OmniConvertError, match="expected a process group"):
        part(**qwen_inputs)
    assert not part.hf_quantizer.is_serializable
    with pytest.raises(ValueError, match="not serializable"):
        part.save_pretrained("nowhere")


@pytest.mark.parametrize("split", [Split(0, (8,), is_closed=True), Split(1, (4,)), Split(1, (4,), is_closed=True)])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_refused_when_they_are_asked_for(split: Split, compiled: bool, group_of_one: Rank) -> None:
    model, inputs = torch.nn.Sequential(torch.nn.Linear(4, 8)), torch.randn(3, 4, requires_grad=True)
    linear = model[0]
    split_linears(model, {"0": split}, group_of_one)
    model.load_state_dict({f"0.{name}": value for name, value in linear.state_dict().items()})
    run = torch.compile(model, backend="eager") if compiled else model
    with torch.no_grad():
        expected = linear(inputs)
        assert torch.equal(run(inputs), expected)
        assert not run(inputs).requires_grad
    output = run(inputs)
    assert torch.equal(output, expected)
    output += 1  # as models do with residuals
    with pytest.raises(OmniConvertError, match=r"expected no backward\(\).*torch.inference_mode"):
        output.sum().backward()
    assert inputs.grad is None
