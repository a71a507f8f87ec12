"""The place of the card in a repository: what may go there, and what there is of a person and stays."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from omni_convert.formats.errors import OmniConvertError, UsageError
from omni_convert.formats.layout import MANIFEST_NAME, read_json
from omni_convert.hub.metadata import CARD_NAME, check_card
from omni_convert.hub.repository import RemoteFile, Repository

CARD_SHA256 = "card_sha256"
"""In a published manifest: of the card that was written from it."""


def read_texts(card: str | os.PathLike[str] | None, message: str | None) -> str | None:
    """The card that the user gave, fit to be published as the message is.

    Raises:
        OmniConvertError: it is no card.
        UsageError: a text holds the user's token.
    """
    text = None if card is None else check_card(Path(card))
    _refuse_token(text, f"--card {card}")
    _refuse_token(message, "--message")
    return text


def _refuse_token(text: str | None, what: str) -> None:
    from huggingface_hub import get_token

    token = get_token()
    if text and token and token in text:
        raise UsageError(f"{what}: holds your token, which everybody could read there. Take it out.")


def check_replaceable(repo: Repository, published: Mapping[str, RemoteFile]) -> None:
    """Whether a card that is written from the manifest may take the place of the one that is there, if any.

    Raises:
        OmniConvertError: a person wrote or changed it.
    """
    if CARD_NAME not in published:
        return
    ours = read_json(repo.read(MANIFEST_NAME)).get(CARD_SHA256) if MANIFEST_NAME in published else None
    if hashlib.sha256(repo.read(CARD_NAME).read_bytes()).hexdigest() != ours:
        raise OmniConvertError(
            f"{repo.url}: its {CARD_NAME} was not written by omni-convert, or was changed since, and a new one would "
            "replace it. Give the one to publish with --card, or remove it there."
        )
