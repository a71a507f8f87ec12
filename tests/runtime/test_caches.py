"""The caches of Diffusers skip layers of a quantized transformer as they do those of a plain one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loaded import dequantized

import omni_convert

STEPS = 6
Inputs = dict[str, Any]


def caches(timestep: Callable[[], float]) -> dict[str, Callable[[], Any]]:
    """All that Diffusers has for this model; TextKVCache and SeaCache are for classes of their own."""
    from diffusers.hooks import (
        FasterCacheConfig,
        FirstBlockCacheConfig,
        MagCacheConfig,
        PyramidAttentionBroadcastConfig,
        TaylorSeerCacheConfig,
    )

    return {
        "first block": lambda: FirstBlockCacheConfig(threshold=0.5),
        "mag": lambda: MagCacheConfig(
            threshold=0.5, max_skip_steps=1, retention_ratio=0.2, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
        ),
        "taylor": lambda: TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32
        ),
        "pyramid": lambda: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=timestep
        ),
        "faster": lambda: FasterCacheConfig(
            spatial_attention_block_identifiers=("transformer_blocks.*attn",),
            is_guidance_distilled=True,
            current_timestep_callback=timestep,
        ),
    }


NAMES = ("first block", "mag", "taylor", "pyramid", "faster")


class Clock:
    """1000 at the first step, as in a pipeline."""

    def __init__(self) -> None:
        self.step = 0

    def __call__(self) -> float:
        return 1000 * (1 - self.step / STEPS)


@torch.inference_mode()
def steps(model: Any, inputs: Inputs, clock: Clock) -> list[torch.Tensor]:
    """Outputs of some steps of denoising."""
    generator = torch.Generator().manual_seed(3)
    outputs = []
    hidden = inputs["hidden_states"].float()
    for clock.step in range(STEPS):
        hidden = hidden + 0.05 * torch.randn(hidden.shape, generator=generator)
        given = {**inputs, "hidden_states": hidden, "timestep": torch.tensor([clock() / 1000])}
        with model.cache_context("cond"):
            outputs.append(model(**given)[0])
    return outputs


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_does_to_a_quantized_model_what_it_does_to_a_plain_one(
    name: str, kind: str, qwen_kind: Path, qwen_inputs: Inputs
) -> None:
    inputs = {**qwen_inputs, "encoder_hidden_states": qwen_inputs["encoder_hidden_states"].float()}
    model = omni_convert.load(qwen_kind, dtype=torch.float32)
    plain = dequantized(model)
    clock = Clock()
    uncached = steps(model, inputs, clock)
    for each in (model, plain):
        each.enable_cache(caches(clock)[name]())
    found, expected = steps(model, inputs, clock), steps(plain, inputs, clock)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() / b.norm() < (0.05 if kind == "int8" else 1e-4)
    skipped = sum(not torch.equal(a, b) for a, b in zip(found, uncached, strict=True))
    assert 0 < skipped < STEPS
    model.disable_cache()
    assert all(torch.equal(a, b) for a, b in zip(steps(model, inputs, clock), uncached, strict=True))


def test_every_cache_of_diffusers_is_known() -> None:
    from diffusers import hooks

    configs = {name for name in dir(hooks) if name.endswith("CacheConfig") or name.endswith("BroadcastConfig")}
    tested = {type(make()).__name__ for make in caches(Clock()).values()}
    assert caches(Clock()).keys() == set(NAMES)
    assert configs == tested | {"TextKVCacheConfig", "SeaCacheConfig"}
