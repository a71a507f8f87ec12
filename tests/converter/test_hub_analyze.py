"""An analysis of a repository on the Hub: the tests' own, through huggingface_hub's real client."""

from __future__ import annotations

import json
from pathlib import Path

from hub_cli import Cli, contents
from hub_server import HubServer

ARGS = ("--methods", "int8,mxfp8", "--target", "omni-convert", "--budget", "size<=0.8")


def test_figures_are_those_of_a_local_folder(hub: HubServer, cli: Cli, qwen_image: Path) -> None:
    hub.store.add_folder("org/qwen", qwen_image)
    found, local = (
        json.loads(cli.succeeds("analyze", source, *ARGS, "--json")) for source in ("org/qwen", str(qwen_image))
    )
    for key in ("methods", "layers", "choice"):
        assert found[key] == local[key]
    assert found["layers"]


def test_a_choice_is_converted_from_what_was_downloaded(hub: HubServer, cli: Cli, qwen_image: Path) -> None:
    hub.store.add_folder("org/qwen", qwen_image)
    cli.succeeds(*ARGS, "org/qwen", "out")
    weights = [request for request in hub.requests if request.path.endswith(".safetensors")]
    whole = [item.path for item in weights if item.method == "GET" and item.range != "bytes=0-65535"]
    assert len(whole) == len(set(whole))
    cli.succeeds(*ARGS, str(qwen_image), "local")
    out, local = contents(cli.folder / "out"), contents(cli.folder / "local")
    assert {name: data for name, data in out.items() if name in local} == local
