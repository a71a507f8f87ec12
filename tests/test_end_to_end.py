"""The whole way: the command line converts real layouts, every loading route runs them, and the result is close."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SENTENCES, embed, load_bf16

import omni_convert

# Steps, and the cosine to the BF16 picture. Random weights amplify every difference from step to step: Z-Image's BF16
# picture has a cosine of 0.997 to its own float32 picture after one step, 0.94 after two. Qwen-Image needs two.
PIPELINES = {"qwen_image": (2, 0.995), "z_image": (1, 0.96)}
COMMAND = Path(sys.executable).with_name("omni-convert")


def run(*arguments: str | Path) -> str:
    return subprocess.run([COMMAND, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Path]:
    """Every model, converted to int8 by the command line."""
    outputs = {}
    for name in (*PIPELINES, "minilm"):
        source, outputs[name] = request.getfixturevalue(name), tmp_path_factory.mktemp("int8") / name
        run("--method", "int8", "--fused-scale", "per-channel", source, outputs[name])  # this loader reads all scales
        run("verify", outputs[name], "--source", source)
    return outputs


def automodel(path: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(path)


@pytest.mark.parametrize("load", [omni_convert.load, automodel])
def test_minilm_embeds_as_before(converted: dict[str, Path], minilm: Path, load: Callable[[Path], Any]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    before = embed(automodel(minilm), tokenizer, SENTENCES)
    after = embed(load(converted["minilm"]), tokenizer, SENTENCES)
    assert (before * after).sum(dim=1).min() >= 0.995
    closest = [(vectors @ vectors.T).fill_diagonal_(-1).argmax(dim=1).tolist() for vectors in (before, after)]
    assert closest[0] == closest[1]


def test_minilm_on_a_single_word_is_still_close(converted: dict[str, Path], minilm: Path) -> None:
    """The hardest input found: three tokens, dominated by the outlier channels of the special ones."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    before, after = (embed(model, tokenizer, ["No."]) for model in (automodel(minilm), automodel(converted["minilm"])))
    assert (before * after).sum() >= 0.98


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("load", [omni_convert.load, load_bf16])
def test_pipeline_paints_as_before(
    converted: dict[str, Path], request: pytest.FixtureRequest, name: str, load: Callable[[Path], Any]
) -> None:
    steps, enough = PIPELINES[name]
    before = generate(load_bf16(request.getfixturevalue(name)), steps)
    after = generate(load(converted[name]), steps)
    assert not torch.equal(before, after)
    assert torch.cosine_similarity(before.flatten() - 0.5, after.flatten() - 0.5, dim=0) >= enough


def test_component_folder_loads_alone(converted: dict[str, Path], qwen_image: Path) -> None:
    from diffusers import QwenImageTransformer2DModel

    folder = converted["qwen_image"] / "transformer"
    ours = omni_convert.load(folder)
    theirs = QwenImageTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    linear = ours.transformer_blocks[0].attn.to_q
    assert linear.weight.dtype == torch.int8
    assert linear.weight_scale.dtype == torch.float32
    assert ours.img_in.weight.dtype == torch.bfloat16


def test_quickstart_passes(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "scripts" / "quickstart.py"
    result = subprocess.run([sys.executable, script, "--out", tmp_path / "out"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "out" / "qwen-image.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "minilm-report.html").stat().st_size > 10_000


def generate(pipe: Any, steps: int) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    size = {"height": 64, "width": 64}
    result = pipe(prompt="a cup of coffee", num_inference_steps=steps, generator=noise, output_type="pt", **size)
    return result.images.float()
