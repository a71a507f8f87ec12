"""What can go wrong between here and the Hub: every failure ends in one paragraph, and the next run goes on."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
from hub_cli import Cli, contents
from hub_server import OTHER, TOKEN, Fault, HubServer
from publishing import published, weights_of
from signals import default_signals

import omni_convert

_T = TypeVar("_T")
SHARD = "diffusion_pytorch_model-00002-of-00004.safetensors"
IMPATIENT = "from omni_convert.converter import hub_errors; hub_errors.WAITS[:] = [0.1]"
"""Before a run: two tries, and no long wait for the second."""


@pytest.fixture(scope="session")
def fp8_output(qwen_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fp8") / "out"
    omni_convert.convert(qwen_image, out, method="fp8")
    return out


@pytest.fixture
def qwen(hub: HubServer, qwen_image: Path) -> HubServer:
    """The Hub with ``org/qwen``."""
    hub.store.add_folder("org/qwen", qwen_image)
    return hub


def same(out: Path, expected: Path) -> bool:
    return contents(out) == contents(expected)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(f"cdn.*{SHARD}", drop_after=100_000, times=2),
        Fault(f"cdn.*{SHARD}", status=500),
        Fault(f"cdn.*{SHARD}", status=429, headers={"Retry-After": "1"}),
        Fault("/api/models/org/qwen/tree", status=429),
        Fault("/api/models/org/qwen/revision", status=503),
        Fault(SHARD, method="HEAD", status=500),
        Fault("config.json", method="HEAD", status=502),
    ],
    ids=str,
)
def test_one_fault_costs_some_time(qwen: HubServer, cli: Cli, fp8_output: Path, fault: Fault) -> None:
    qwen.faults.append(fault := replace(fault))
    cli.succeeds("--method", "fp8", "org/qwen", "out")
    assert fault.times == 0
    assert same(cli.folder / "out", fp8_output)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault("cdn", status=429, times=99), "the Hub answers no more requests for now (429, too many)"),
        (Fault("/revision/", status=503, times=99), "org/qwen: the Hub answers 503"),
        (Fault("/revision/", drop_after=10, times=99), "org/qwen: found no such folder here, and the connection"),
        (Fault("cdn", status=403, times=99), "the Hub forbids it (403)"),
    ],
)
def test_faults_without_end(qwen: HubServer, cli: Cli, fault: Fault, text: str) -> None:
    qwen.faults.append(replace(fault))
    found = cli.fails("--method", "fp8", "org/qwen", "out", code=IMPATIENT)
    assert text in found
    assert not (cli.folder / "out").exists()


def test_the_server_dies_in_the_middle(qwen: HubServer, cli: Cli, fp8_output: Path) -> None:
    planning, download = Fault(f"cdn.*{SHARD}"), Fault(f"cdn.*{SHARD}", drop_after=100_000, die=True)
    qwen.faults += [planning, download]
    found = cli.fails("--method", "fp8", "org/qwen", "out", code=IMPATIENT.replace("0.1", ""))
    assert (
        f"org/qwen: transformer/{SHARD}: the connection to {qwen.url} failed (ConnectError), again and again" in found
    )
    assert "1 of 16 files are finished and kept: the same command goes on from there." in found
    qwen.revive()
    before = len(qwen.requests)
    cli.succeeds("--method", "fp8", "org/qwen", "out", "--resume")
    assert same(cli.folder / "out", fp8_output)
    again = [request.path for request in qwen.requests[before:] if request.sent]
    assert not any("00001-of-00004" in path and "transformer" in path for path in again)


@pytest.mark.parametrize("to_hub", [False, True])
def test_killed_in_the_middle(qwen: HubServer, cli: Cli, fp8_output: Path, to_hub: bool) -> None:
    """The download goes on at the byte that came last, also from repository to repository."""
    qwen.faults += [Fault(f"cdn.*{SHARD}"), Fault(f"cdn.*{SHARD}", slow=0.3)]
    arguments = ("--method", "fp8", "org/qwen", "hub:me/out" if to_hub else "out")
    with subprocess.Popen(cli.command(*arguments), env=cli.environment(), cwd=cli.folder) as process:
        part = _wait_for(lambda: [path for path in cli.home.rglob(_digest(qwen) + "*") if path.stat().st_size])[0]
        process.send_signal(signal.SIGKILL)
    held, size = part.stat().st_size, qwen.store.repos["org/qwen"].commit("main").files[f"transformer/{SHARD}"].size
    assert 0 < held < size
    assert SHARD not in cli.cached(), "it was killed while this file came"
    before = len(qwen.requests)
    cli.succeeds(*arguments, "--resume")
    asked = [request for request in qwen.requests[before:] if SHARD in request.path and request.sent]
    assert [request.sent for request in asked if request.range == f"bytes={held}-"] == [size - held]
    assert sum(request.sent for request in asked if request.range != "bytes=0-65535") == size - held
    if to_hub:
        assert weights_of(published(qwen, "me/out")) == weights_of(contents(fp8_output))
    else:
        assert same(cli.folder / "out", fp8_output)
    assert not part.exists()


def _digest(hub: HubServer) -> str:
    return str(hub.store.repos["org/qwen"].commit("main").files[f"transformer/{SHARD}"].sha256)


def test_an_interrupt_does_not_wait_for_the_download(qwen: HubServer, cli: Cli) -> None:
    qwen.faults += [Fault(f"cdn.*{SHARD}"), Fault(f"cdn.*{SHARD}", slow=5.0, times=9)]
    command = cli.command("--method", "fp8", "org/qwen", "out")
    process = subprocess.Popen(
        command, env=cli.environment(), cwd=cli.folder, stderr=subprocess.PIPE, text=True, preexec_fn=default_signals
    )
    first = cli.folder / "out" / "transformer" / SHARD.replace("00002", "00001")
    _wait_for(first.exists)
    time.sleep(0.3)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, found = process.communicate(timeout=60)
    assert time.monotonic() - begin < 8
    assert process.returncode == 1
    assert found.startswith("Error: Interrupted. 1 of 16 files are finished and kept")
    assert "Traceback" not in found


def _wait_for(condition: Callable[[], _T]) -> _T:
    end = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


@pytest.mark.parametrize(
    ("name", "token", "texts"),
    [
        ("org/none", TOKEN, ["org/none: found no such folder here, and no such repository on the Hub", "your token"]),
        (
            "org/none",
            None,
            ["found no such folder here, and no such repository", "log in (hf auth login, or HF_TOKEN)"],
        ),
        ("org/private", OTHER, ["org/private: found no such folder here", "a private one that you may not see"]),
        ("org/gated", None, ["access to it is restricted", "{url}/org/gated", "log in"]),
        ("org/gated", OTHER, ["access to it is restricted", "{url}/org/gated with the account of your token"]),
        ("org/qwen", "hf_wrongToken", ["the Hub refuses your token", "hf auth login"]),
        ("org/qwen@v9", TOKEN, ["org/qwen: the Hub has no revision v9", "{url}/org/qwen/tree/main"]),
        ("org/qwen@" + "0" * 40, TOKEN, ["the Hub has no revision 0000"]),
        ("org/empty", TOKEN, ["org/empty@", "found no weights"]),
        ("org/qwen/transformer", TOKEN, ["org/qwen/transformer: found nothing there"]),
    ],
)
@pytest.mark.parametrize("command", [("--method", "fp8", "{}", "out"), ("inspect", "{}")], ids=["convert", "inspect"])
def test_what_cannot_be_read(
    qwen: HubServer,
    cli: Cli,
    qwen_image: Path,
    command: tuple[str, ...],
    name: str,
    token: str | None,
    texts: list[str],
) -> None:
    qwen.store.add_folder("org/private", qwen_image, private=True)
    qwen.store.add_folder("org/gated", qwen_image, gated=True)
    qwen.store.create("org/empty")
    found = cli.fails(*(part.format(name) for part in command), token=token, code=IMPATIENT)
    for text in texts:
        assert text.format(url=qwen.url) in found
    assert not (cli.folder / "out").exists()
    assert str(token) not in found
    assert "/tmp/omni-convert-" not in found


def test_terms_that_were_accepted(hub: HubServer, cli: Cli, qwen_image: Path) -> None:
    hub.store.add_folder("org/gated", qwen_image, gated=True).allowed.add("somebody")
    cli.succeeds("--method", "fp8", "org/gated", "out", token=OTHER)


@pytest.mark.parametrize("option", [["--link"], ["--engine", "ray"]])
def test_options_that_need_a_folder(qwen: HubServer, cli: Cli, option: list[str]) -> None:
    found = cli.fails("--method", "fp8", "org/qwen", "out", *option)
    commit = qwen.store.repos["org/qwen"].refs["main"]
    assert f"hf download org/qwen --revision {commit} --local-dir DIR" in found


def test_a_revision_that_moved(qwen: HubServer, cli: Cli, qwen_image: Path, fp8_output: Path, tmp_path: Path) -> None:
    old = qwen.store.repos["org/qwen"].refs["main"]
    qwen.faults.append(Fault("generation_config", method="HEAD", status=403, times=99))
    assert "files are finished and kept" in cli.fails("--method", "fp8", "org/qwen", "out")
    qwen.faults.clear()
    changed = shutil.copytree(qwen_image, tmp_path / "model")
    (changed / "README.md").write_text("# Better\n")
    new = qwen.store.add_folder("org/qwen", changed).refs["main"]
    found = cli.fails("--method", "fp8", "org/qwen", "out")
    assert f"the repository differs: revision was {old!r}, now is {new!r}" in found
    cli.succeeds("--method", "fp8", f"org/qwen@{old}", "out", "--resume")
    assert same(cli.folder / "out", fp8_output)


def test_what_came_is_not_what_was_listed(qwen: HubServer, cli: Cli, qwen_image: Path, fp8_output: Path) -> None:
    blob = qwen.store.repos["org/qwen"].commit("main").files[f"transformer/{SHARD}"]
    right = blob.path.read_bytes()
    blob.path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    found = cli.fails("--method", "fp8", "org/qwen", "out")
    assert f"transformer/{SHARD} came with the hash" in found
    assert f"expected {blob.sha256}" in found
    assert SHARD not in cli.cached()
    assert not any(path.name == blob.sha256 for path in cli.home.rglob("*"))
    blob.path.write_bytes(right)
    cli.succeeds("--method", "fp8", "org/qwen", "out")
    assert same(cli.folder / "out", fp8_output)


_PLAN_THEN_RUN = """
import sys, time
from pathlib import Path
from omni_convert.converter.convert import Means, plan, run
planned = plan("org/qwen", method="fp8")
Path("planned").touch()
while not Path("go").exists():
    time.sleep(0.01)
