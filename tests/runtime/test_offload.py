"""Offloading of Accelerate and Diffusers, in every format, with the CPU as the device that computes.

Each hook runs, the output keeps its bits, and what comes back is what was loaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import KINDS
from loaded import assert_holds, assert_saves_same, layers_of, run

import omni_convert
from omni_convert.runtime.prepared import prepared_bytes

Inputs = dict[str, Any]
CPU = torch.device("cpu")


def are_on(model: Any, device: str) -> bool:
    return {layer.weight.device.type for layer in layers_of(model).values()} == {device}


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("names", [("qwen_kind", "qwen_inputs"), ("bert_kind", "bert_inputs")])
def test_accelerate_offloads_to_memory(
    kind: str, names: tuple[str, str], buffers: bool, request: pytest.FixtureRequest
) -> None:
    """What ``pipe.enable_sequential_cpu_offload()`` does."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    folder, inputs = map(request.getfixturevalue, names)
    model = omni_convert.load(folder)
    before = run(model, inputs)
    cpu_offload(model, CPU, offload_buffers=buffers)
    for _ in range(2):
        assert are_on(model, "meta")
        assert torch.equal(run(model, inputs), before)
    remove_hook_from_module(model, recurse=True)
    assert_holds(model, folder)
    assert torch.equal(run(model, inputs), before)


def test_accelerate_offloads_to_disk(model: Any, qwen_kind: Path, qwen_inputs: Inputs, tmp_path: Path) -> None:
    from accelerate import disk_offload

    before = run(model, qwen_inputs)
    disk_offload(model, tmp_path, CPU, offload_buffers=True)
    assert are_on(model, "meta")
    assert torch.equal(run(model, qwen_inputs), before)
    held = [name for name, layer in layers_of(model).items() if prepared_bytes(layer._handle)]
    assert len(held) <= 1, "packed weights stay in memory while the weights are on disk"


def test_accelerate_moves_whole_models(model: Any, qwen_kind: Path, qwen_inputs: Inputs) -> None:
    """What ``pipe.enable_model_cpu_offload()`` does."""
    from accelerate import cpu_offload_with_hook

    before = run(model, qwen_inputs)
    model, hook = cpu_offload_with_hook(model, CPU)
    assert torch.equal(run(model, qwen_inputs), before)
    hook.offload()
    assert_holds(model, qwen_kind)


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_dispatched_model_saves_what_it_loaded(
    bert_kind: Path, bert_inputs: Inputs, offloaded: bool, tmp_path: Path
) -> None:
    """As with a ``device_map`` of GPU and CPU: what is offloaded lies on no device, and is fetched to be written."""
    from accelerate import cpu_offload

    model = omni_convert.load(bert_kind)
    before = run(model, bert_inputs)
    model.hf_device_map = {"": "cpu"}
    if offloaded:
        cpu_offload(model, CPU)
    assert are_on(model, "meta" if offloaded else "cpu")
    assert_saves_same(model, bert_kind, tmp_path, max_shard_size="60KB")
    assert torch.equal(run(model, bert_inputs), before)


LEVELS: dict[str, dict[str, Any]] = {
    "block": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "leaf": {"offload_type": "leaf_level"},
}


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_diffusers_offloads_groups(
    model: Any, qwen_kind: Path, qwen_inputs: Inputs, level: str, to_disk: bool, tmp_path: Path
) -> None:
    from diffusers.hooks import apply_group_offloading

    before = run(model, qwen_inputs)
    path = str(tmp_path) if to_disk else None
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, offload_to_disk_path=path, **LEVELS[level])
    for _ in range(2):
        assert torch.equal(run(model, qwen_inputs), before)
    if not to_disk:
        assert_holds(model, qwen_kind)


@pytest.mark.parametrize("level", LEVELS)
def test_diffusers_offloads_groups_of_a_transformers_model(bert_kind: Path, bert_inputs: Inputs, level: str) -> None:
    from diffusers.hooks import apply_group_offloading

    model = omni_convert.load(bert_kind)
    before = run(model, bert_inputs)
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **LEVELS[level])
    assert torch.equal(run(model, bert_inputs), before)
    assert_holds(model, bert_kind)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need a GPU")
@pytest.mark.parametrize("level", LEVELS)
def test_diffusers_offloads_groups_with_streams(
    model: Any, qwen_kind: Path, qwen_inputs: Inputs, level: str
) -> None:  # pragma: no cover
    from diffusers.hooks import apply_group_offloading

    gpu = torch.device("cuda")
    inputs = {k: v.to(gpu) if isinstance(v, torch.Tensor) else v for k, v in qwen_inputs.items()}
    before = run(omni_convert.load(qwen_kind, device=gpu), inputs)
    apply_group_offloading(model, onload_device=gpu, offload_device=CPU, use_stream=True, **LEVELS[level])
    for _ in range(3):
        assert torch.equal(run(model, inputs), before)


def pipelines() -> dict[str, Callable[[Any], Any]]:
    return {
        "models": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        "groups": lambda pipe: pipe.enable_group_offload(onload_device=CPU, offload_type="leaf_level"),
    }


@pytest.mark.parametrize("way", pipelines())
@pytest.mark.parametrize("method", ["int8", "mxfp8"])
def test_pipelines_offload(
    way: str, method: str, qwen_image: Path, quantize: Callable[..., Path], tmp_path: Path
) -> None:
    """With hooks that the tests above try for every format. (The text encoder of this one has tied weights, which
    Accelerate cannot offload sequentially from the CPU to the CPU.)"""
    folder = tmp_path / "out"
    shutil.copytree(qwen_image, folder, ignore=shutil.ignore_patterns("transformer"))
    quantize(qwen_image / "transformer", folder / "transformer", fmt=KINDS[method])
    draw = {"prompt": "a cup of coffee", "height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
    images = []
    for offload in (lambda pipe: None, pipelines()[way]):
        pipe = omni_convert.load(folder)
        pipe.set_progress_bar_config(disable=True)
        offload(pipe)
        images.append(pipe(**draw, generator=torch.Generator().manual_seed(0)).images)
    assert torch.equal(*images)
