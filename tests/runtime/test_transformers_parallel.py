"""Two processes that hold a part each of a model of Transformers give the result of one that holds all."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from kinds import CHOICES
from quantized import as_bytes
from ranks import Job, convert, run_ranks
from transformers.core_model_loading import MergeModulelist, Transpose, WeightConverter

import omni_convert
from omni_convert import OmniConvertError
from omni_convert.runtime.linear import QuantizedLinear
from omni_convert.runtime.parallel import LOADING, Rank, Split
from omni_convert.runtime.transformers_parallel import check_merged

INPUTS = {"input_ids": torch.arange(3, 51, 3).reshape(2, 8)}
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "head_dim": 32}
WIDE: dict[str, Any] = {**GROUPED, "hidden_size": 512, "head_dim": 256, "intermediate_size": 1024}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": ("Llama", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "tied embeddings": ("Qwen2", {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "norms of heads": ("Qwen3", {**GROUPED, "tie_word_embeddings": False}),
    "gathered outputs": ("Phi3", {**SMALL, "num_key_value_heads": 2, "vocab_size": 63}),
    "scaled embeddings": ("Gemma3", {**GROUPED, "tie_word_embeddings": True}),
    "fused attention": ("GPTNeoX", {**SMALL, "tie_word_embeddings": True}),
    "experts": ("Qwen3Moe", {**GROUPED, **EXPERTS}),
}
WHOLE = {
    "gathered outputs": ("model.embed_tokens.weight", "lm_head.weight"),  # 63 rows
    "fused attention": ("gpt_neox.embed_in.weight", "lm_head.weight"),  # tied, and the plan names one only
    "experts": ("model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"),  # the router
}
"""Matrices of which every rank holds all."""


def write(name: str, sizes: dict[str, Any], path: Path) -> Path:
    config = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, config)(**sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for the groups of 512 columns of ``mxfp4_dualscale``."""
    return write("Llama", WIDE, tmp_path_factory.mktemp("llama"))


def assert_one(jobs: dict[str, Job], work: Path) -> None:
    """Both ranks give the result of one process, and hold half of what is split."""
    for (name, job), ranks in zip(jobs.items(), run_ranks(list(jobs.values()), work), strict=True):
        whole = omni_convert.load(job.folder, **job.options)
        with torch.inference_mode():
            expected = whole(**job.inputs)[0]
            generated = whole.generate(**job.inputs, max_new_tokens=job.tokens, do_sample=False)
        first, second = ranks
        assert torch.equal(first.output, second.output), name
        assert torch.equal(first.generated, second.generated), name
        # INT8 quantizes the activations of each part for itself.
        bound = 2e-2 if any(m.format.name == "int8" for m in quantized(whole).values()) else 1e-4
        assert (first.output - expected).norm() < bound * expected.norm(), name
        assert bound > 1e-4 or torch.equal(first.generated, generated), name
        assert quantized(whole)
        assert whole_names(first.state, whole) == set(WHOLE.get(name, ())), name


def quantized(model: Any) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def whole_names(found: dict[str, torch.Tensor], whole: Any) -> set[str]:
    """Matrices of which a rank holds all."""
    state = whole.state_dict()
    names = {name for name, value in found.items() if value.ndim > 1 and value.numel() == state[name].numel()}
    return {name for name in names if "weight_scale" not in name}


def test_two_processes_are_one_in_every_format(llama: Path, tmp_path: Path) -> None:
    float32 = {"dtype": torch.float32}
    jobs = {kind: Job(convert(llama, tmp_path / kind, kind), float32, INPUTS, 4) for kind in CHOICES}
    jobs["online"] = Job(llama, {"method": "mxfp8", "target": "omni-convert", **float32}, INPUTS, 4)
    assert_one(jobs, tmp_path)


def test_two_processes_are_one_of_every_kind_of_model(tmp_path: Path) -> None:
    jobs = {}
    for name, (kind, sizes) in MODELS.items():
        plain = write(kind, sizes, tmp_path / f"{name}-plain")
        jobs[name] = Job(convert(plain, tmp_path / name, "fp8 channel"), {"dtype": torch.float32}, INPUTS, 4)
    assert_one(jobs, tmp_path)


@pytest.mark.parametrize("kind", ["int8", "fp8 block", "mxfp4"])
def test_parts_make_the_whole(kind: str, llama: Path, tmp_path: Path) -> None:
    """Every rank's codes and scales, put together, are those on disk, and those of a rank that quantizes itself."""
    folder = convert(llama, tmp_path / kind, kind)
    whole = quantized(omni_convert.load(folder))
    parts = [quantized(omni_convert.load(folder, tp_rank=rank, tp_size=2)) for rank in (0, 1)]
    online = quantized(omni_convert.load(llama, target="omni-convert", tp_rank=1, tp_size=2, **CHOICES[kind]))
    for name, layer in whole.items():
        dim = 1 if name.endswith(("o_proj", "down_proj")) else 0
        values = torch.cat([part[name].format.dequantize(part[name].tensors()) for part in parts], dim)
        assert torch.equal(values, layer.format.dequantize(layer.tensors()))
        for suffix, tensor in parts[1][name].tensors().items():
            assert torch.equal(as_bytes(online[name].tensors()[suffix]), as_bytes(tensor)), name


