"""The model card: what it says must be what the files say, and nothing that nobody said."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile.small import Tensor, random, write_json, write_pipeline, write_sharded

import omni_convert
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.layout import read_json
from omni_convert.hub.card import base_of, make_card
from omni_convert.hub.metadata import check_card, make_metadata, read_metadata
from omni_convert.hub.picture import draw_picture

BASE_CARD = """---
license: other
license_name: some-license
license_link: LICENSE.md
base_model: somebody/older
language: [en, zh]
pipeline_tag: text-to-image
tags: [diffusers, art]
widget: {text: hello}
---
# The base's own card
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted pipeline whose base has a card with metadata."""
    folder = tmp_path_factory.mktemp("card")
    source = write_pipeline(folder / "model")
    (source / "README.md").write_text(BASE_CARD)
    omni_convert.convert(source, folder / "out", method="int8", ignore=["img_mlp"])
    return folder / "out"


def card(folder: Path, base_model: str | None = "org/base", repo_id: str = "me/base-INT8") -> str:
    manifest = read_json(folder / "omni_convert.json")
    return make_card(folder, repo_id, base=base_of(manifest, base_model))


def metadata(text: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert match
    found = yaml.safe_load(match[1])
    assert isinstance(found, dict)
    return found


def rows(text: str) -> list[list[str]]:
    """Cells of every table row."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_metadata_is_the_bases_and_what_conversion_adds(out: Path) -> None:
    assert metadata(card(out)) == {
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "license": "other",
        "license_name": "some-license",
        "license_link": "LICENSE.md",
        "language": ["en", "zh"],
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["diffusers", "art", "omni-convert", "int8"],
    }


def test_what_nobody_said_is_left_out(out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "out")
    (copy / "README.md").unlink()
    text = card(copy, base_model=None)
    assert metadata(text) == {"library_name": "diffusers", "tags": ["omni-convert", "int8"]}
    assert "huggingface.co" not in text
    assert "This is `model` with" in text


@pytest.mark.parametrize(
    "head",
    [
        "license: [1, 2]\ntags: {a: b}\npipeline_tag: 7\nlanguage: ''",
        'license: "two\\nlines"\ntags: [1]',
        "- a list",
        "broken: [",
        "license: &a [*a]",
    ],
)
def test_metadata_that_is_wrong_is_left_out(out: Path, tmp_path: Path, head: str) -> None:
    copy = shutil.copytree(out, tmp_path / "out")
    (copy / "README.md").write_text(f"---\n{head}\n---\n")
    found = metadata(card(copy))
    assert found.keys() == {"base_model", "base_model_relation", "library_name", "tags"}
    assert found["tags"] == ["omni-convert", "int8"]