run(planned, Path("out"), Means(), progress=False, started=0)
"""


def test_a_header_that_is_another_one_later(qwen: HubServer, cli: Cli) -> None:
    path = qwen.store.repos["org/qwen"].commit("main").files[f"transformer/{SHARD}"].path
    right = path.read_bytes()
    path.write_bytes(right.replace(b"BF16", b"F16 ", 1).replace(b'"F16 "', b'"F16" ', 1))
    command = cli.command(code=_PLAN_THEN_RUN)
    with subprocess.Popen(command, env=cli.environment(), cwd=cli.folder, stderr=subprocess.PIPE, text=True) as process:
        _wait_for((cli.folder / "planned").exists)
        path.write_bytes(right)
        (cli.folder / "go").touch()
        _, found = process.communicate(timeout=60)
    assert f"{SHARD}: its header is not the one that the plan was made from" in found
    assert not (cli.folder / "out").exists()


def test_a_damaged_cache(qwen: HubServer, cli: Cli) -> None:
    cli.succeeds("--method", "fp8", "org/qwen", "out")
    (cached,) = cli.home.rglob(f"snapshots/*/transformer/{SHARD}")
    whole = cached.read_bytes()
    cached.write_bytes(whole[:8] + whole[8:].replace(b"shape", b"chape", 1))
    found = cli.fails("--method", "fp8", "org/qwen", "again")
    assert SHARD in found
    cached.write_bytes(whole[:1000])
    cli.succeeds("--method", "fp8", "org/qwen", "third")


@pytest.mark.parametrize(
    ("name", "options"), [(f"transformer/{SHARD}", ["--hash-source"]), ("tokenizer/tokenizer.json", [])]
)
def test_a_cached_file_with_other_bytes(
    qwen: HubServer, cli: Cli, fp8_output: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: list[str]
) -> None:
    cli.succeeds("--method", "fp8", "org/qwen", "out")
    (cached,) = cli.home.rglob(f"snapshots/*/{name}")
    whole = cached.read_bytes()
    cached.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    few = "from omni_convert.converter import hub_downloads; hub_downloads._SMALL = 100_000"
    done = cli.run("--method", "fp8", "org/qwen", "again", *options, code=few)
    assert done.returncode == 0
    assert f"{name} is damaged in the Hub cache, and fetched again." in done.stderr
    assert same(cli.folder / "again", fp8_output)
    assert cached.read_bytes() == whole


def test_a_link_out_of_the_cache_is_cut_alone(qwen: HubServer, cli: Cli, fp8_output: Path, tmp_path: Path) -> None:
    cli.succeeds("--method", "fp8", "org/qwen", "out")
    (cached,) = cli.home.rglob("snapshots/*/tokenizer/tokenizer.json")
    own = tmp_path / "own.json"
    own.write_bytes(b"x" * cached.stat().st_size)
    cached.unlink()
    cached.symlink_to(own)
    cli.succeeds("--method", "fp8", "org/qwen", "again")
    assert same(cli.folder / "again", fp8_output)
    assert own.exists()


def test_a_cache_of_copies_tells_no_hashes(qwen: HubServer, cli: Cli, fp8_output: Path) -> None:
    """As where links cannot be made: a file's name is not its hash."""
    cli.succeeds("--method", "fp8", "org/qwen", "out")
    for path in [item for item in cli.home.rglob("snapshots/**/*") if item.is_symlink()]:
        content = path.resolve()
        path.unlink()
        shutil.copyfile(content, path)
    (noted,) = cli.home.rglob("omni-convert/*.json")
    noted.unlink()
    cli.succeeds("--method", "fp8", "org/qwen", "again", HF_HUB_OFFLINE="1")
    assert same(cli.folder / "again", fp8_output)


