"""On a real Ray cluster of two nodes on this machine: the bytes and errors of one process, whatever is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile.small import QWEN_CONFIG, Tensor, qwen_shards, random, snapshot, write_json, write_model, write_sharded
from ray_cluster import Nodes, driver, freeze_one

from omni_convert.converter import parts
from omni_convert.converter.convert import convert, plan
from omni_convert.converter.output import PARTIAL_SUFFIX
from omni_convert.converter.parts import split, whole_file
from omni_convert.formats.errors import OmniConvertError, SourceError, UsageError

pytest.importorskip("ray")

PART = 4 << 20
MARKER = ".omni_convert.partial"
GIANT = "transformer/diffusion_pytorch_model-00001-of-00003.safetensors"


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    cluster = Nodes()
    yield cluster
    cluster.close()


@pytest.fixture
def here(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process leads runs on the cluster."""
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    monkeypatch.setattr(parts, "SMALLEST_PART", PART)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A giant shard and two small ones; queries, keys and values of one block are spread over all of them."""
    folder = tmp_path_factory.mktemp("ray") / "model"
    first, second = (dict(tensors) for tensors in qwen_shards(width=1024))
    spread: list[dict[str, Tensor]] = [
        {name: second.pop(name) for name in [*second] if part in name} for part in ("attn.to_k", "attn.to_v")
    ]
    write_sharded(folder / "transformer", [first | second, *spread], QWEN_CONFIG)
    index = {"_class_name": "QwenImagePipeline", "transformer": ["diffusers", "QwenImageTransformer2DModel"]}
    write_json(folder / "model_index.json", index)
    (folder / "vae.bin").write_bytes(random(3 * PART // 2).bits.tobytes())
    os.truncate(folder / "vae.bin", 48 * PART)  # zeros: long enough for workers to be caught writing
    (folder / "empty").touch()
    return folder


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What one process makes of it, by method."""
    outputs = tmp_path_factory.mktemp("local")
    for method in ("int8", "fp8"):
        convert(source, outputs / method, method=method)
    return {method: snapshot(outputs / method) for method in ("int8", "fp8")}


@pytest.mark.parametrize("method", ["int8", "fp8"])
def test_same_bytes_as_in_one_process(
    source: Path, expected: dict[str, dict[str, str]], tmp_path: Path, here: None, method: str
) -> None:
    planned = plan(source, method=method)
    assert len(split(planned, whole_file(planned, GIANT), PART)) > 8
    convert(source, tmp_path / "out", method=method, engine="ray")
    assert snapshot(tmp_path / "out") == expected[method]


def test_statistics_of_parts_are_those_of_whole_files(source: Path, tmp_path: Path, here: None) -> None:
    local = convert(source, tmp_path / "local", method="int8", statistics=True)
    assert local.statistics
    assert (
        convert(source, tmp_path / "out", method="int8", statistics=True, engine="ray").statistics == local.statistics
    )


