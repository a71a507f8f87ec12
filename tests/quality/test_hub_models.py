"""Reports and comparisons of models on the Hub: the tests' own, through huggingface_hub's real client."""

from __future__ import annotations

import json
from pathlib import Path

from hub_cli import Cli
from hub_server import HubServer

import omni_convert

ASK = ("--task", "text", "--prompt", "a red bicycle", "--json")


def test_models_on_the_hub_are_compared(hub: HubServer, cli: Cli, language_model: Path, tmp_path: Path) -> None:
    omni_convert.convert(language_model, tmp_path / "out", method="int8", target="omni-convert")
    hub.store.add_folder("org/model", language_model)
    hub.store.add_folder("org/model-int8", tmp_path / "out")
    online = ("--quantization", "int8", "--target", "omni-convert")
    stored = json.loads(cli.succeeds("compare", "--reference", "org/model", "--candidate", "org/model-int8", *ASK))
    quantized = json.loads(cli.succeeds("compare", "--reference", "org/model@main", *online, *ASK))
    local = omni_convert.compare(language_model, tmp_path / "out", task="text", prompt="a red bicycle").to_dict()
    assert stored["output_metrics"] == quantized["output_metrics"] == local["output_metrics"]
    assert (stored["reference"]["model"], stored["candidate"]["model"]) == ("org/model", "org/model-int8")
    assert quantized["candidate"]["model"] == "org/model@main"
    assert "org/other" in cli.fails("compare", "--reference", "org/other", *online, *ASK)


def test_a_report_measures_against_the_hub(hub: HubServer, cli: Cli, language_model: Path, tmp_path: Path) -> None:
    omni_convert.convert(language_model, tmp_path / "out", method="int8", target="omni-convert")
    hub.store.add_folder("org/model", language_model)
    found = json.loads(cli.succeeds("report", tmp_path / "out", "--source", "org/model", "--json"))
    local = json.loads(json.dumps(omni_convert.report(tmp_path / "out", source=language_model).to_dict()))
    assert found["origin"] == "Measured anew, against model."
    assert found["layers"] == local["layers"]