def test_what_cannot_be_split(llama: Path, bert: Path, tmp_path: Path) -> None:
    with pytest.raises(OmniConvertError, match="BertModel: has no plan for tensor parallelism"):
        omni_convert.load(bert, tp_rank=0, tp_size=2)
    folder = convert(llama, tmp_path / "int8", "int8")
    with pytest.raises(OmniConvertError, match=r"self_attn.k_proj: has 2 heads, expected a multiple of tp_size.* 4"):
        omni_convert.load(folder, tp_rank=0, tp_size=4)
    part = omni_convert.load(folder, tp_rank=1, tp_size=2)
    with pytest.raises(OmniConvertError, match="expected a process group"):
        part(**INPUTS)
    with pytest.raises(ValueError, match="not serializable"):
        part.save_pretrained(tmp_path / "nowhere")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(OmniConvertError, match="rank 0 of 1 of the process group, expected 1 of 2"):
            copy.deepcopy(part)(**INPUTS)
    finally:
        dist.destroy_process_group()


def test_cuts_and_plans_that_do_not_fit_are_named(tmp_path: Path) -> None:
    plain = write("Llama", {**GROUPED, "intermediate_size": 96}, tmp_path / "plain")
    folder = convert(plain, tmp_path / "mxfp8", "mxfp8")
    with pytest.raises(OmniConvertError, match=r"down_proj: rank 0 .* columns from 0 to 48, expected multiples of 32"):
        omni_convert.load(folder, tp_rank=0, tp_size=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "base_model_tp_plan": {"layers.*.mlp": "made_up"}}))
    with pytest.raises(OmniConvertError, match=r"has 'made_up' for model.layers.0.mlp, LlamaMLP, expected one of"):
        omni_convert.load(folder, tp_rank=0, tp_size=2)


def test_what_a_pipeline_cannot_split_is_held_whole(
    qwen_image: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its text encoder has three heads."""
    folder = tmp_path / "pipe"
    omni_convert.convert(qwen_image, folder, method="fp8", target="omni-convert", components=["text_encoder"])
    with pytest.raises(OmniConvertError, match="q_proj: has 3 heads, expected a multiple of tp_size, which is 2"):
        omni_convert.load(folder / "text_encoder", tp_rank=0, tp_size=2)
    found, whole = (omni_convert.load(folder, **ranks).text_encoder for ranks in ({"tp_rank": 0, "tp_size": 2}, {}))
    assert "every rank holds all of a Qwen2_5_VL" in caplog.text
    assert whole_names(found.state_dict(), whole) == {n for n, v in whole.state_dict().items() if v.ndim > 1}


def test_what_is_merged_or_whole_may_be_made_by_a_rule() -> None:
    model, splits = torch.nn.Linear(4, 4), {"experts.down": Split(-1, (4,))}
    check_merged(model, "experts.down", WeightConverter("down", "down", [MergeModulelist()]), splits)
    check_merged(model, "experts.up", WeightConverter("up", "up", [Transpose(0, 1)]), splits)


def test_what_is_rearranged_is_not_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Transformers transposes the experts of Qwen3-VL-MoE; of a pipeline, every rank holds all of it."""
    text = {**GROUPED, **EXPERTS, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})
    transformers.Qwen3VLMoeForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    folder = convert(tmp_path / "plain", tmp_path / "model", "fp8 channel", ignore=["visual", "experts"])
    with pytest.raises(OmniConvertError, match=r"rearranges .*experts.* \(Transpose\), expected a tensor"):
        omni_convert.load(folder, tp_rank=0, tp_size=2)
    whole, found = omni_convert.load(folder).state_dict(), load_as(Rank(0, 2, in_pipeline=True), folder).state_dict()
    assert "every rank holds all of a Qwen3VLMoe" in caplog.text
    assert all(torch.equal(as_bytes(found[name]), as_bytes(value)) for name, value in whole.items())


def load_as(rank: Rank, folder: Path) -> Any:
    """As ``omni_convert.load`` does for ranks of any kind."""
    [name] = json.loads((folder / "config.json").read_text())["architectures"]
    token = LOADING.set(rank)
    try:
        return getattr(transformers, name).from_pretrained(folder).eval()
    finally:
        LOADING.reset(token)


@pytest.mark.parametrize("name", MODELS)
def test_a_part_runs_forward_alone(name: str, tmp_path: Path, group_of_one: Rank) -> None:
    plain = write(MODELS[name][0], MODELS[name][1], tmp_path / "plain")
    model = load_as(group_of_one, convert(plain, tmp_path / "model", "fp8 channel"))
    with torch.inference_mode():
        expected = model(**INPUTS)[0]
    output = copy.deepcopy(model)(**INPUTS)[0]
    assert torch.equal(output, expected)
    assert model.generate(**INPUTS, max_new_tokens=1).shape == (2, 9)
    with pytest.raises(OmniConvertError, match=r"one rank's part of every layer.*expected no backward\(\)"):
        output.float().square().mean().backward()


_LOAD = """
import sys, omni_convert

def resident():
    rows = dict(row.split(":", 1) for row in open("/proc/self/status"))
    return [int(rows[kind].split()[0]) << 10 for kind in ("RssAnon", "RssFile", "VmHWM")]

small, large = sys.argv[1:]
omni_convert.load(small, tp_rank=0, tp_size=2)  # whatever is imported late
before = resident()
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
model = omni_convert.load(large, tp_rank=0, tp_size=2)
after = resident()
print(after[0] - before[0], after[2] - before[0] - before[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_reads_and_holds_its_part_alone(llama: Path, tmp_path: Path) -> None:
    """Of 64 MiB that are split by rows, half is touched, and copied while its file is mapped."""
    sizes = {**GROUPED, "vocab_size": 1 << 15, "hidden_size": 512, "num_hidden_layers": 1}
    folder = convert(write("Llama", sizes, tmp_path / "plain"), tmp_path / "large", "int8")
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    command = [sys.executable, "-c", _LOAD, str(convert(llama, tmp_path / "small", "int8")), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    held, peak = map(int, result.stdout.split())
    assert 0.45 * total < held < 0.55 * total, (held, total)
    assert peak < 1.15 * total, (peak, total)
