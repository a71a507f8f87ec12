"""What quantizing while loading holds in memory: the quantized model and two layers, never a second model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HIDDEN, BLOCKS = 1024, 5
LAYER = 2 * 4 * HIDDEN**2
"""Bytes of the largest layer in BF16."""
SLACK = 16 << 20
"""For Python objects and what threads keep; the plain model is several times as large as all that is allowed."""
_LOAD = """
import json, sys, threading, time
import diffusers.models.transformers.transformer_qwenimage, omni_convert, omni_convert.online, omni_convert.runtime.load
from diffusers import QwenImageTransformer2DModel

def anonymous():
    rows = dict(row.split(":", 1) for row in open("/proc/self/status"))
    return int(rows["RssAnon"].split()[0]) << 10

def watch():
    while not done.wait(0.001):
        peak.append(anonymous())

small, folder, method = sys.argv[1:]
omni_convert.load(small, method=method, target="omni-convert")  # whatever is imported and compiled late
before, peak, done = anonymous(), [], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
model = omni_convert.load(folder, method=method, target="omni-convert")
done.set()
watcher.join()
layers = [module for module in model.modules() if type(module).__name__ == "QuantizedLinear"]
held = sum(tensor.nbytes for layer in layers for tensor in layer.tensors().values())
print(json.dumps({"peak": max(peak) - before, "held": held, "after": anonymous() - before}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        model = QwenImageTransformer2DModel(
            num_layers=BLOCKS, num_attention_heads=8, attention_head_dim=128, joint_attention_dim=64
        ).to(torch.bfloat16)
    path = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(4 * HIDDEN**2, generator=generator).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for weight in model.parameters():
        weight.data.copy_(pool.repeat(-(-weight.numel() // pool.numel()))[: weight.numel()].view(weight.shape))
    model.save_pretrained(path)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("method", ["int8", "mxfp8"])
def test_online_loading_holds_the_quantized_model_and_two_layers(method: str, large: Path, qwen_plain: Path) -> None:
    command = [sys.executable, "-c", _LOAD, str(qwen_plain), str(large), method]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    plain = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    assert plain > 1.8 * found["held"] > 100 << 20
    assert found["held"] - SLACK < found["peak"] < found["held"] + 2 * LAYER + SLACK < 0.8 * plain, found
