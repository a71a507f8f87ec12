"""Choices on real checkpoints: conditions hold in what is written, groups stay whole, and the recipe says it all."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from families import FAMILIES
from hostile.small import (
    QWEN_CONFIG,
    Tensor,
    qwen_shards,
    random,
    snapshot,
    to_values,
    write_model,
    write_pipeline,
    write_sharded,
)

from omni_convert import OmniConvertError, UsageError, analyze, convert, load, plan, verify
from omni_convert.converter.choice import KEEP, Choice
from omni_convert.converter.plan import Plan
from omni_convert.converter.recipe import read_recipe
from omni_convert.converter.show_analysis import choice_dict, choice_text, recipe_yaml

MIXED = ["int8", "fp8:channel", "mxfp8", "mxfp4"]


def uneven(tensor: Tensor, place: int) -> Tensor:
    """The weight with outliers that make it worse the larger ``place`` is."""
    values = to_values(tensor).copy()
    values[place % 7 :: 7, place % 5] *= 2 ** (place % 6)
    return Tensor("BF16", (values.view("<u4") >> 16).astype("<u2"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two blocks in two shards, no layer of which is like another."""
    shards = [
        {
            name: uneven(tensor, place + 3 * number) if tensor.bits.ndim == 2 else tensor
            for place, (name, tensor) in enumerate(shard.items())
        }
        for number, shard in enumerate(qwen_shards(width=64))
    ]
    return write_sharded(tmp_path / "model", [*shards], QWEN_CONFIG)


def formats(planned: Plan) -> dict[tuple[str, str], str]:
    return {
        (part.component.name, tensor.layer): tensor.decision.format.name if tensor.decision.format else "keep"
        for part in planned.components
        for tensor in part.tensors()
    }


def assert_whole_groups(planned: Plan) -> None:
    groups: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for part in planned.components:
        for tensor in part.tensors():
            assert tensor.scale_group is None or tensor.group is not None
            if tensor.group:
                found = tensor.decision.format
                groups[part.component.name, tensor.group].add(found.name if found else "keep")
    assert all(len(found) == 1 for found in groups.values())


@pytest.mark.parametrize("target", ["vllm-omni", "omni-convert"])
@pytest.mark.parametrize(
    "asked", [{"auto_ignore": "sqnr>=30"}, {"budget": "size<=0.7"}, {"auto_ignore": "sqnr>=20", "budget": "size<=0.8"}]
)
def test_what_is_written_holds_the_conditions(source: Path, tmp_path: Path, target: str, asked: dict[str, str]) -> None:
    choice = analyze(source, MIXED, target=target).choose(**asked)
    report = convert(source, tmp_path / "out", methods=MIXED, target=target, **asked)  # type: ignore[arg-type]
    assert report.bytes_after == choice.plan.bytes_after
    for key, limit in asked.items():
        number = float(limit.split("=")[1])
        assert min(report.sqnr_db.values()) >= number if key == "auto_ignore" else choice.share <= number
    found = {
        unit.name.name: unit.chosen.sqnr_db for unit in choice.units if unit.number != KEEP and len(unit.formats) == 1
    }
    assert found.items() <= report.sqnr_db.items()
    assert min(report.sqnr_db.values()) == min(unit.chosen.sqnr_db for unit in choice.units)
    assert verify(tmp_path / "out", source=source).ok
    assert_whole_groups(choice.plan)


def test_a_target_that_mixes_gets_more_for_the_same(source: Path) -> None:
    mixed = analyze(source, MIXED, target="omni-convert", default_ignore=False)
    alone = [analyze(source, [method], target="omni-convert", default_ignore=False) for method in MIXED]
    choice = mixed.choose(budget="size<=0.6")
    assert choice.error < min(found.choose(budget="size<=0.6").error for found in alone)
    assert len(set(formats(choice.plan).values())) > 2
    asked = {"auto_ignore": "sqnr>=19"}  # which some layers have with mxfp4, the smaller of these two
    cheap = analyze(source, ["int8", "mxfp4"], target="omni-convert").choose(**asked)
    assert cheap.share < min(found.choose(**asked).share for found in (alone[0], alone[3]))
    assert set(formats(cheap.plan).values()) >= {"int8", "mxfp4"}


