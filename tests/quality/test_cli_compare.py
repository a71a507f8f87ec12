"""``omni-convert compare``: streams, files and exit codes."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from models import write_qwen_image

from omni_convert import OmniConvertError, cli
from omni_convert.cli_compare import compare

SMALL = ("--height", 32, "--width", 32, "--num-inference-steps", 2)


def run(*args: object) -> Result:
    return CliRunner().invoke(cli.main, ["compare", *map(str, args)])


def test_result_in_words_as_json_and_in_files(qwen_image: Path, tmp_path: Path) -> None:
    ask = ("--task", "t2i", "--prompt", "a cup of coffee", *SMALL, "--seed", 7, "--output-json", tmp_path / "r.json")
    online = ("--quantization", "fp8", "--ignore", "txt_mlp", "--no-default-ignore")
    result = run("--reference", qwen_image, *online, *ask, "--save-output-dir", tmp_path / "images", "--gate", "smoke")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["request"]["seed"] == 7
    assert found["candidate"] == {
        "model": str(qwen_image),
        "quantization": "fp8, ignore txt_mlp, default ignore False",
    }
    assert found["gate"]["ok"] and len(found["gate"]["conditions"]) == 4
    assert f"{found['output_metrics']['psnr_db']:.5g}" in result.stdout
    assert result.stdout.rstrip().endswith("gate: met")
    assert len(list((tmp_path / "images").rglob("*.png"))) == 2
    again = run("--reference", qwen_image, *online, *ask, "--json")
    assert json.loads(again.stdout)["output_metrics"] == found["output_metrics"]


def test_a_miss_is_exit_status_1_and_says_by_how_much(language_model: Path, tmp_path: Path) -> None:
    ask = ("--reference", language_model, "--task", "text", "--prompt", "a", "--target", "omni-convert")
    result = run(*ask, "--quantization", "fp8", "--gate", "relative_l2<=0.001", "--output-json", tmp_path / "r.json")
    assert result.exit_code == 1
    value = json.loads((tmp_path / "r.json").read_text())["output_metrics"]["relative_l2"]
    assert f"MISS  relative_l2 {value:.6g} misses <= 0.001 by {value - 0.001:.3g} (prompt 1)" in result.stdout
    assert result.stdout.rstrip().endswith("gate: 1 of 1 missed")


def test_a_recipe(language_model: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("method: int8\ntarget: omni-convert\nignored_layers: [mlp]\n")
    ask = ("--reference", language_model, "--task", "text", "--prompt", "a", "--trace-layers", "--json")
    result = run(*ask, "--recipe", tmp_path / "recipe.yaml")
    assert result.exit_code == 0, result.output
    traced = json.loads(result.stdout)["trace"]
    assert {entry["format"] for entry in traced} == {"int8"}
    assert len(traced) == 2 * 4
    assert not any("mlp" in entry["layer"] for entry in traced)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--prompt", "a"], "neither a candidate nor a quantization"),
        (["--quantization", "int8"], "found no prompt"),
        (["--quantization", "int8", "--prompt", "a", "--gate", "psnr"], "--gate has 'psnr'"),
        (["--quantization", "int8", "--prompt", "a", "--output-json", "no/r.json"], "found no folder no"),
        (["--quantization", "int8", "--prompt", "a", "--output-json", "."], "--output-json .: is a folder"),
        (["--quantization", "int8", "--prompt", "a", "--html", "."], "--html .: is a folder"),
        (
            ["--quantization", "int8", "--prompt", "a", "--save-output-dir", __file__],
            "is a file, expected the name",
        ),
        (["--quantization", "int8", "--prompt", "a", "--save-output-dir", f"{__file__}/x"], "found no folder"),
        (["--quantization", "int8", "--prompt", "a", "--seed", str(2**63)], f"expected 0 to {2**63 - 1}"),
        (["--quantization", "int8", "--prompt", "a", "--seed", "-1"], "seed is -1, expected 0 to"),
        (["--quantization", "int8", "--prompt", "a", "--device", "cuda:9"], "device 'cuda:9' was asked for"),
    ],
)
def test_wrong_usage(args: list[str], says: str, tmp_path: Path) -> None:
    write_qwen_image(tmp_path / "model")
    result = run("--reference", tmp_path / "model", "--task", "t2i", *args)
    assert result.exit_code in (1, 2)
    assert says in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("option", ["--output-json", "--html", "--save-output-dir"])
@pytest.mark.parametrize("model", ["reference", "candidate"])
def test_models_are_not_written_into(option: str, model: str, tmp_path: Path) -> None:
    for name in ("reference", "candidate"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / model)
    models = ("--reference", tmp_path / "reference", "--candidate", tmp_path / "candidate")
    result = run(*models, "--task", "t2i", "--prompt", "a", option, tmp_path / "link" / "new")
    assert result.exit_code == 2
    assert f"lies in {tmp_path / model}, which must stay as it is" in result.stderr


def test_files_are_written_though_nobody_reads_the_result(
    language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ask = ("--reference", str(language_model), "--candidate", str(language_model), "--task", "text", "--prompt", "a")
    full = (os.open("/dev/full", os.O_WRONLY), OmniConvertError, "stdout cannot be written (No space left on device)")
    ways: list[tuple[int, type[BaseException], str]] = [full, (writer, SystemExit, "1")]
    for place, ends, says in ways:
        stdout = os.fdopen(place, "w")
        path = tmp_path / "result.json"
        with monkeypatch.context() as patch, pytest.raises(ends) as error:
            patch.setattr(sys, "stdout", stdout)
            compare.main([*ask, "--output-json", str(path)], standalone_mode=False)
        with suppress(OSError):
            stdout.close()
        assert str(error.value).startswith(says)
        assert json.loads(path.read_text())["output_metrics"]["identical"]
        path.unlink()


def test_nothing_quantized_is_nothing_to_trace(language_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni_convert.quality.compare.trace", lambda *_: pytest.fail("ran the reference again"))
    ask = ("--reference", language_model, "--candidate", language_model, "--task", "text", "--prompt", "a")
    result = run(*ask, "--trace-layers")
    assert result.exit_code == 0, result.output
    assert "Note: no layer is traced: the candidate has no quantized layer." in result.stdout
    assert "layers, their own output error" not in result.stdout


def test_a_method_with_its_options(language_model: Path) -> None:
    ask = ("--reference", language_model, "--task", "text", "--prompt", "a", "--target", "omni-convert", "--json")
    result = run(*ask, "--quantization", "fp8:channel", "--trace-layers")
    assert result.exit_code == 0, result.output
    assert {entry["format"] for entry in json.loads(result.stdout)["trace"]} == {"fp8 (channel)"}
    wrong = run(*ask, "--quantization", "fp9")
    assert (wrong.exit_code, "the method is 'fp9', expected one of int8, " in wrong.stderr) == (2, True)


def test_what_cannot_be_written_loses_nothing_else(language_model: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html").symlink_to(tmp_path / "gone" / "page.html")
    ask = ("--reference", language_model, "--candidate", language_model, "--task", "text", "--prompt", "a")
    places = ("--output-json", "/dev/full", "--html", tmp_path / "page.html", "--save-output-dir", tmp_path / "logits")
    result = run(*ask, *places, "--gate", "relative_l2<=0")
    assert result.exit_code == 1
    assert result.stdout.rstrip().endswith("gate: met")
    assert "--output-json /dev/full cannot be written (No space left on device), --html " in result.stderr
    assert len(list((tmp_path / "logits").rglob("*.npy"))) == 2
