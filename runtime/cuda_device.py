"""What kernels ask about CUDA devices and this process."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys

import torch

Capability = tuple[int, int]
"""Compute capability, such as (9, 0)."""


def version(capability: Capability) -> str:
    """As NVIDIA writes it: 9.0."""
    return f"{capability[0]}.{capability[1]}"


@functools.cache
def capability_of(device: torch.device) -> Capability:
    """Of a CUDA device; of others, on which only Triton's interpreter runs these kernels, the lowest that they take."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


@functools.cache
def missing_triton() -> str | None:
    """Why no Triton kernel can run in this process; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    # It compiles what launches its kernels, and says so only when one is launched.
    has_compiler = "CC" in os.environ or shutil.which("gcc") or shutil.which("clang")
    return None if has_compiler else "Triton needs a C compiler: gcc, clang or what CC names"


def cuda_build() -> tuple[int, int]:
    """The CUDA that PyTorch was built with. A build without it has no device to fail on and passes for the newest."""
    if torch.version.cuda is None:
        return sys.maxsize, 0
    major, minor = torch.version.cuda.split(".")[:2]
    return int(major), int(minor)
