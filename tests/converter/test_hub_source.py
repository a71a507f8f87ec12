"""Conversion straight from the Hub: the tests' own, through huggingface_hub's real client and the real command line."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hub_cli import Cli, contents
from hub_server import TOKEN, HubServer

import omni_convert


@pytest.fixture(scope="session")
def int8_output(qwen_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline, converted from its folder; its q, k and v share scales across shards."""
    out = tmp_path_factory.mktemp("int8") / "out"
    omni_convert.convert(qwen_image, out, method="int8")
    return out


def manifest(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "omni_convert.json").read_text())
    return found


@pytest.mark.parametrize("name", ["hub", "xet_hub"])
def test_bytes_are_those_of_a_local_folder(
    name: str, request: pytest.FixtureRequest, qwen_image: Path, int8_output: Path, tmp_path: Path
) -> None:
    hub: HubServer = request.getfixturevalue(name)
    hub.store.add_folder("org/qwen", qwen_image)
    cli = Cli(hub, tmp_path / "work")
    cli.succeeds("--method", "int8", "org/qwen", "out", token=None)
    out = cli.folder / "out"
    assert contents(out) == contents(int8_output)
    source = manifest(out)["source"]
    assert (source["repo"], source["revision"]) == ("org/qwen", hub.store.repos["org/qwen"].refs["main"])
    assert source["files"].keys() == contents(out).keys()
    for path in qwen_image.rglob("*.safetensors"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert source["files"][path.relative_to(qwen_image).as_posix()]["sha256"] == digest
    assert "mtime_ns" not in str(source)


def test_offline_all_comes_from_the_cache(hub: HubServer, cli: Cli, qwen_image: Path) -> None:
    hub.store.add_folder("org/qwen", qwen_image)
    first = cli.fails("--method", "int8", "org/qwen", "out", HF_HUB_OFFLINE="1")
    assert "org/qwen@main: is no folder here, and the Hub cache does not hold it" in first
    cli.succeeds("--method", "int8", "org/qwen", "out")
    hub.die()
    cli.succeeds("--method", "int8", "org/qwen", "again", HF_HUB_OFFLINE="1")
    assert contents(cli.folder / "out", "") == contents(cli.folder / "again", "")


def test_offline_what_is_missing_is_told(hub: HubServer, cli: Cli, qwen_image: Path) -> None:
    hub.store.add_folder("org/qwen", qwen_image)
    offline = ("--method", "int8", "org/qwen", "out")
    cli.succeeds("--method", "int8", "org/qwen", "first")
    (tokenizer,) = cli.home.glob("hub/models--*/snapshots/*/tokenizer/tokenizer.json")
    tokenizer.unlink()
    found = cli.fails(*offline, HF_HUB_OFFLINE="1")
    assert "tokenizer/tokenizer.json is not in the Hub cache (1 of " in found
    assert not (cli.folder / "out").exists()
    (noted,) = cli.home.glob("hub/models--*/omni-convert/*.json")
    noted.unlink()
    done = cli.run(*offline, "--json", HF_HUB_OFFLINE="1")
    assert "Warning: org/qwen@" in done.stderr
    assert "does not tell which files the repository has" in json.loads(done.stdout)["warnings"][0]
    assert not noted.exists()


def test_a_plan_reads_headers_alone(hub: HubServer, cli: Cli, qwen_image: Path) -> None:
    hub.store.add_folder("org/qwen", qwen_image)
    found = json.loads(cli.succeeds("--method", "int8", "org/qwen", "out", "--dry-run", "--json"))
    weights = sorted(path.relative_to(qwen_image).as_posix() for path in qwen_image.rglob("*.safetensors"))
    total = sum(path.stat().st_size for path in qwen_image.rglob("*") if path.is_file())
    asked = [request for request in hub.requests if request.path.endswith(".safetensors")]
    assert all(request.range == "bytes=0-65535" for request in asked)
    assert hub.bytes_sent() < 65536 * len(weights) + 100_000 < total / 5
    assert not {"tokenizer.json", "README.md"} & {name.rpartition("/")[2] for name in hub.files_sent()}
    assert not any(name.endswith(".safetensors") for name in cli.cached()), "no stand-in goes into the cache"
    planned = cli.folder.parent / "plan.json"
    planned.write_text(cli.succeeds("--method", "int8", str(qwen_image), "out", "--dry-run", "--json"))
    local = json.loads(planned.read_text())
    assert found["components"] == local["components"]
    commit = hub.store.repos["org/qwen"].refs["main"]
    to_download = total - sum(len((qwen_image / name).read_bytes()) for name in hub.files_sent() - set(weights))
    downloads = found["source"].pop("bytes_to_download")
    assert found["source"] == {"repo": "org/qwen", "revision": commit}
    assert downloads == to_download
    assert local["source"] is None


def test_only_what_the_model_needs_is_downloaded(hub: HubServer, cli: Cli, qwen_image: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(qwen_image, tmp_path / "model")
    unwanted = {
        "transformer/diffusion_pytorch_model.fp16.safetensors": "another copy of the weights",
        "text_encoder/pytorch_model.bin": "another copy of the weights",
        "text_encoder/model.fp16-00001-of-00002.safetensors": "another copy of the weights",
        "qwen-image.safetensors": "weights beside the model's components",
        "original/consolidated.00.pth": "weights beside the model's components",
        "qwen-q4.gguf": "weights for another library",
        "onnx/model.onnx": "weights for another library",
        "onnx/model.onnx_data_1": "weights for another library",
        "onnx/model.onnx.data": "weights for another library",
    }
    for name in unwanted:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no weights at all" * 1000)
    hub.store.add_folder("org/qwen", folder)
    cli.succeeds("--method", "int8", "org/qwen", "out")
    assert not hub.files_sent() & unwanted.keys()
    assert manifest(cli.folder / "out")["source"]["left_out"] == unwanted
    assert not contents(cli.folder / "out").keys() & unwanted.keys()


def test_pickles_are_needed_where_there_is_nothing_else(
    hub: HubServer, cli: Cli, qwen_image: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(qwen_image, tmp_path / "model")
    for path in (folder / "text_encoder").glob("*.safetensors*"):
        path.unlink()
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(b"pickled" * 100)
    hub.store.add_folder("org/qwen", folder)
    cli.succeeds("--method", "fp8", "org/qwen", "out")
    assert (cli.folder / "out" / "text_encoder" / "pytorch_model.bin").read_bytes() == b"pickled" * 100


def test_a_local_folder_of_that_name_wins(hub: HubServer, cli: Cli, qwen_image: Path) -> None:
    shutil.copytree(qwen_image, cli.folder / "org" / "qwen")
    done = cli.run("--method", "fp8", "org/qwen", "out")
    assert done.returncode == 0
    assert "Note: org/qwen is what lies here, not the repository of that name on the Hub." in done.stderr
    assert "Note: org/qwen is what" in cli.run("inspect", "org/qwen").stderr
    assert hub.requests == []


def test_inspect_reads_headers(hub: HubServer, cli: Cli, int8_output: Path) -> None:
    hub.store.add_folder("org/quantized", int8_output)
    found = json.loads(cli.succeeds("inspect", "org/quantized", "--json"))
    local = json.loads(cli.succeeds("inspect", str(int8_output), "--json"))
    assert found.pop("path").startswith("org/quantized@")
    assert local.pop("path") == str(int8_output)
    assert found == local
    assert all(request.range for request in hub.requests if request.path.endswith(".safetensors"))


def test_a_private_repository_and_where_its_token_goes(hub: HubServer, cli: Cli, qwen_image: Path) -> None:
    hub.store.add_folder("org/qwen", qwen_image, private=True)
    done = cli.run("--method", "fp8", "org/qwen@main", "out")
    assert done.returncode == 0
    assert {request.token for request in hub.requests if request.host == "localhost"} == {None}
    assert {request.token for request in hub.requests if request.host == "127.0.0.1"} == {TOKEN}
    written = b"".join(contents(cli.folder / "out", "").values()) + (done.stdout + done.stderr).encode()
    assert TOKEN.encode() not in written


def test_revisions(hub: HubServer, cli: Cli, qwen_image: Path, tmp_path: Path) -> None:
    repo = hub.store.add_folder("org/qwen", qwen_image)
    old = repo.refs["main"]
    changed = shutil.copytree(qwen_image, tmp_path / "model")
    (changed / "README.md").write_text("# Better\n")
    hub.store.add_folder("org/qwen", changed)
    repo.refs["refs/pr/1"] = old
    cli.succeeds("--method", "fp8", "org/qwen", "new")
    assert (cli.folder / "new" / "README.md").read_text() == "# Better\n"
    for revision in (old, "refs/pr/1"):
        out = revision.replace("/", "-")
        cli.succeeds("--method", "fp8", f"org/qwen@{revision}", out)
        assert (cli.folder / out / "README.md").read_bytes() == (qwen_image / "README.md").read_bytes()
        assert manifest(cli.folder / out)["source"]["revision"] == old


def test_verify_against_the_hub(hub: HubServer, cli: Cli, qwen_image: Path, int8_output: Path) -> None:
    hub.store.add_folder("org/qwen", qwen_image)
    found = json.loads(cli.succeeds("verify", str(int8_output), "--source", "org/qwen", "--json"))
    assert found["ok"]
    tensors = manifest(int8_output)["components"]["transformer"]["tensors"].values()
    assert len(found["layers"]) == sum(tensor["action"] == "int8" for tensor in tensors) > 0


_SCRATCH = """
import sys, time, threading
from pathlib import Path
from omni_convert.converter.convert import Means, plan, run
scratch, found, stop = Path("scratch"), [], threading.Event()
def watch():
    while not stop.wait(0.001):
        found.append(0)
        for path in list(scratch.rglob("*.safetensors")):
            try:
                found[-1] += path.stat().st_size
            except FileNotFoundError:
                pass
thread = threading.Thread(target=watch)
thread.start()
means = Means(scratch=scratch, threads=3, memory=3_000_000)  # small pieces, of which a shard has several
run(plan("org/qwen", method="int8"), Path("out"), means, progress=False, started=0)
stop.set()
thread.join()
print(max(found), [path.name for path in scratch.rglob("*.safetensors")])
sys.exit()
"""


def test_scratch_holds_few_bytes_and_nothing_at_the_end(
    hub: HubServer, cli: Cli, qwen_image: Path, int8_output: Path
) -> None:
    hub.store.add_folder("org/qwen", qwen_image)
    most, left = cli.succeeds(code=_SCRATCH).split(maxsplit=1)
    assert left.strip() == "[]"
    sizes = [path.stat().st_size for path in qwen_image.rglob("*.safetensors")]
    assert 0 < int(most) <= 3 * max(sizes) < sum(sizes), "bytes of about three shards, whatever the whole has"
    assert not any(name.endswith(".safetensors") for name in cli.cached())
    out = cli.folder / "out"
    assert contents(out) == contents(int8_output)


_LOAD = """
import sys, torch, omni_convert
loaded = omni_convert.load({name!r}, **{options!r})
pipe = getattr(loaded, "transformer", loaded)
total = sum(value.double().abs().sum() for value in pipe.state_dict().values() if value.is_floating_point())
print(f"{{total:.6f}}")
sys.exit()
"""


@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}])
def test_load_from_the_hub(
    hub: HubServer, cli: Cli, qwen_image: Path, int8_output: Path, options: dict[str, str]
) -> None:
    folder = shutil.copytree(qwen_image if options else int8_output, cli.folder / "model") / "transformer"
    (folder / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"no weights")
    hub.store.add_folder("org/model", folder)
    (folder / "diffusion_pytorch_model.fp16.safetensors").unlink()
    found = cli.succeeds(code=_LOAD.format(name="org/model", options=options)).split()[-1]
    assert found == cli.succeeds(code=_LOAD.format(name=str(folder), options=options)).split()[-1]
    assert "diffusion_pytorch_model.fp16.safetensors" not in hub.files_sent()
