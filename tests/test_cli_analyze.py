"""``omni-convert analyze`` and the options of a conversion that choose: what goes to which stream, and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hostile.small import QWEN_CONFIG, qwen_shards, snapshot, write_sharded
from test_cli import Command, omni_convert

__all__ = ["omni_convert"]  # a fixture


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_sharded(tmp_path / "model", [*qwen_shards(width=64)], QWEN_CONFIG)


def test_analysis(omni_convert: Command, source: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    result = omni_convert("analyze", source, "--methods", "int8, fp8:channel")
    assert (result.code, result.stderr) == (0, "")
    head, _, first = result.stdout.splitlines()[:3]
    assert head.split()[-2:] == ["int8", "fp8:channel"]
    assert first.endswith(" dB")
    assert "... and 4 more (--json lists all)" in result.stdout
    data = json.loads(omni_convert("analyze", source, "--methods", "int8,fp8:channel", "--json").stdout)
    assert len(data["layers"]) == 24
    assert data["methods"]["int8"]["layers"] == 24
    assert data["methods"]["fp8:channel"]["layers"] == 20
    assert "choice" not in data
    assert snapshot(tmp_path) == before


def test_a_recipe_is_written_and_converted_with(omni_convert: Command, source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "choice.yaml"
    asked = ("--auto-ignore", "sqnr>=40", "--target", "omni-convert")
    result = omni_convert("analyze", source, "--methods", "int8,mxfp8", *asked, "--recipe-out", recipe)
    assert result.code == 0
    assert result.stdout.endswith(recipe.read_text())
    assert yaml.safe_load(recipe.read_text())["method"] == "int8"
    assert omni_convert("--recipe", recipe, source, tmp_path / "replayed").code == 0
    result = omni_convert("--methods", "int8,mxfp8", *asked, source, tmp_path / "chosen")
    assert "then once more to convert" in result.stderr
    assert result.stdout.startswith("chosen by")
    assert "layers quantized" in result.stdout
    assert snapshot(tmp_path / "replayed") == snapshot(tmp_path / "chosen")


def test_an_analysis_outlives_a_choice_that_cannot_be_made(omni_convert: Command, source: Path, tmp_path: Path) -> None:
    page, recipe = tmp_path / "page.html", tmp_path / "choice.yaml"
    asked = ("--methods", "int8", "--auto-ignore", "sqnr>=900", "-o", page, "--recipe-out", recipe)
    result = omni_convert("analyze", source, *asked)
    assert result.code == 2
    assert '"sqnr>=900": no layer has that, the best has' in result.stderr
    assert "... and 4 more (--json lists all)" in result.stdout
    assert "transformer_blocks.1" in page.read_text()
    assert not recipe.exists()


def test_a_dry_run_chooses_too(omni_convert: Command, source: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    asked = ("--method", "int8", "--budget", "size<=0.7", "--dry-run")
    result = omni_convert(*asked, source, tmp_path / "out")
    assert result.code == 0
    assert result.stderr == "Note: reads the weights to choose what to keep.\n"
    assert '--budget "size<=0.7"' in result.stdout
    assert "peak memory" in result.stdout
    data = json.loads(omni_convert(*asked, "--json", source, tmp_path / "out").stdout)
    assert data["recipe"] == data["choice"]["recipe"]
    assert data["bytes_after"] == data["choice"]["bytes_after"] <= 0.7 * data["bytes_before"]
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["analyze", "model", "--recipe-out", "x.yaml"], "--recipe-out writes a choice"),
        (["analyze", "model", "--budget", "0.5"], "expected size<=SHARE"),
        (["analyze", "model", "--budget", "size<=0.1"], "the smallest choice takes"),
        (["analyze", "model", "--methods", "int9"], "int9"),
        (["--method", "int8", "--auto-ignore", "30", "model", "out"], "expected sqnr>=DECIBELS"),
        (["--method", "int8", "--methods", "int8", "model", "out"], "--methods is what to choose from"),
        (["--method", "int8", "--methods", "fp8", "--budget", "size<=1", "model", "out"], "found methods beside"),
        (["--auto-ignore", "sqnr>=30", "model", "out"], "expected one of --method and --recipe"),
    ],
    ids=" ".join,
)
def test_wrong_usage(
    omni_convert: Command, source: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], expected: str
) -> None:
    monkeypatch.chdir(source.parent)
    before = snapshot(source.parent)
    assert expected in omni_convert.fails(2, *args).replace("\n", " ")
    assert snapshot(source.parent) == before


def test_a_page_is_written(omni_convert: Command, source: Path, tmp_path: Path) -> None:
    result = omni_convert("analyze", source, "--methods", "int8", "-o", tmp_path / "page.html")
    assert (result.code, result.stderr) == (0, f"Wrote {tmp_path / 'page.html'}\n")
    assert "<!doctype html>" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("option", ["--recipe-out", "-o"])
def test_places_are_checked_before_weights_are_read(
    omni_convert: Command, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr("omni_convert.converter.analyze.measure", None)
    for place in (tmp_path / "no" / "x", tmp_path):
        args = ("analyze", source, "--methods", "int8", "--budget", "size<=0.8", option, place)
        said = omni_convert.fails(2, *args)
        assert f"{option} {place}: " in said and "expected the name of a file to write" in said


@pytest.mark.parametrize("option", ["-o", "--recipe-out"])
def test_the_source_is_not_written_to(omni_convert: Command, source: Path, option: str) -> None:
    before = snapshot(source)
    result = omni_convert(
        "analyze", source, "--methods", "int8", "--budget", "size<=0.7", option, source / "config.json"
    )
    assert result.code == 2 and "lies in" in result.stderr
    assert snapshot(source) == before
