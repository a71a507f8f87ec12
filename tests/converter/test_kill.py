"""SIGKILL at random moments, again and again: nothing looks whole that is not, and the end is that of one run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from hostile.small import QWEN_CONFIG, Tensor, snapshot, write_sharded
from hostile.small import random as random_tensor

from omni_convert.converter.convert import convert

KILLS = 100
KILLER = """
import os, random, signal, sys, time
from pathlib import Path

from omni_convert.converter import convert

source, out, method, seed, kills = sys.argv[1:]
convert.PIECE_BYTES = 1 << 15  # many steps even here
chance, root = random.Random(int(seed)), Path(out)


def run(folder):
    convert.convert(source, folder, method=method, threads=2)


def child():
    pid = os.fork()
    if not pid:
        run(root)
        os._exit(0)
    return pid


run(root.with_name("warm"))  # imports and compiled kernels
started = time.perf_counter()
os.waitpid(child(), 0)
whole = time.perf_counter() - started
print("finished", flush=True)
sys.stdin.readline()
killed = 0
while killed < int(kills):
    pid = child()
    time.sleep(chance.uniform(0, whole))
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    killed += os.WIFSIGNALED(status)
    print("killed" if os.WIFSIGNALED(status) else "finished" if not status else "failed", flush=True)
    sys.stdin.readline()
"""


def spread_shards(blocks: int = 6, shards: int = 9) -> list[Mapping[str, Tensor]]:
    """Layers that are fused lie in different shards."""
    names = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")]
    layers = [f"transformer_blocks.{block}.{name}.weight" for block in range(blocks) for name in names]
    weights = {name: random_tensor(128 + 16 * (place % 5), 256, seed=place) for place, name in enumerate(layers)}
    return [dict(list(weights.items())[place::shards]) for place in range(shards)]


@pytest.mark.parametrize(("method", "seed"), [("int8", 1), ("fp8", 2)])
def test_killed_at_random_moments(tmp_path: Path, method: str, seed: int) -> None:
    source = write_sharded(tmp_path / "model", spread_shards(), QWEN_CONFIG)
    (source / "README.md").write_text("hello")
    before, out = snapshot(source), tmp_path / "out"
    convert(source, tmp_path / "fresh", method=method)
    fresh = snapshot(tmp_path / "fresh")
    seen: dict[str, int] = {"killed": 0, "finished": 0, "looks whole": 0, "kept files": 0}
    command = [sys.executable, "-c", KILLER, source, out, method, seed, KILLS // 2]
    with subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        for line in process.stdout:
            seen[line.strip()] += 1
            look(out, fresh, seen, finished=line.strip() == "finished")
            process.stdin.write("\n")
            process.stdin.flush()
    assert process.wait() == 0
    assert seen["killed"] == KILLS // 2
    assert seen["kept files"] > KILLS // 10  # most moments were in the middle
    convert(source, out, method=method)
    assert snapshot(out) == fresh
    assert snapshot(source) == before


def look(out: Path, fresh: Mapping[str, str], seen: dict[str, int], *, finished: bool) -> None:
    """What is there now; a finished output makes room for the next."""
    found = snapshot(out) if out.exists() else {}
    if finished or (found and ".omni_convert.partial" not in found):
        assert found == fresh
        for path in out.iterdir():
            path.unlink()
        return
    weights = [name for name in fresh if name.endswith(".safetensors")]
    whole = [name for name in weights if name in found]
    assert all(found[name] == fresh[name] for name in whole)
    seen["kept files"] += len(whole) > 0
    if "config.json" in found:
        seen["looks whole"] += 1
        assert {name: found[name] for name in fresh} == fresh
