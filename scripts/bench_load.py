"""Time until a converted model can be used, and the memory that takes, beside what nobody can do without.

    python scripts/bench_load.py
    python scripts/bench_load.py --gigabytes 8 --method mxfp8 --library transformers

Makes a transformer of Qwen-Image or a Qwen2 of about that many gigabytes in BF16, random weights, and converts it. Each
round then runs, each in a process of its own and after all imports, on files in the page cache:

load_file           ``safetensors.torch.load_file`` of every file of the converted model
omni_convert.load   the converted model, on the CPU
from_pretrained     the library's own, of the plain BF16 model: what it needs to build any model of that class
online              ``omni_convert.load`` of the plain model, quantized while it loads

All touch every page of every tensor before the clock stops: files are mapped and would otherwise be read later. "Ready"
is the processor time until then, which does not grow with the size of tensors where they are only mapped. Memory is
anonymous memory beyond that of a process that has only imported; mapped files are not part of it. Ratios are medians of
those within a round, with their range; on a machine that does other work, those of processor time say more.
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
from omni_convert.runtime.component import read_tensors

PAGE = 4096
SHARD_BYTES = 4e9
WAYS = ("imports", "load_file", "omni_convert.load", "from_pretrained", "online")
HEAD = ("", "s", "of load_file", "CPU s", "of load_file", "ready, CPU s", "of from_pretrained", "anon MiB")
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
    (folder / f"{STEMS[library]}.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def touch(tensors: Iterable[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.detach().contiguous().view(-1).view(torch.uint8)[::PAGE].sum()


def load_plain(library: str, folder: Path) -> Any:
    """With the library alone."""
    if library == "diffusers":
        from diffusers import QwenImageTransformer2DModel

        return QwenImageTransformer2DModel.from_pretrained(folder, dtype=torch.bfloat16)
    from transformers import Qwen2ForCausalLM

    return Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def measure(library: str, what: str, method: str, work: Path) -> None:
    """In a process of its own; ``work/result`` receives seconds, those of processor time, and those until ready."""
    module = {"diffusers": "diffusers.models.transformers.transformer_qwenimage",
              "transformers": "transformers.models.qwen2.modeling_qwen2"}[library]  # fmt: skip
    importlib.import_module(module)
    importlib.import_module("omni_convert.online")
    start, cpu = time.perf_counter(), time.process_time()
    tensors: list[torch.Tensor] = []
    if what == "load_file":
        files = [load_file(file) for file in sorted((work / "out").glob("*.safetensors"))]
        tensors = [tensor for found in files for tensor in found.values()]
    elif what != "imports":
        if what == "online":
            model = omni_convert.load(work / "plain", method=method, target="omni-convert")
        else:
            model = (
                load_plain(library, work / "plain") if what == "from_pretrained" else omni_convert.load(work / "out")
            )
        tensors = [*model.parameters(), *model.buffers()]
    ready = time.process_time() - cpu
    touch(tensors)
    (work / "result").write_text(f"{time.perf_counter() - start} {time.process_time() - cpu} {ready}")


def ratios(ours: Iterable[float], theirs: Iterable[float]) -> str:
    """Round by round."""
    found = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})"


def compare(library: str, arguments: argparse.Namespace, work: Path) -> list[tuple[str, ...]]:
    """A row for every way to load."""
    write_model(build(library, arguments.gigabytes, arguments.hidden), library, work / "plain")
    omni_convert.convert(work / "plain", work / "out", method=arguments.method, target="omni-convert")
    times: dict[str, list[list[float]]] = {what: [] for what in WAYS}
    usages: dict[str, list[Usage]] = {what: [] for what in WAYS}
    for _ in range(arguments.rounds):
        for what, found in times.items():
            usages[what].append(
                run([sys.executable, __file__, "--measure", library, what, arguments.method, str(work)])
            )
            found.append([float(text) for text in (work / "result").read_text().split()])
    imported = statistics.median(usage.anonymous for usage in usages.pop("imports"))
    size = sum(file.stat().st_size for file in (work / "out").glob("*.safetensors")) / 1e9
    rows = []
    for what, found in usages.items():
        wall, cpu, ready = (list(column) for column in zip(*times[what], strict=True))
        files, plain = times["load_file"], times["from_pretrained"]
        rows.append((
            f"{library}, {arguments.method}, {size:.2f} GB: {what}",
            f"{statistics.median(wall):.2f}", ratios(wall, [row[0] for row in files]),
            f"{statistics.median(cpu):.2f}", ratios(cpu, [row[1] for row in files]),
            f"{statistics.median(ready):.2f}", ratios(ready, [row[2] for row in plain]),
            f"{statistics.median(usage.anonymous for usage in found) - imported:.0f}",
        ))  # fmt: skip
    print(budget(work), file=sys.stderr)
    return rows


def budget(work: Path) -> str:
    """What loading online may take: the quantized layers, and two of them as they are stored."""
    out, plain = (read_tensors(sorted((work / name).glob("*.safetensors"))) for name in ("out", "plain"))
    layers = [name.rpartition(".")[0] for name in out if name.endswith((".weight_scale", ".weight_scale_inv"))]
    held = sum(spec.nbytes for name, spec in out.items() if name.rpartition(".")[0] in layers and "bias" not in name)
    largest = max(plain[f"{layer}.weight"].nbytes for layer in layers)
    return f"online: the quantized layers take {held >> 20} MiB, two of the largest in BF16 {2 * largest >> 20} MiB"


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
        library, what, method, work = arguments.measure
        measure(library, what, method, Path(work))
        return
    rows = []
    for library in arguments.library or STEMS:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
            rows += compare(library, arguments, Path(work))
    print(f"{machine()}, medians of {arguments.rounds} rounds\n")
    print(markdown(HEAD, rows))


if __name__ == "__main__":
    main()
