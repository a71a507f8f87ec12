"""Two processes that run models together."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conversions import matrices, weights
from kinds import CHOICES

import omni_convert

_RANK = """
import sys, torch, omni_convert
jobs, out, store, rank = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=store, rank=int(rank), world_size=2)
found = []
for folder, options, inputs, tokens in torch.load(jobs, weights_only=False):
    model = omni_convert.load(folder, tp_rank=int(rank), tp_size=2, **options)
    with torch.inference_mode():
        output = model(**inputs)[0]
        generated = model.generate(**inputs, max_new_tokens=tokens, do_sample=False) if tokens else None
    found.append((output, generated, {name: value.clone() for name, value in model.state_dict().items()}))
torch.save(found, f"{out}-{rank}")
"""


class Job(NamedTuple):
    """What both ranks load, with which options, and run. ``tokens``: how many to generate."""

    folder: Path
    options: dict[str, Any]
    inputs: dict[str, Any]
    tokens: int = 0


class Done(NamedTuple):
    """What a rank found."""

    output: torch.Tensor
    generated: torch.Tensor | None
    state: dict[str, torch.Tensor]


def run_ranks(jobs: Sequence[Job], work: Path) -> list[tuple[Done, Done]]:
    """Of every job, what both ranks found."""
    torch.save([tuple(job._replace(folder=str(job.folder))) for job in jobs], work / "jobs")
    arguments = [str(work / "jobs"), str(work / "out"), f"file://{work / 'store'}"]
    ranks = [subprocess.Popen([sys.executable, "-c", _RANK, *arguments, str(rank)]) for rank in (0, 1)]
    assert [rank.wait(240) for rank in ranks] == [0, 0]
    first, second = (torch.load(work / f"out-{rank}") for rank in (0, 1))
    return [(Done(*a), Done(*b)) for a, b in zip(first, second, strict=True)]


def convert(source: Path, out: Path, kind: str, **more: Any) -> Path:
    static = {"input_scales": dict.fromkeys(matrices(weights(source)), 0.5)} if kind == "fp8 static" else {}
    omni_convert.convert(source, out, target="omni-convert", **CHOICES[kind], **static, **more)
    return out
