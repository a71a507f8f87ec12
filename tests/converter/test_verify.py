"""``verify``: a whole output passes, and every kind of damage is found and named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversions import own_failures
from hostile.small import random, read_json, to_bits, write_json, write_model, write_pipeline

from omni_convert.converter.convert import convert
from omni_convert.converter.hashes import file_sha256
from omni_convert.converter.verify import Verification, verify
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.header import StoredTensor, read_header

SHARD = "diffusion_pytorch_model-00001-of-00002.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
LAYER = "transformer_blocks.0.attn.to_q"


class Conversion:
    """A converted pipeline that tests damage."""

    def __init__(self, folder: Path) -> None:
        self.source, self.out = write_pipeline(folder / "model"), folder / "out"
        convert(self.source, self.out, method="int8", ignore=["txt_mlp"])

    @property
    def shard(self) -> Path:
        return self.out / "transformer" / SHARD

    def tensor(self, name: str) -> StoredTensor:
        return read_header(self.shard).tensors[name]

    def patch(self, start: int, data: bytes, path: Path | None = None) -> None:
        with (path or self.shard).open("r+b") as file:
            file.seek(start)
            file.write(data)

    def edit(self, name: str, change: Callable[[dict[str, Any]], object]) -> None:
        data = read_json(self.out / name)
        change(data)
        write_json(self.out / name, data)

    def accept(self, *names: str) -> None:
        """Let the manifest agree with changed files, so that the other checks must see the damage."""

        def change(manifest: dict[str, Any]) -> None:
            for name in names:
                path = self.out / name
                manifest["files"][name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}

        self.edit("omni_convert.json", change)

    def problems(self, *, source: bool = False) -> list[str]:
        """Without those of the engine's contract, which may see the same damage."""
        result = verify(self.out, source=self.source if source else None)
        assert result.ok == all(check.ok for check in result.checks)
        return [problem for check in own_failures(result) for problem in check.problems]


@pytest.fixture
def made(tmp_path: Path) -> Conversion:
    return Conversion(tmp_path)


def test_whole_output_passes(made: Conversion) -> None:
    assert made.problems() == []
    result = verify(made.out, source=made.source)
    assert result.ok
    assert len(result.layers) == 2 * 10
    assert all(30 < item.sqnr_db < 60 and item.max_error <= 1.0001 for item in result.layers)
    assert "verified" in result.to_text()
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["ok"] is True


