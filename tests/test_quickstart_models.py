"""The models that the other tests rely on: real layouts, and they run."""

import json
from pathlib import Path

import pytest
import torch
from models import SENTENCES, embed, load_bf16, write_qwen_image
from safetensors import safe_open
from safetensors.torch import load_file

PIPELINES = ["qwen_image", "z_image"]
FOLDERS = {"scheduler", "text_encoder", "tokenizer", "transformer", "vae"}


@pytest.fixture(params=PIPELINES)
def pipeline_folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def generate(pipe, prompt: str) -> torch.Tensor:
    # Two steps are the fewest: Qwen-Image's scheduler divides by zero with one, whatever the weights.
    noise = torch.Generator().manual_seed(0)
    images = pipe(prompt=prompt, num_inference_steps=2, height=64, width=64, generator=noise, output_type="pt").images
    return images.float()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.rglob("*.safetensors") for name, tensor in load_file(file).items()}


def test_layout_is_that_of_a_hub_repository(pipeline_folder: Path) -> None:
    assert {path.name for path in pipeline_folder.iterdir() if path.is_dir()} == FOLDERS
    assert json.loads((pipeline_folder / "model_index.json").read_text()).keys() > FOLDERS
    assert (pipeline_folder / "README.md").is_file()
    assert (pipeline_folder / ".gitattributes").is_file()


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_component_is_sharded_and_its_index_is_true(pipeline_folder: Path, component: str) -> None:
    [index] = (pipeline_folder / component).glob("*.safetensors.index.json")
    stored = {}
    for shard in index.parent.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            stored |= dict.fromkeys(file.keys(), shard.name)
    assert json.loads(index.read_text())["weight_map"] == stored
    assert len(set(stored.values())) > 2


def test_matrices_are_bf16_finite_and_not_zero(pipeline_folder: Path) -> None:
    for name, weight in weights(pipeline_folder).items():
        assert weight.dtype == torch.bfloat16, name
        assert weight.isfinite().all(), name
        assert weight.ndim < 2 or weight.any(dim=1).all(), name


def test_pipeline_runs_and_listens_to_the_prompt(pipeline_folder: Path) -> None:
    pipe = load_bf16(pipeline_folder)
    coffee = generate(pipe, "a cup of coffee")
    assert coffee.shape == (1, 3, 64, 64)
    assert coffee.isfinite().all()
    assert coffee.std() > 0.05
    assert torch.equal(coffee, generate(pipe, "a cup of coffee"))
    assert (coffee - generate(pipe, "a red bicycle")).abs().mean() > 0.002


def test_qwen_image_drops_the_system_message(qwen_image: Path) -> None:
    pipe = load_bf16(qwen_image)
    template = pipe.prompt_template_encode
    system = template[: template.index("{}")]
    assert len(pipe.tokenizer(system).input_ids) == pipe.prompt_template_encode_start_idx


def test_seed_decides_every_byte(tmp_path: Path, qwen_image: Path) -> None:
    again, other = write_qwen_image(tmp_path / "again"), write_qwen_image(tmp_path / "other", seed=1)
    files = [path.relative_to(again) for path in again.rglob("*") if path.is_file()]
    assert all((again / file).read_bytes() == (qwen_image / file).read_bytes() for file in files)
    name = "transformer_blocks.0.attn.to_q.weight"
    assert not torch.equal(weights(other / "transformer")[name], weights(again / "transformer")[name])


def test_minilm_is_trained(minilm: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    vectors = embed(AutoModel.from_pretrained(minilm), AutoTokenizer.from_pretrained(minilm), SENTENCES)
    similarity = vectors @ vectors.T
    assert torch.allclose(similarity.diagonal(), torch.ones(len(SENTENCES)))
    espresso, cat = similarity[0, 1:3]  # to the first sentence, which is about coffee
    assert espresso > cat + 0.1
