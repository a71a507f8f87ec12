"""The metadata of a model card: what the base model's card says of it, and what conversion adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni_convert.formats.errors import OmniConvertError, printable

if TYPE_CHECKING:
    from huggingface_hub import ModelCard, ModelCardData

CARD_NAME = "README.md"
_MAX_CARD_BYTES = 4_000_000
_INHERITED = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag")
"""What a quantized model has in common with its base."""
_LISTS = ("license", "language")
"""Fields that may hold several values."""


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a card; empty without a card, without metadata, or if it cannot be read: nothing is guessed."""
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub import metadata_load
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    if not path.is_file() or path.stat().st_size > _MAX_CARD_BYTES:
        return {}
    try:
        data = metadata_load(path) or {}
        if "language" in data:  # "no" is Norwegian, which YAML takes for False
            block = REGEX_YAML_BLOCK.search(path.read_text(encoding="utf-8-sig"))
            assert block is not None
            data["language"] = yaml.load(block[2], Loader=yaml.BaseLoader)["language"]
    except (ValueError, TypeError, yaml.YAMLError, RecursionError):
        return {}
    return data


def parse_card(text: str) -> ModelCard:
    """``text`` as huggingface_hub reads it."""
    from huggingface_hub import ModelCard

    return ModelCard(text, ignore_metadata_errors=True)


def make_metadata(
    inherited: Mapping[str, Any], *, base_model: str | None, library: str | None, tags: Sequence[str]
) -> ModelCardData:
    """Metadata of a converted model.

    Args:
        inherited: of the base model's card. Fields that are not in it are left out, as are those of another type.
        base_model: repository that was converted, if that is known.
        library: that reads the folder, unless the base's card names another.
        tags: that are added to the base's.
    """
    from huggingface_hub import ModelCardData

    fields = {name: inherited[name] for name in _INHERITED if _is_text(inherited.get(name), several=name in _LISTS)}
    fields.setdefault("library_name", library)
    base_tags = inherited.get("tags")
    every = [*(base_tags if _is_text(base_tags, several=True) and isinstance(base_tags, list) else ()), *tags]
    if base_model:
        fields |= {"base_model": base_model, "base_model_relation": "quantized"}
    return ModelCardData(**fields, tags=every)


def check_card(path: Path) -> str:
    """The text of a card that a person wrote.

    Raises:
        OmniConvertError: no text, or its metadata cannot be read.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
        parse_card(text)
    except OSError as error:
        raise OmniConvertError(f"{path}: cannot be read ({error.strerror}), expected a model card.") from error
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise OmniConvertError(
            f"{path}: is no model card ({printable(str(error), 300)}), expected Markdown that may begin with metadata: "
            "YAML between lines of ---. Correct it."
        ) from error
    if not text.strip():
        raise OmniConvertError(f"{path}: is empty, expected a model card. Leave out --card to have one written.")
    return text


def _is_text(value: object, *, several: bool) -> bool:
    """Whether a field holds what the Hub takes: text on one line, or a list of that."""
    values = value if several and isinstance(value, list) else [value]
    return bool(values) and all(isinstance(item, str) and item.isprintable() and 0 < len(item) < 500 for item in values)
