"""Every CUDA kernel gives the numbers of its definition: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def test_kernels_give_the_numbers_of_their_definitions() -> None:
    """In a process of its own: Triton decides at its import whether it interprets."""
    pytest.importorskip("triton", reason="there is no Triton for this machine")
    tests = Path(__file__).with_name("cuda_arithmetic.py")
    env = dict(os.environ)
    if not torch.cuda.is_available():
        env |= {"TRITON_INTERPRET": "1", "CC": "cc"}  # the interpreter needs no compiler, whatever its name
    command = [sys.executable, "-m", "pytest", "-x", "--no-header", "-p", "no:cacheprovider", str(tests)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tests.parents[2])
    assert result.returncode == 0, result.stdout[-6000:]
    assert " passed" in result.stdout