@pytest.mark.parametrize(
    "name", ["../outside.json", "a/../../b.json", "/etc/c.json", "a\\b.json", "a//b.json", "\x1b[2J"]
)
def test_names_that_lead_elsewhere(qwen: HubServer, cli: Cli, name: str) -> None:
    repo = qwen.store.repos["org/qwen"]
    files = dict(repo.commit("main").files)
    repo.add("main", "hostile", files | {name: files["model_index.json"]}, None)
    found = cli.fails("--method", "fp8", "org/qwen", "out")
    assert "lists a file" in found and "expected plain names" in found
    assert "\x1b" not in found


@pytest.mark.parametrize("size", [2**60, -1])
def test_sizes_that_cannot_be(qwen: HubServer, cli: Cli, size: int) -> None:
    repo = qwen.store.repos["org/qwen"]
    files = dict(repo.commit("main").files)
    repo.add("main", "hostile", files | {"large.txt": replace(files["README.md"], size=size)}, None)
    assert f"large.txt has {size} bytes, expected a size" in cli.fails("--method", "fp8", "org/qwen", "out")


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("model_index.json", b"[]", "/model_index.json: found a JSON list, expected an object"),
        ("transformer/diffusion_pytorch_model.safetensors.index.json", b"{}", "index.json: found no weight_map"),
        ("transformer/config.json", b"{", "transformer/config.json: is not valid JSON"),
    ],
)
def test_malformed_json(qwen: HubServer, cli: Cli, name: str, content: bytes, text: str) -> None:
    repo = qwen.store.repos["org/qwen"]
    repo.add("main", "hostile", dict(repo.commit("main").files) | {name: qwen.store.small(content)}, None)
    found = cli.fails("--method", "fp8", "org/qwen", "out")
    assert f"org/qwen@{repo.refs['main'][:12]}/" in found and text in found
    assert "/tmp" not in found


