"""The command line: exit codes, what goes to which stream, and how subcommands and folders are told apart."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from hostile.small import random, snapshot, write_model, write_pipeline

from omni_convert import __version__, cli


class Result(NamedTuple):
    code: int
    stdout: str
    stderr: str


class Command:
    """Runs the console script's entry point in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capfd = capfd
        self.monkeypatch = monkeypatch

    def __call__(self, *args: object) -> Result:
        self.monkeypatch.setattr(sys, "argv", ["omni-convert", *map(str, args)])
        self.capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        code = caught.value.code
        assert isinstance(code, int)
        return Result(code, *self.capfd.readouterr())

    def fails(self, code: int, *args: object) -> str:
        """Run it; returns the one paragraph that it must say on stderr, and nothing on stdout."""
        result = self(*args)
        assert (result.code, result.stdout) == (code, "")
        assert "Traceback" not in result.stderr
        return result.stderr


@pytest.fixture
def omni_convert(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(capfd, monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_pipeline(tmp_path / "model")


def test_bare_form_and_subcommand(omni_convert: Command, source: Path, tmp_path: Path) -> None:
    bare = omni_convert("--method", "int8", "--ignore", "img_mlp", source, tmp_path / "a")
    assert bare.code == 0
    assert "layers quantized" in bare.stdout
    assert bare.stderr == ""
    assert omni_convert("convert", source, tmp_path / "b", "--ignore=img_mlp", "--method=int8").code == 0
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_json_report(omni_convert: Command, source: Path, tmp_path: Path) -> None:
    result = omni_convert("--method", "int8", "--json", "--threads", 1, source, tmp_path / "out")
    data = json.loads(result.stdout)
    assert (result.code, data["layers"], data["out"]) == (0, 24, str(tmp_path / "out"))


@pytest.mark.parametrize("as_json", [False, True])
def test_dry_run_writes_nothing(omni_convert: Command, source: Path, tmp_path: Path, as_json: bool) -> None:
    before = snapshot(tmp_path)
    result = omni_convert("--method", "int8", "--dry-run", *["--json"] * as_json, source, tmp_path / "out")
    assert (result.code, result.stderr) == (0, "")
    assert snapshot(tmp_path) == before
    if as_json:
        data = json.loads(result.stdout)
        assert data["peak_memory"] > 0
        assert data["disk_needed"] > data["bytes_after"]
    else:
        assert "peak memory" in result.stdout
        assert "disk needed" in result.stdout


def test_dry_run_reads_no_weights(
    omni_convert: Command, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("omni_convert.converter.output.read_into", refuse)
    monkeypatch.setattr(os, "preadv", refuse)
    assert omni_convert("--method", "int8", "--dry-run", source, tmp_path / "out").code == 0


def test_options(omni_convert: Command, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert omni_convert("--method", "int8", "--link", "--hash-source", source, out).code == 0
    assert (out / "README.md").samefile(source / "README.md")
    assert "sha256" in json.loads((out / "omni_convert.json").read_text())["source"]["files"]["README.md"]
    assert "not empty" in omni_convert.fails(1, "--method", "int8", source, out)
    result = omni_convert(
        "--method", "int8", "--overwrite", "--component", "text_encoder", "--target", "omni-convert", source, out
    )
    assert (result.code, result.stdout.split()[2]) == (0, "2")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--method", "int9", "model", "out"], "int9"),
        (["model", "out"], "--method"),
        (["--method", "int8", "model"], "OUT"),
        (["--method", "int8", "model", "out", "more"], "more"),
        (["--method", "int8", "--threads", "0", "model", "out"], "--threads"),
        (["--method", "int8", "--nonsense", "model", "out"], "--nonsense"),
        (["--method", "int8", "--ignore", "img_mpl", "model", "out"], "img_mlp"),
        (["--method", "int8", "--ignore", "re:(", "model", "out"], "regular expression"),
        (["--method", "int8", "--ignore", "", "model", "out"], "empty pattern"),
        (["--method", "int8", "--ignore", "to_k", "model", "out"], "to_qkv"),
        (["--method", "int8", "--component", "nothing", "model", "out"], "text_encoder"),
        (["--method", "int8", "--granularity", "block", "model", "out"], "int8 knows only channel"),
        (["--method", "mxfp8", "--granularity", "block", "model", "out"], "mxfp8 has no such choice"),
        (["--method", "fp8", "--block-size", "128", "model", "out"], "as in 128x128"),
        (["--method", "fp8", "--block-size", "0x128", "model", "out"], "as in 128x128"),
        (["--method", "fp8", "--granularity", "tensor", "--block-size", "8x8", "model", "out"], "--block-size needs"),
        (["--method", "fp8", "--activation-scheme", "static", "model", "out"], "--activation-scales FILE"),
        (["--method", "fp8", "--activation-scales", "scales.json", "model", "out"], "--activation-scheme static"),
        (
            ["--method", "fp8", "--activation-scheme=static", "--activation-scales", "scales.json", "model", "out"],
            "no layer is called other",
        ),
        (
            ["--method", "fp8", "--granularity=block", "--activation-scheme", "static", "model", "out"],
            "per block with dynamic",
        ),
        (["--method", "fp8", "--scale-rule", "even", "model", "out"], "fp8 has no such choice"),
        (["--method", "int8", "--quality", "max", "model", "out"], "--quality"),
        (["inspect"], "PATH"),
        (["verify", "a", "b"], "b"),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(
    omni_convert: Command, source: Path, monkeypatch: pytest.MonkeyPatch, args: Sequence[str], expected: str
) -> None:
    monkeypatch.chdir(source.parent)
    Path("scales.json").write_text('{"other": 0.5}')
    assert expected in omni_convert.fails(2, *args)
    assert not (source.parent / "out").exists()


def test_failure_exits_with_1(omni_convert: Command, tmp_path: Path) -> None:
    weight = random(4, 4)
    weight.bits[2, 1] = 0x7FC0
    source = write_model(tmp_path / "model", {}, {"a.weight": weight})
    message = omni_convert.fails(1, "--method", "int8", "--target", "omni-convert", source, tmp_path / "out")
    assert message.startswith("Error: ")
    assert message.count("\n") == 1
    assert "row 2, column 1" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["--method", "int8", "--dry-run"]], ids=" ".join)
def test_absent_path(omni_convert: Command, tmp_path: Path, command: list[str]) -> None:
    paths = [tmp_path / "absent"] + [tmp_path / "out"] * (command[0] == "--method")
    assert str(tmp_path / "absent") in omni_convert.fails(1, *command, *paths)


def test_formats_have_options(omni_convert: Command, source: Path, tmp_path: Path) -> None:
    result = omni_convert("--method", "fp8", "--block-size", "4x32", source, tmp_path / "out")
    assert result.code == 0
    assert "20 to fp8 (block 4x32)" in result.stdout
    assert "fp8 (block 4x32)" in omni_convert("inspect", tmp_path / "out").stdout
    model = write_model(tmp_path / "other", {}, {"a.weight": random(2, 64)})
    result = omni_convert("--method", "mxfp8", "--scale-rule", "floor", "--dry-run", model, tmp_path / "none")
    assert "mxfp8 (rule floor)" in result.stdout


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("[]", 1, "scales.json"),
        ("{", 1, "Correct the file"),
        ('{"a": "1"}', 2, "finite positive"),
        ('{"a": 0}', 2, "finite positive"),
        ('{"a": -1.5}', 2, "finite positive"),
        ('{"a": true}', 2, "finite positive"),
        ('{"a": NaN}', 2, "finite positive"),
        ('{"attn.to_q": 1}', 2, "no layer is called attn.to_q"),
    ],
)
def test_files_that_hold_no_scales(
    omni_convert: Command, source: Path, tmp_path: Path, text: str, code: int, said: str
) -> None:
    (tmp_path / "scales.json").write_text(text)
    options = ("--activation-scheme", "static", "--activation-scales", tmp_path / "scales.json")
    assert said in omni_convert.fails(code, "--method", "fp8", *options, source, tmp_path / "out")


