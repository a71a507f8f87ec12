"""Time until a converted model can be used, and the memory that takes, beside reading the same files.

    python scripts/bench_load.py
    python scripts/bench_load.py --gigabytes 8 --method mxfp8 --library transformers

Makes a transformer of Qwen-Image or a Qwen2 of about that many gigabytes in BF16, random weights, and converts it. Each
round then runs, each in a process of its own and after all imports, on files in the page cache:

load_file           ``safetensors.torch.load_file`` of every file
omni_convert.load   the model, on the CPU

Both touch every page of every tensor before the clock stops: files are mapped and would otherwise be read later. Memory
is anonymous memory beyond that of a process that has only imported; mapped files are not part of it. Ratios are medians
of those within a round, with their range; on a machine that does other work, those of processor time say more.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_tools import Usage, machine, markdown, run
from safetensors.torch import load_file

import omni_convert
from omni_convert.formats.header import TensorSpec, encode_header

PAGE = 4096
SHARD_BYTES = 4e9
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


def build(library: str, gigabytes: float, hidden: int) -> Any:
    """On the meta device, with as many whole blocks as it takes."""
    with torch.device("meta"):
        if library == "diffusers":
            from diffusers import QwenImageTransformer2DModel

            block = 2 * 28 * hidden**2  # without what makes the modulation: two layers of (6, 1)
            layers = math.ceil(gigabytes * 1e9 / (block + 2 * 12 * hidden**2))
            return QwenImageTransformer2DModel(num_layers=layers, num_attention_heads=hidden // 128).to(torch.bfloat16)
        from transformers import Qwen2Config, Qwen2ForCausalLM

        layers = math.ceil(gigabytes * 1e9 / (2 * 16 * hidden**2))
        config = Qwen2Config(
            hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, vocab_size=1024,
            num_attention_heads=hidden // 128, num_key_value_heads=hidden // 128,
        )  # fmt: skip
        return Qwen2ForCausalLM(config).to(torch.bfloat16)


def write_model(model: Any, library: str, folder: Path) -> None:
    """A checkpoint of random weights for ``model``, which has none."""
    folder.mkdir()
    (model.save_config if library == "diffusers" else model.config.save_pretrained)(folder)
    shards: list[dict[str, TensorSpec]] = [{}]
    for name, tensor in model.state_dict().items():
        if sum(spec.nbytes for spec in shards[-1].values()) >= SHARD_BYTES:
            shards.append({})
        shards[-1][name] = TensorSpec("BF16", tuple(tensor.shape))
    pool = torch.randn(1 << 24, dtype=torch.bfloat16).view(torch.int16).numpy()
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        path = folder / f"{STEMS[library]}-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, path.name)
        with path.open("wb") as file:
            file.write(encode_header(shard, {"format": "pt"}))
            for spec in shard.values():
                file.write(np.resize(pool, spec.numel).data)
    (folder / f"{STEMS[library]}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def touch(tensors: Iterable[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.detach().contiguous().view(-1).view(torch.uint8)[::PAGE].sum()


def measure(library: str, what: str, folder: Path, result: Path) -> None:
    """In a process of its own; ``result`` receives the seconds, and those of processor time."""
    module = {"diffusers": "diffusers.models.transformers.transformer_qwenimage",
              "transformers": "transformers.models.qwen2.modeling_qwen2"}[library]  # fmt: skip
    importlib.import_module(module)
    start, cpu = time.perf_counter(), time.process_time()
    if what == "load_file":
        files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
        touch(tensor for tensors in files for tensor in tensors.values())
    elif what == "omni_convert.load":
        model = omni_convert.load(folder)
        touch([*model.parameters(), *model.buffers()])
    result.write_text(f"{time.perf_counter() - start} {time.process_time() - cpu}")


def compare(library: str, arguments: argparse.Namespace, work: Path) -> list[tuple[str, ...]]:
    """A row for every way to load."""
    write_model(build(library, arguments.gigabytes, arguments.hidden), library, work / "plain")
    omni_convert.convert(work / "plain", work / "out", method=arguments.method, target="omni-convert")
    size = sum(file.stat().st_size for file in (work / "out").glob("*.safetensors")) / 1e9
    seconds: dict[str, list[list[float]]] = {"imports": [], "load_file": [], "omni_convert.load": []}
    usages: dict[str, list[Usage]] = {what: [] for what in seconds}
    for _ in range(arguments.rounds):
        for what, found in seconds.items():
            command = [sys.executable, __file__, "--measure", library, what, str(work / "out"), str(work / "seconds")]
            usages[what].append(run(command))
            found.append([float(text) for text in (work / "seconds").read_text().split()])
    imported = statistics.median(usage.anonymous for usage in usages.pop("imports"))
    rows = []
    for what, found in usages.items():
        cells = []
        for ours, theirs in zip(zip(*seconds[what], strict=True), zip(*seconds["load_file"], strict=True), strict=True):
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            cells += [f"{statistics.median(ours):.2f}", spread]
        memory = statistics.median(usage.anonymous for usage in found) - imported
        rows.append((f"{library}, {arguments.method}, {size:.2f} GB: {what}", *cells, f"{memory:.0f}"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8, help="of the model in BF16")
    parser.add_argument("--hidden", type=int, default=3072, help="a multiple of 128")
    parser.add_argument("--method", default="int8")
    parser.add_argument("--library", choices=STEMS, action="append", help="one of the two, not both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the models are written, and removed")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        library, what, folder, result = arguments.measure
        measure(library, what, Path(folder), Path(result))
        return
    rows = []
    for library in arguments.library or STEMS:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
            rows += compare(library, arguments, Path(work))
    print(f"{machine()}, medians of {arguments.rounds} rounds\n")
    print(markdown(("", "s", "of load_file", "CPU s", "of load_file", "anon MiB"), rows))


if __name__ == "__main__":
    main()