def test_a_card_that_is_no_text_has_no_metadata(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\xff\n---\n")
    assert read_metadata(tmp_path / "README.md") == {}
    (tmp_path / "README.md").write_bytes(b"no metadata")
    assert read_metadata(tmp_path / "README.md") == {}


def test_the_numbers_are_those_of_the_files(out: Path) -> None:
    text, summary = card(out), omni_convert.inspect(out)
    transformer = next(item for item in summary.components if item.name == "transformer")
    assert f"{transformer.bits_per_weight:.2f} bits per weight" in text
    tensors = read_json(out / "omni_convert.json")["components"]["transformer"]["tensors"]
    errors = [entry["sqnr_db"] for entry in tensors.values() if entry["action"] == "int8"]
    assert f"mean SQNR {sum(errors) / len(errors):.2f} dB over {len(errors)} layers" in text
    assert f"| {min(errors):.2f} dB |" in text
    table = {row[0]: row for row in rows(text) if len(row) == 5}
    to_q = [entry["sqnr_db"] for name, entry in tensors.items() if name.endswith(".attn.to_q.weight")]
    assert table["`transformer_blocks.*.attn.to_q`"][1:4] == [
        str(len(to_q)), "**int8**", f"{min(to_q):.2f} to {max(to_q):.2f} dB"
    ]  # fmt: skip
    kept = next(row for name, row in table.items() if "img_mlp" in name)
    assert kept[2:] == ["unchanged", "", "--ignore img\\_mlp"]
    quantized = sum(int(row[1]) for row in table.values() if row[2] == "**int8**")
    assert quantized == transformer.quantized_layers == len(errors)


def test_how_to_load_is_what_the_folder_is(out: Path, tmp_path: Path) -> None:
    text = card(out)
    assert "vllm serve me/base-INT8 --omni" in text
    assert 'DiffusionPipeline.from_pretrained("me/base-INT8", torch_dtype=torch.bfloat16)' in text
    assert "loads it on CUDA and Ascend NPU" in text
    write_sharded(tmp_path / "text", [{"a.weight": random(32, 32)}], {"architectures": ["BertModel"]}, stem="model")
    omni_convert.convert(tmp_path / "text", tmp_path / "out", method="fp8", target="omni-convert")
    text = card(tmp_path / "out")
    assert 'BertModel.from_pretrained("me/base-INT8", dtype=torch.bfloat16)' in text
    assert "vllm serve" not in text
    assert metadata(text)["library_name"] == "transformers"


def test_it_says_the_same_every_time(out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "out", copy_function=shutil.copyfile)
    assert card(out) == card(copy)


def test_names_of_a_model_have_no_meaning_in_it(tmp_path: Path) -> None:
    evil = "a|b`](x)<img src=x>\n# no"
    tensors: dict[str, Tensor] = {f"{evil}.weight": random(32, 32), "b.weight": random(32, 32)}
    config = {"architectures": ["A`|<b>"], "model_type": "x"}
    write_sharded(tmp_path / "model", [tensors], config, stem="model")
    omni_convert.convert(tmp_path / "model", tmp_path / "out", method="int8", target="omni-convert")
    text = card(tmp_path / "out")
    html = (
        pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table").render(text.partition("---\n\n")[2])
    )
    assert "<img" not in html
    assert "<b>" not in html
    assert html.count("<h1>") == 1
    assert [len(row) for row in rows(text) if "a\\|b" in row[0]] == [5, 2]
    assert "from_pretrained" not in text


def test_tables_are_tables(out: Path) -> None:
    html = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table").render(card(out))
    assert html.count("<table>") == 3
    assert html.count("<tr>") == len(rows(card(out))) - 3  # without the lines under the heads


def test_a_card_of_ones_own_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "card.md"
    path.write_text("---\nlicense: mit\n---\n# Mine\n")
    assert check_card(path) == path.read_text()
    for wrong in (b"---\nbroken: [\n---\n", b"---\n- a\n---\n", b"\xff\xfe\xff"):
        path.write_bytes(wrong)
        with pytest.raises(OmniConvertError, match=r"card\.md: is no model card"):
            check_card(path)


def test_a_manifest_of_an_older_version(out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "out")
    manifest = json.loads((copy / "omni_convert.json").read_text())
    del manifest["components"]["transformer"]["weights"]
    write_json(copy / "omni_convert.json", manifest)
    with pytest.raises(
        OmniConvertError, match=r"omni_convert\.json: found no components\.transformer\.weights\. .*Convert again"
    ):
        card(copy)


def test_a_picture_of_the_error(out: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    manifest = read_json(out / "omni_convert.json")
    picture = draw_picture(manifest)
    assert picture is not None
    assert picture == draw_picture(json.loads(json.dumps(manifest)))
    (tmp_path / "a.png").write_bytes(picture)
    with image.open(tmp_path / "a.png") as shown:
        assert shown.width == 960
        assert len(shown.convert("RGB").getcolors(1 << 20)) > 20
    tensors = manifest["components"]["transformer"]["tensors"]
    tensors["$x_{evil.0.b.weight"] = {"action": "int8", "why": "", "sqnr_db": 3.0}
    worse = draw_picture(manifest)
    assert worse is not None
    assert worse != picture
    manifest["components"]["transformer"]["tensors"] = {"a.weight": {"action": "int8", "why": "", "sqnr_db": 3.0}}
    assert draw_picture(manifest) is None
    assert "![SQNR" in make_card(out, "me/x", base=base_of(manifest, None), picture=True)
    assert "![SQNR" not in card(out)


def test_without_matplotlib_there_is_no_picture(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw_picture(read_json(out / "omni_convert.json")) is None


@pytest.mark.parametrize(("text", "language"), [("no", "no"), ("[en, no, on]", ["en", "no", "on"])])
def test_norwegian_is_a_language(tmp_path: Path, text: str, language: object) -> None:
    (tmp_path / "README.md").write_text(f"---\nlanguage: {text}\nlicense: mit\n---\n# Base\n")
    inherited = read_metadata(tmp_path / "README.md")
    assert inherited["language"] == language
    written = make_metadata(inherited, base_model=None, library=None, tags=[]).to_yaml()
    assert yaml.safe_load(written)["language"] == language