def test_another_target_gets_the_best_of_one_method(source: Path) -> None:
    found = analyze(source, MIXED)
    for asked in ({"budget": "size<=0.7"}, {"auto_ignore": "sqnr>=18"}):
        best = found.choose(**asked)
        assert len(best.plan.recipe.formats) == 1
        alone = [analyze(source, [method]).choose(**asked) for method in found.methods]
        weights = sum(unit.weights for unit in best.units)
        errors = [math.fsum(unit.chosen.error for unit in item.units) / weights for item in alone]
        if "budget" in asked:
            assert best.error == pytest.approx(min(errors))
        else:
            assert best.share == min(item.share for item in alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_stay_whole_and_the_recipe_says_the_same(sources: dict[str, Path], tmp_path: Path, family: str) -> None:
    found = analyze(sources[family], ["fp8:channel"] if family == "Qwen2.5-Omni" else [])  # it loads no other
    for share in (0.75, 0.9):
        try:
            choice = found.choose(budget=f"size<={share}")
        except UsageError as error:
            assert "the smallest choice takes" in str(error)
            continue
        assert_whole_groups(choice.plan)
        path = tmp_path / f"{share}.yaml"
        path.write_text(recipe_yaml(choice))
        replayed = plan(sources[family], recipe=read_recipe(path))
        assert replayed.recipe.to_dict() == choice.plan.recipe.to_dict()
        assert formats(replayed) == formats(choice.plan)
        assert choice.deviating or share == 0.75


@pytest.mark.parametrize(
    "asked",
    [
        {"method": "int8", "auto_ignore": "sqnr>=30"},
        {"methods": MIXED, "target": "omni-convert", "budget": "size<=0.62"},
        {"method": "fp8", "ignore": ["txt_mlp"], "layers": ["to_out=none"], "budget": "size<=0.8"},
    ],
    ids=str,
)
def test_the_recipe_gives_the_same_bytes(source: Path, tmp_path: Path, asked: dict[str, Any]) -> None:
    convert(source, tmp_path / "chosen", **asked)
    convert(source, tmp_path / "replayed", recipe=read_recipe(tmp_path / "chosen" / "omni_convert.json"))
    assert snapshot(tmp_path / "chosen") == snapshot(tmp_path / "replayed")
    if "methods" in asked:
        choice = analyze(source, MIXED, target="omni-convert").choose(budget=asked["budget"])
        (tmp_path / "choice.yaml").write_text(recipe_yaml(choice))
        convert(source, tmp_path / "edited", recipe=read_recipe(tmp_path / "choice.yaml"))
        assert snapshot(tmp_path / "chosen") == snapshot(tmp_path / "edited")


def test_the_choice_does_not_depend_on_threads(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for threads, piece in ((1, 1 << 20), (3, 1 << 10), (2, 3 << 10)):
        monkeypatch.setattr("omni_convert.converter.analyze.PIECE_BYTES", piece)
        choice = analyze(source, MIXED, target="omni-convert", threads=threads).choose(budget="size<=0.6")
        found.append((recipe_yaml(choice), choice_dict(choice)))
    assert found[0] == found[1] == found[2]


def test_a_run_that_stopped_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"method": "int8", "budget": "size<=0.7"}
    with monkeypatch.context() as patch:
        patch.setattr("omni_convert.converter.convert.manifest_bytes", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(source, tmp_path / "out", **asked)
    convert(source, tmp_path / "out", resume=True, **asked)
    convert(source, tmp_path / "fresh", **asked)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "fresh")


def test_two_components_get_rules_of_their_own(tmp_path: Path) -> None:
    source = write_pipeline(tmp_path / "model", second=True)
    choice = analyze(source, ["int8"], ignore=["transformer_2.transformer_blocks.1.txt_mlp"]).choose(
        budget="size<=0.95"
    )
    parts = choice.plan.recipe.to_dict()["components"]
    assert parts.keys() == {"transformer", "transformer_2"}
    assert "transformer_2.transformer_blocks.1.txt_mlp" in parts["transformer_2"]["ignored_layers"]
    assert "transformer_2.transformer_blocks.1.txt_mlp" not in parts["transformer"]["ignored_layers"]
    assert parts["transformer"]["ignored_layers"]
    assert formats(plan(source, recipe=choice.plan.recipe.to_dict())) == formats(choice.plan)
    first = choice.deviating[0]
    assert f"{first.name.component}.{first.name.name}" in choice_text(choice)


def test_names_that_are_parts_of_others(tmp_path: Path) -> None:
    """FLUX has transformer_blocks and single_transformer_blocks, whose layers have the same names."""
    source = FAMILIES["FLUX.1"].write(tmp_path / "model")
    found = analyze(source, ["int8"])
    for share in (85, 88, 91, 94, 97):
        choice = found.choose(budget=f"size<=0.{share}")
        wanted = {layer for unit in choice.units if unit.number == KEEP for layer in unit.formats}
        kept = {layer for (_, layer), name in formats(choice.plan).items() if name == "keep"}
        assert wanted == kept & {layer for unit in choice.units for layer in unit.formats}
        assert len(choice.plan.recipe.to_dict()["ignored_layers"]) <= len(choice.deviating)


def test_names_with_signs_of_patterns(tmp_path: Path) -> None:
    names = ["blocks[0].ff", "blocks[1].ff", "blocks[1].ff*", "blocks[?].ff", "a.ff", "ba.ffb", "a.ffb", "a.ff.0"]
    tensors = {f"{name}.weight": random(32, 32, seed=place) for place, name in enumerate(names)}
    source = write_model(tmp_path / "model", None, tensors)
    found = analyze(source, ["int8"])
    for share in (60, 65, 70, 75, 80, 85, 90, 95):
        choice = found.choose(budget=f"size<=0.{share}")
        wanted = {layer for unit in choice.units if unit.number == KEEP for layer in unit.formats}
        kept = {layer for (_, layer), name in formats(choice.plan).items() if name == "keep"}
        assert wanted == kept
        assert len(choice.plan.recipe.to_dict()["ignored_layers"]) == len(kept)


def test_layers_of_like_names_are_one_rule(source: Path) -> None:
    choice = analyze(source, ["int8"]).choose(budget="size<=0.999")
    rules = choice.plan.recipe.to_dict()["ignored_layers"]
    assert "transformer_blocks.*.attn.to_qkv" in rules
    assert len(rules) < len(choice.deviating)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"auto_ignore": "sqnr>=90"}, r'"sqnr>=90": no layer has that, the best has \d\d\.\d\d dB'),
        ({"budget": "size<=0.3"}, r'"size<=0.3": the smallest choice takes \d+ of the source\'s \d+ bytes'),
        ({"budget": "size<=1"}, r'"size<=1": allows to keep everything as it is'),
        ({"auto_ignore": "sqnr>=44", "budget": "size<=0.55"}, r"in which every quantized layer has that SQNR takes"),
        ({}, "expected --auto-ignore, --budget or both"),
    ],
    ids=str,
)
def test_conditions_that_nothing_holds(source: Path, asked: dict[str, str], expected: str) -> None:
    found = analyze(source, MIXED)
    with pytest.raises(UsageError, match=expected):
        found.choose(**asked)