def test_single_file_passes(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", {}, {"a.weight": to_bits(np.full((3, 4), 127.0))})
    file = path / "diffusion_pytorch_model.safetensors"
    convert(file, tmp_path / "out", method="int8")
    result = verify(tmp_path / "out", source=file)
    assert result.ok
    assert [(item.sqnr_db, item.max_error) for item in result.layers] == [(math.inf, 0.0)]
    assert result.to_dict()["layers"][0]["sqnr_db"] is None


def test_missing_file(made: Conversion) -> None:
    (made.out / "README.md").unlink()
    assert made.problems() == ["README.md: is missing. Convert again, or copy it again."]


@pytest.mark.parametrize("name", ["README.md", "text_encoder/config.json", f"transformer/{SHARD}"])
def test_changed_byte(made: Conversion, name: str) -> None:
    data = (made.out / name).read_bytes()
    (made.out / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert any(problem.startswith(f"{name}: its sha256 differs") for problem in made.problems())


def test_changed_size(made: Conversion) -> None:
    with (made.out / "README.md").open("ab") as file:
        file.write(b"!")
    assert made.problems() == ["README.md: has 9 bytes, expected 8. Convert again, or copy it again."]


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_scale_that_is_no_scale(made: Conversion, value: float) -> None:
    made.patch(made.tensor(f"{LAYER}.weight_scale").start + 4 * 3, np.float32(value).tobytes())
    made.accept(f"transformer/{SHARD}")
    (problem,) = made.problems()
    assert f"{LAYER}.weight_scale: holds {value} at [3, 0]" in problem


def test_scale_that_is_wrong(made: Conversion) -> None:
    start = made.tensor(f"{LAYER}.weight_scale").start
    scale = np.fromfile(made.shard, "<f4", 1, offset=start)
    made.patch(start, (scale * np.float32(1.25)).tobytes())
    made.accept(f"transformer/{SHARD}")
    assert made.problems() == []
    (problem,) = made.problems(source=True)
    assert problem.startswith(f"{LAYER}: its largest error is")


def test_code_that_is_wrong(made: Conversion) -> None:
    start = made.tensor(f"{LAYER}.weight").start
    code = np.fromfile(made.shard, "i1", 1, offset=start)
    made.patch(start, (code ^ 2).tobytes())
    made.accept(f"transformer/{SHARD}")
    (problem,) = made.problems(source=True)
    assert problem.startswith(f"{LAYER}: its largest error is")


def test_kept_tensor_that_changed(made: Conversion) -> None:
    made.patch(made.tensor(f"{LAYER}.bias").start, b"\x12\x34")
    made.accept(f"transformer/{SHARD}")
    assert made.problems(source=True) == [f"{LAYER}.bias: differs from the source, expected it unchanged."]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_source_that_holds_no_numbers_any_more(made: Conversion, value: float) -> None:
    path = made.source / "transformer" / SHARD
    made.patch(read_header(path).tensors[f"{LAYER}.weight"].start, to_bits(value).bits.tobytes(), path)
    assert any(LAYER in problem for problem in made.problems(source=True))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda config: config.pop("quantization_config"), "found None, expected an object"),
        (lambda config: config["quantization_config"].update(extra=1), "found extra=1"),
        (lambda config: config["quantization_config"].update(is_checkpoint_int8_serialized=False), "is False"),
        (lambda config: config["quantization_config"]["ignored_layers"].append(LAYER), "the config ignores it"),
        (lambda config: config["quantization_config"]["ignored_layers"].remove("img_in"), "does not ignore it"),
    ],
    ids=["none", "extra key", "flag", "ignores a quantized layer", "forgets a kept layer"],
)
def test_config(made: Conversion, change: Callable[[dict[str, Any]], object], expected: str) -> None:
    made.edit("transformer/config.json", change)
    made.accept("transformer/config.json")
    (problem,) = made.problems()
    assert expected in problem


@pytest.mark.parametrize("value", [["int8"], "int8", 5])
def test_config_of_another_kind(made: Conversion, value: object) -> None:
    made.edit("transformer/config.json", lambda config: config.update(quantization_config=value))
    made.accept("transformer/config.json")
    (problem,) = made.problems()
    assert "quantization_config" in problem


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda index: index["metadata"].update(total_size=1), "total_size is 1, expected"),
        (lambda index: index["weight_map"].pop("img_in.weight"), "does not list img_in.weight"),
    ],
    ids=["total_size", "weight_map"],
)
def test_index(made: Conversion, change: Callable[[dict[str, Any]], object], expected: str) -> None:
    made.edit(f"transformer/{INDEX}", change)
    made.accept(f"transformer/{INDEX}")
    (problem,) = made.problems()
    assert expected in problem


def test_manifest_that_knows_other_tensors(made: Conversion) -> None:
    def change(manifest: dict[str, Any]) -> None:
        tensors = manifest["components"]["transformer"]["tensors"]
        tensors["ghost.weight"] = {"action": "keep", "why": "x"}
        tensors.pop("img_in.weight")
        tensors[f"{LAYER}.weight"] = {"action": "keep", "why": "because"}

    made.edit("omni_convert.json", change)
    problems = made.problems()
    for expected in (
        "ghost.weight: is missing.",
        "img_in.weight: is not in the manifest.",
        f"{LAYER}.weight: is quantized, expected it kept (because).",
    ):
        assert expected in problems


def test_another_source(made: Conversion, tmp_path: Path) -> None:
    (made.source / "README.md").write_text("longer than before")
    (made.source / "scheduler" / "scheduler_config.json").unlink()
    problems = made.problems(source=True)
    assert "README.md: has 18 bytes in the source, 8 when converted." in problems
    assert any(problem.startswith("scheduler/scheduler_config.json: is not in the source") for problem in problems)