def test_a_file_where_a_folder_is(qwen: HubServer, cli: Cli) -> None:
    repo = qwen.store.repos["org/qwen"]
    files = dict(repo.commit("main").files)
    repo.add("main", "hostile", files | {"vae/config.json/more.txt": files["README.md"]}, None)
    assert "cannot be written (" in cli.fails("--method", "fp8", "org/qwen", "out")


def test_headers_that_lie(qwen: HubServer, cli: Cli) -> None:
    repo = qwen.store.repos["org/qwen"]
    name = f"transformer/{SHARD}"
    blob = repo.commit("main").files[name]
    blob.path.write_bytes((2**40).to_bytes(8, "little") + blob.path.read_bytes()[8:])
    found = cli.fails("--method", "fp8", "org/qwen", "out")
    assert f"org/qwen@{repo.refs['main'][:12]}/{name}: its first 8 bytes claim a header of {2**40} bytes" in found


def test_a_disk_without_room_for_downloads(qwen: HubServer, cli: Cli) -> None:
    small = (
        "import shutil, collections; shutil.disk_usage = lambda path: collections.namedtuple('U', 'free')(6_000_000)"
    )
    found = cli.fails("--method", "fp8", "org/qwen", "out", code=small)
    assert "the output and the downloads take" in found
    assert not any(request.path.endswith(SHARD) and not request.range for request in qwen.requests)
    cli.succeeds("--method", "fp8", "org/qwen", "out")
    cli.succeeds("--method", "fp8", "org/qwen", "again", code=small)


def test_nothing_is_left_in_the_temporary_folder(qwen: HubServer, cli: Cli, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    cli.succeeds("--method", "fp8", "org/qwen", "out", TMPDIR=str(temporary))
    cli.fails("--method", "fp8", "org/qwen", "out", TMPDIR=str(temporary))
    assert not list(temporary.iterdir())