def test_a_search_that_finds_nothing_better_is_said(omni_convert: Command, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", {}, {"a.weight": random(2, 64)})
    for number, (method, noted) in enumerate([("mxfp8", True), ("fp8", True), ("int8", False), ("mxfp4", False)]):
        result = omni_convert("--method", method, "--quality", "balanced", model, tmp_path / str(number))
        assert (result.code, "no better scales" in result.stderr) == (0, noted)


def test_recorded_scales(omni_convert: Command, tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", {}, {"a.weight": random(4, 4)})
    (tmp_path / "scales.json").write_text('{"a": 0.5}')
    options = ("--activation-scheme", "static", "--activation-scales", tmp_path / "scales.json")
    assert omni_convert("--method", "fp8", *options, source, tmp_path / "out").code == 0
    assert json.loads((tmp_path / "out" / "omni_convert.json").read_text())["recipe"]["input_scales"] == {"a": 0.5}


def test_inspect(omni_convert: Command, source: Path) -> None:
    result = omni_convert("inspect", source)
    assert (result.code, result.stderr) == (0, "")
    assert "QwenImageTransformer2DModel" in result.stdout
    assert len(json.loads(omni_convert("inspect", "--json", source).stdout)["components"]) == 2


def test_verify(omni_convert: Command, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    omni_convert("--method", "int8", source, out)
    result = omni_convert("verify", out, "--source", source)
    assert (result.code, result.stderr) == (0, "")
    assert "mean SQNR" in result.stdout
    assert json.loads(omni_convert("verify", "--json", out).stdout)["ok"] is True
    (out / "README.md").write_text("other")
    result = omni_convert("verify", out)
    assert (result.code, result.stderr) == (1, "")
    assert "README.md" in result.stdout
    result = omni_convert("verify", "--json", out)
    assert (result.code, json.loads(result.stdout)["ok"]) == (1, False)


@pytest.mark.parametrize("name", ["verify", "inspect", "convert"])
def test_folder_with_the_name_of_a_subcommand(
    omni_convert: Command, source: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(source.parent)
    shutil.move(source, source.with_name(name))
    assert omni_convert(f"./{name}", "out", "--method", "int8").code == 0
    assert Path("out/model_index.json").is_file()
    assert omni_convert("--method", "int8", name, "out2").code == 0  # an option came first: no doubt
    assert omni_convert("inspect", f"./{name}").code == 0


def test_help_and_version(omni_convert: Command) -> None:
    text = omni_convert("--help").stdout
    for part in ("MODEL OUT", "--method", "--ignore", "--dry-run", "--link", "inspect", "verify", "Examples"):
        assert part in text
    assert omni_convert("--version").stdout.split() == ["omni-convert,", "version", __version__]
    assert "--source" in omni_convert("verify", "-h").stdout


def test_conversion_imports_neither_torch_nor_model_libraries(source: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from omni_convert import cli; cli.main(sys.argv[1:], standalone_mode=False); "
        "print(sorted({'torch', 'diffusers', 'transformers'} & sys.modules.keys()), file=sys.stderr)"
    )
    for args in (
        ["--method", "int8", source, tmp_path / "out"],
        ["verify", tmp_path / "out", "--source", source],
        ["inspect", tmp_path / "out"],
    ):
        result = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "[]\n")


def test_console_script(source: Path, tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("omni-convert")
    result = subprocess.run([script, "inspect", tmp_path / "absent"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: ")


def test_models(omni_convert: Command) -> None:
    result = omni_convert("models")
    assert (result.code, result.stderr) == (0, "")
    assert "Qwen-Image" in result.stdout
    assert "vllm-omni" in json.loads(omni_convert("models", "--json").stdout)


def test_target_and_its_defaults(omni_convert: Command, source: Path, tmp_path: Path) -> None:
    def layers(*options: str) -> int:
        result = omni_convert("--json", *options, source, tmp_path / "out", "--overwrite")
        assert (result.code, result.stderr) == (0, "")
        layers: int = json.loads(result.stdout)["layers"]
        return layers

    assert layers("--method", "fp8") == 20
    assert layers("--method", "fp8", "--no-default-ignore") == 24
    assert layers("--method", "int8", "--target", "omni-convert") == 24
    assert json.loads((tmp_path / "out" / "omni_convert.json").read_text())["recipe"]["target"] == "omni-convert"
    assert layers("--method", "fp8", "--target", "omni-convert") == 24


def test_warning_goes_to_stderr(omni_convert: Command, tmp_path: Path) -> None:
    result = omni_convert("--method", "int8", "--json", write_model(tmp_path / "model"), tmp_path / "out")
    assert result.stderr.startswith(
        "Warning: it is not known which layers vLLM-Omni can run quantized (class: SomeTransformer2DModel)"
    )
    assert result.stderr.count("\n") == 1
    assert result.stderr == f"Warning: {json.loads(result.stdout)['warnings'][0]}\n"