def test_source_with_another_header(made: Conversion) -> None:
    path = made.source / "transformer" / SHARD
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"format": "pt"', b'"format": "tp"', 1))
    (problem,) = made.problems(source=True)
    assert problem == f"transformer/{SHARD}: its header differs from the one that was converted."


def test_what_cannot_be_verified(made: Conversion, tmp_path: Path) -> None:
    for folder in (made.source, tmp_path / "nowhere"):
        with pytest.raises(OmniConvertError, match=r"found no omni_convert\.json, expected a folder written by"):
            verify(folder)
    (made.out / ".omni_convert.partial").touch()
    with pytest.raises(OmniConvertError, match="unfinished"):
        verify(made.out)


def test_without_a_manifest_the_rules_of_the_engine_are_left(made: Conversion) -> None:
    (made.out / "omni_convert.json").unlink()
    result = verify(made.out)
    assert result.ok
    first, *others = result.checks
    assert (first.name, first.known) == ("manifest", False)
    assert others
    assert all(check.name.startswith("vllm-omni ") for check in others)
    assert "not there, so only the engine's rules were checked" in result.to_text()
    with pytest.raises(OmniConvertError, match="comparing with --source needs it"):
        verify(made.out, source=made.source)
    made.edit("transformer/config.json", lambda config: config["quantization_config"].update(producer="me"))
    assert [check.name for check in verify(made.out).checks if not check.ok] == ["vllm-omni config keys"]
    made.edit("transformer/config.json", lambda config: config.pop("quantization_config"))
    assert [check.name for check in verify(made.out).checks if not check.ok] == ["vllm-omni config place"]


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("files"),
        lambda manifest: manifest.update(files=[]),
        lambda manifest: manifest.update(files={"config.json": {}}),
        lambda manifest: manifest.update(components=["transformer"]),
        lambda manifest: manifest.update(components={"transformer": 1}),
        lambda manifest: manifest["components"]["transformer"].pop("tensors"),
        lambda manifest: manifest["components"]["transformer"].update(tensors={"a.weight": {}}),
        lambda manifest: manifest.update(source=[]),
    ],
)
def test_damaged_manifest(made: Conversion, change: Callable[[dict[str, Any]], object]) -> None:
    made.edit("omni_convert.json", change)
    with pytest.raises(OmniConvertError, match=r"omni_convert\.json"):
        verify(made.out, source=made.source)


def test_text_names_what_failed(made: Conversion) -> None:
    for number in range(12):
        (made.out / f"{number}").write_text("x")
        made.accept(f"{number}")
        (made.out / f"{number}").unlink()
    result = verify(made.out)
    text = result.to_text()
    assert "FAILED" in text
    assert "files: ... and 2 more" in text
    assert text.endswith("NOT what it should be")
    assert not result.to_dict()["checks"][0]["ok"]


def test_empty_verification_is_ok() -> None:
    assert Verification(path="x").ok


def test_error_of_every_group_of_layers_is_shown(made: Conversion) -> None:
    result = verify(made.out, source=made.source)
    text = result.to_text()
    row = next(line for line in text.splitlines() if line.startswith("transformer_blocks.*.attn.to_q "))
    values = [item.sqnr_db for item in result.layers if item.layer.endswith("attn.to_q")]
    assert row.split()[1:] == [str(len(values)), f"{min(values):.2f}", "dB", f"{max(values):.2f}", "dB"]


@pytest.mark.parametrize("name", ["transformer", "transformer_2"])
def test_a_component_that_is_gone_is_a_failed_check(tmp_path: Path, name: str) -> None:
    source = write_pipeline(tmp_path / "model", second=True)
    out = convert(source, tmp_path / "out", method="int8").out
    (out / name).rename(out / "unet")
    for original in (source, None):
        result = verify(out, source=original)
        (check,) = [check for check in own_failures(result) if check.name != "files"]
        assert check.name == f"{name} headers"
        assert f"{out / name}: found no folder" in check.problems[0]


def test_tensor_that_is_called_like_a_layer(tmp_path: Path) -> None:
    tensors = {"a.weight": random(8, 8), "a": random(8)}
    convert(write_model(tmp_path / "model", {}, tensors), tmp_path / "out", method="int8")
    assert verify(tmp_path / "out", source=tmp_path / "model").ok