def test_node_is_lost_in_the_middle(
    nodes: Nodes, source: Path, expected: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """What its worker had begun is done by another."""
    out = tmp_path / "out"
    try:
        with driver(nodes, "--method", "int8", source, out, part=PART) as process:
            freeze_one(nodes.workers, process)
            assert process.poll() is None and not (out / "omni_convert.json").exists()
            nodes.lose_second()
            output, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
            assert output.startswith("layers quantized  24 to int8")
        assert snapshot(out) == expected["int8"]
    finally:
        nodes.replace_second()


def is_noted(marker: Path, name: str) -> bool:
    """Whether the journal has a whole line for the file, which gets its name a moment before."""
    return marker.is_file() and any(
        f'"file": "{name}"' in line and line.endswith("\n") for line in marker.read_text().splitlines(keepends=True)
    )


def test_run_goes_on_after_its_process_was_killed(
    nodes: Nodes, source: Path, expected: dict[str, dict[str, str]], tmp_path: Path, here: None
) -> None:
    """The giant is written last, so that it is in the middle when a small file is whole. Nobody else may write."""
    out, small = tmp_path / "out", GIANT.replace("1-of", "2-of")
    with driver(nodes, "--method", "int8", source, out, part=1 << 30) as process:
        while not is_noted(out / MARKER, small) and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        assert not (out / "omni_convert.json").exists()
        with pytest.raises(OmniConvertError, match=f"process {process.pid} on {os.uname().nodename} is writing there"):
            convert(source, out, method="int8", engine="ray")
        process.kill()
        process.communicate()
    written = (out / small).stat().st_mtime_ns
    convert(source, out, method="int8", engine="ray", resume=True)
    assert snapshot(out) == expected["int8"]
    assert (out / small).stat().st_mtime_ns == written


def test_signal_ends_a_run_tidily(nodes: Nodes, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with driver(nodes, "--method", "int8", source, out, part=PART) as process:
        worker = freeze_one(nodes.all_workers, process)
        process.terminate()  # Ray would have it end the process at once
        os.kill(worker, signal.SIGCONT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    if "task_manager.cc" in errors:
        pytest.xfail("Ray's own process ended while it cancelled a task, which happens once in a while")
    assert "Error: Interrupted." in errors and "Traceback" not in errors
    assert not list(out.rglob(f"*?{PARTIAL_SUFFIX}"))


def test_weight_that_is_not_finite(tmp_path: Path, here: None) -> None:
    bad = random(4096, 1024)
    bad.bits[3000, 7] = 0x7F80
    source = write_model(tmp_path / "model", {}, {"a.ff.weight": random(4096, 1024), "b.ff.weight": bad})
    messages = []
    for engine in ("local", "ray"):
        with pytest.raises(SourceError, match="holds NaN or Inf at row 3000, column 7") as caught:
            convert(source, tmp_path / "out", method="int8", engine=engine)
        assert not (tmp_path / "out").exists()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_more_threads_than_any_node_has(source: Path, tmp_path: Path, here: None) -> None:
    with pytest.raises(UsageError, match="--threads 2: the largest node of the Ray cluster has 1 processors"):
        convert(source, tmp_path / "out", method="int8", engine="ray", threads=2)
    assert not (tmp_path / "out").exists()


def test_node_that_sees_other_files(nodes: Nodes, source: Path, tmp_path: Path, here: None) -> None:
    """A third node, for which something else is mounted where the source is."""
    start = f"mount -t tmpfs tmpfs {source} && exec ray start --address {nodes.address} --num-cpus 1 --block"
    command = ["unshare", "--mount", "bash", "-c", start]
    if subprocess.run([*command[:-1], "mount -t tmpfs tmpfs /mnt"], capture_output=True).returncode:
        pytest.skip("mounting takes root")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(command, env={**os.environ, "PATH": path}, stdout=subprocess.DEVNULL)
    try:
        _wait_for_nodes(3)
        with pytest.raises(OmniConvertError, match="does not have this file, expected the one that") as caught:
            convert(source, tmp_path / "out", method="int8", engine="ray")
        assert str(caught.value).startswith(f"{source}/")
        assert not (tmp_path / "out").exists()
    finally:
        process.terminate()
        process.wait()
        _wait_for_nodes(2)


def _wait_for_nodes(count: int) -> None:
    import ray

    ray.init(address="auto", logging_level="WARNING")
    try:
        for _ in range(300):
            if sum(node["Alive"] for node in ray.nodes()) == count:
                return
            time.sleep(0.1)
        raise AssertionError(f"expected {count} nodes, found {ray.nodes()}")
    finally:
        ray.shutdown()


@pytest.mark.parametrize("named", [True, False])
def test_cluster_that_is_gone(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    """By its name, or as the last that was started here."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    if named:
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    else:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    origin = "RAY_ADDRESS" if named else tmp_path / "ray" / "ray_current_cluster"
    with pytest.raises(OmniConvertError, match=rf"cluster 127.0.0.1:1 \({origin}\) does not answer"):
        convert(source, tmp_path / "out", method="int8", engine="ray")
    assert not (tmp_path / "out").exists()
