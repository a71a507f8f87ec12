"""What the user asked for: patterns over layer names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_convert.converter.recipe import Pattern, Recipe, check_patterns, closest_names, make_recipe
from omni_convert.formats import FORMATS
from omni_convert.formats.errors import UsageError

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
    recipe = Recipe(format=FORMATS["int8"], ignore=tuple(map(Pattern, ignore)), components=tuple(components))
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_target_survives_its_dict() -> None:
    recipe = make_recipe(method="int8", target="omni-convert", default_ignore=False)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(UsageError, match="--target is 'vllm'"):
        make_recipe(method="int8", target="vllm")


def test_unknown_method() -> None:
    with pytest.raises(UsageError, match=r"'int9', expected one of int8"):
        make_recipe(method="int9")


def test_pattern_that_matches_nothing_shows_what_comes_close() -> None:
    check_patterns([Pattern("img_mlp"), Pattern("proj_out")], LAYERS)
    with pytest.raises(UsageError) as caught:
        check_patterns([Pattern("img_mlp"), Pattern("img_mpl")], LAYERS)
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
        check_patterns([Pattern(text)], LAYERS)