def test_the_smallest_choice_is_as_small_as_said(source: Path) -> None:
    found = analyze(source, MIXED, target="omni-convert")
    with pytest.raises(UsageError) as caught:
        found.choose(auto_ignore="sqnr>=25", budget="size<=0.1")
    share = str(caught.value).split("size<=")[-1].split(")")[0]
    choice = found.choose(auto_ignore="sqnr>=25", budget=f"size<={share}")
    assert float(share) - 1e-4 < choice.share <= float(share)


def test_conditions_keep_all_their_digits(source: Path) -> None:
    typed = "0.69570435988031043"
    choice = analyze(source, MIXED, target="omni-convert").choose(budget=f"size<={typed}")
    assert str(choice.conditions) == f'--budget "size<={typed}"'


def test_methods_alone_are_no_conversion(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--methods is what to choose from"):
        convert(source, tmp_path / "out", methods=["int8"])
    with pytest.raises(UsageError, match="how to quantize"):
        convert(source, tmp_path / "out", budget="size<=0.6")
    with pytest.raises(OmniConvertError, match="expected sqnr>=DECIBELS"):
        convert(tmp_path / "nowhere", tmp_path / "out", method="int8", auto_ignore="30")


def test_a_mixed_choice_loads(minilm: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"methods": ["int8", "mxfp8", "mxfp4"], "target": "omni-convert"}
    convert(minilm, tmp_path / "out", auto_ignore="sqnr>=34", **asked)
    choice: Choice = analyze(minilm, **asked).choose(auto_ignore="sqnr>=34")
    found = {linear.format.name for linear in load(tmp_path / "out").modules() if hasattr(linear, "format")}
    assert found == set(formats(choice.plan).values()) - {"keep"}


def test_what_people_see(source: Path) -> None:
    choice = analyze(source, ["int8"]).choose(budget="size<=0.7")
    text = choice_text(choice)
    assert '--budget "size<=0.7"' in text
    assert f"{choice.share:.4f}" in text
    data = choice_dict(choice)
    assert data["recipe"] == yaml.safe_load(recipe_yaml(choice)) == choice.plan.recipe.to_dict()
    assert data["bytes_after"] == choice.plan.bytes_after
    kept = [unit for unit in data["units"] if unit["becomes"] == "kept"]
    assert len(kept) == len(choice.deviating) > 0
    quantized = [unit for unit in data["units"] if unit["becomes"] == "int8"]
    assert max(unit["lowest_sqnr_db"]["int8"] for unit in kept) <= max(
        unit["lowest_sqnr_db"]["int8"] for unit in quantized
    )
