"""What the user asked for: patterns over layer names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_convert.converter.recipe import Recipe, check_patterns, closest_names, make_recipe, read_recipe
from omni_convert.formats import FORMATS, make_format
from omni_convert.formats.config import LayerRule, QuantizationConfig
from omni_convert.formats.errors import OmniConvertError, UsageError
from omni_convert.formats.patterns import Pattern

LAYERS = ["transformer_blocks.0.img_mlp.net.2", "transformer_blocks.10.attn.to_q", "proj_out"]


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("img_mlp", LAYERS[0], True),
        ("img_mlp.net.2", LAYERS[0], True),
        ("imgxmlp", LAYERS[0], False),
        ("img.mlp", LAYERS[0], False),  # a dot is a dot
        ("IMG_MLP", LAYERS[0], False),
        ("*.img_mlp.*", LAYERS[0], True),
        ("img_mlp*", LAYERS[0], False),  # a glob is over the whole name
        ("*img_mlp", LAYERS[0], False),
        ("proj_ou?", "proj_out", True),
        ("transformer_blocks.[0-9].*", LAYERS[0], True),
        ("transformer_blocks.[0-9].*", LAYERS[1], False),
        ("*", "proj_out", True),
        ("re:img_mlp", LAYERS[0], True),
        (r"re:blocks\.[01]\.", LAYERS[0], True),
        (r"re:blocks\.[01]\.", LAYERS[1], False),
        ("re:^proj", "proj_out", True),
        ("re:^out", "proj_out", False),
        ("re:*", "re:*", None),
    ],
)
def test_pattern(pattern: str, name: str, matches: bool | None) -> None:
    if matches is None:
        with pytest.raises(UsageError, match="not a regular expression"):
            Pattern(pattern)
    else:
        assert Pattern(pattern).matches(name) is matches


@pytest.mark.parametrize("text", ["", "re:"])
def test_empty_pattern_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="empty pattern"):
        Pattern(text)


@given(st.text(st.characters(exclude_characters="*?[", exclude_categories=["Cs"]), min_size=1))
def test_text_is_its_own_pattern(text: str) -> None:
    assert str(Pattern(text if not text.startswith("re:") else "x")) in (text, "x")
    if not text.startswith("re:"):
        assert Pattern(text).matches(f"before{text}after")


@given(st.lists(st.sampled_from(["img_mlp", "*.to_q", "re:^proj"])), st.lists(st.sampled_from(["a", "b"])))
def test_recipe_survives_its_dict(ignore: list[str], components: list[str]) -> None:
    recipe = make_recipe(method="int8", ignore=ignore, components=components)
    assert recipe.components == tuple(dict.fromkeys(components))
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_target_survives_its_dict() -> None:
    recipe = make_recipe(method="int8", target="omni-convert", default_ignore=False)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(UsageError, match="--target is 'vllm'"):
        make_recipe(method="int8", target="vllm")


def test_unknown_method() -> None:
    with pytest.raises(UsageError, match=r"'int9', expected one of int8"):
        make_recipe(method="int9")


def test_pattern_that_matches_nothing_shows_what_comes_close() -> None:
    check_patterns("--ignore", ["img_mlp", "proj_out"], LAYERS)
    with pytest.raises(UsageError) as caught:
        check_patterns("--ignore", ["img_mlp", "img_mpl"], LAYERS)
    assert "--ignore img_mpl" in str(caught.value)
    assert "img_mlp" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("img_mpl", "img_mlp"), ("proj_uot", "proj_out"), ("re:to_k", "to_q"), ("trnsformer_blocks.*.attn.to_q", None)],
)
def test_closest_names(text: str, expected: str | None) -> None:
    assert closest_names(text, LAYERS)[0] == (expected or "transformer_blocks.*.attn.to_q")


@pytest.mark.parametrize("text", ["IMG_MLP", "transformer_blocks.0.img_mlp.weight", "zzzzzzzz"])
def test_there_is_always_a_suggestion(text: str) -> None:
    assert len(closest_names(text, LAYERS)) == 3
    assert text == "zzzzzzzz" or "img_mlp" in closest_names(text, LAYERS)[0]
    with pytest.raises(UsageError, match="closest names are"):
        check_patterns("--ignore", [text], LAYERS)


RECIPE = r"""
target: omni-convert
default_ignore: false
components:
  transformer:
    method: fp8
    granularity: channel
    ignored_layers: [img_mlp, 're:blocks\.[01]\.']
    layers:                     # the first match decides
      - txt_mlp.net.2: none
      - txt_mlp: {method: int8, quality: balanced}
  text_encoder: int8
  vae: none
  image_encoder:
"""
"""What a user may write."""


def test_recipe_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    recipe = make_recipe(recipe=read_recipe(path))
    assert recipe == Recipe(
        parts={
            "transformer": QuantizationConfig(
                format=make_format("fp8", granularity="channel"),
                ignored_layers=("img_mlp", r"re:blocks\.[01]\."),
                layers=(
                    LayerRule("txt_mlp.net.2", None),
                    LayerRule("txt_mlp", make_format("int8", quality="balanced")),
                ),
            ),
            "text_encoder": QuantizationConfig(format=FORMATS["int8"]),
        },
        target="omni-convert",
        default_ignore=False,
    )
    assert [fmt.name for fmt in recipe.formats] == ["fp8", "int8", "int8"]
    again = tmp_path / "again.json"
    again.write_text(json.dumps(recipe.to_dict()))
    assert make_recipe(recipe=read_recipe(again)) == recipe


def test_what_is_typed_goes_before_the_recipe() -> None:
    written = {"method": "int8", "ignored_layers": ["a"], "layers": [{"b": None}], "target": "omni-convert"}
    recipe = make_recipe(
        recipe=written,
        ignore=["c"],
        layers=["d=fp8"],
        target="vllm-omni",
        default_ignore=False,
        ignore_whole_group=True,
    )
    (part,) = recipe.parts.values()
    assert part.ignored_layers == ("c", "a")
    assert [rule.name for rule in part.layers] == ["d", "b"]
    assert (recipe.target, recipe.default_ignore, recipe.ignore_whole_group) == ("vllm-omni", False, True)
    kept = make_recipe(recipe=written)
    assert (kept.target, kept.default_ignore, kept.ignore_whole_group) == ("omni-convert", True, False)
    named = make_recipe(recipe=written, components=["transformer", "text_encoder=fp8"])
    assert {name: config.format.name for name, config in named.parts.items()} == {
        "transformer": "int8", "text_encoder": "fp8",
    }  # fmt: skip
    assert all(config.ignored_layers == ("a",) for config in named.parts.values())


def test_components_may_all_have_methods_of_their_own() -> None:
    recipe = make_recipe(components=["a=int8", "b=fp8"])
    assert {name: config.format.name for name, config in recipe.parts.items()} == {"a": "int8", "b": "fp8"}


def test_yaml_merges(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "components:\n  a: &a {method: int8, ignored_layers: [x]}\n  b:\n    <<: *a\n    quality: balanced\n"
    )
    parts = make_recipe(recipe=read_recipe(path)).parts
    assert (parts["b"].format, parts["b"].ignored_layers) == (make_format("int8", quality="balanced"), ("x",))


def test_the_python_forms_are_one() -> None:
    spec = {"method": "fp8", "weight_block_size": [64, 64], "ignored_layers": ["a"]}
    made = make_recipe(method="fp8", block_size=(64, 64), ignore=["a"])
    assert make_recipe(quantization=spec) == make_recipe(recipe=spec) == made
    assert make_recipe(quantization=QuantizationConfig(format=FORMATS["int8"])) == make_recipe(method="int8")
    assert make_recipe(quantization={"transformer": "int8", "vae": None}).components == ("transformer",)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({}, "found nothing that says how to quantize, expected one of --method and --recipe"),
        ({"method": "int8", "recipe": {"method": "int8"}}, "found 2 that say how"),
        ({"method": "int8", "bogus": 1}, "found the option bogus"),
        ({"method": "int8", "ignore": "img_mlp"}, "ignore is img_mlp, expected a list"),
        ({"method": "int8", "layers": [{"img_mlp": None}]}, "layers is .*expected a list"),
        ({"method": "int8", "components": "transformer"}, "components is transformer, expected a list"),
        ({"method": "int8", "components": ["a=int8", "a=fp8"]}, "give one two methods"),
        ({"components": ["a=int8", "b"]}, "found nothing that says"),
        ({"method": "int8", "layers": ["a=int9"]}, "--layer a=int9: the method is 'int9'"),
        ({"recipe": {"method": "int8", "target": ["a"]}}, "--recipe: --target is"),
        ({"recipe": {"method": "int8"}, "quality": "balanced"}, "--quality: needs --method"),
        ({"recipe": {"components": {"a": "int8"}}, "components": ["b"]}, "--component b: the recipe names"),
        ({"recipe": {"components": {"a": "int8"}, "method": "fp8"}}, "found method beside components"),
        ({"recipe": {"target": "vllm-omni"}}, "neither method nor components"),
        ({"recipe": {"method": "int8", "ignore": ["a"]}}, "Did you mean ignored_layers"),
        ({"recipe": {"method": "int8", "default_ignore": "no"}}, "default_ignore is no"),
        ({"recipe": {"method": "int8", "input_scales": [1]}}, "input_scales is"),
        ({"recipe": {"method": "int8", "target": "vllm"}}, "--target is 'vllm'"),
        ({"recipe": {"components": {"transformer": "none"}}}, "nothing would be quantized"),
        ({"quantization": "none"}, "nothing would be quantized"),
        ({"quantization": FORMATS["int8"].config([])}, "quantized already"),
        ({"method": "int8", "components": ["a=int9"]}, "--component a=int9: the method is"),
        ({"method": "int8", "layers": ["a"]}, "PATTERN=METHOD"),
    ],
    ids=str,
)
def test_recipes_that_say_too_much_or_nothing(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_recipe(**choices)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: [", "cannot be read as YAML"),
        ("method: int8\nmethod: fp8\n", "key method twice"),
        ("method: int8\nlayers:\n- a: fp8\n  a: none\n", "key a twice"),
        ("- int8\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("method: !!python/object/apply:os.getcwd []\n", "cannot be read as YAML"),
    ],
    ids=str,
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(OmniConvertError, match=message) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)
