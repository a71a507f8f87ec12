"""What goes wrong between here and the Hub: what passes by itself is waited for; the rest is said for people to act on.

No text of these errors holds a token: a server may quote what it was sent.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from omni_convert.converter.hub_errors import retrying, setting_trouble
from omni_convert.formats.errors import OmniConvertError, printable

_T = TypeVar("_T")
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{4,}")
_QUOTA = re.compile(r"storage|quota|limit reached|upgrade your plan|billing|payment", re.IGNORECASE)
_AGAIN = "What is uploaded is kept: the same command goes on from there."

_NO_LOGIN = "nobody is logged in. Run: hf auth login, or set HF_TOKEN to a token that may write."


class HubError(OmniConvertError):
    """The Hub refused, or could not be reached. ``status``: its answer, None without one."""

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status


def attempt(step: Callable[[], _T], repo: str, doing: str) -> _T:
    """Run a step that may be repeated, again while the cause of its failure may pass.

    ``doing``: for the message, as in "cannot be merged".

    Raises:
        HubError: the Hub refused, or still cannot be reached; says what to do.
        OmniConvertError: it is something here: a file, metadata of a card, HF_HUB_OFFLINE; or no Hub answers.
    """
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        return retrying(step)
    except OmniConvertError:
        raise
    except Exception as error:
        error = error.__cause__ if type(error) is RuntimeError and isinstance(error.__cause__, HTTPError) else error
        text, status = f"{repo}: {doing}: ", _status(error)
        if isinstance(error, LocalTokenNotFoundError):
            raise HubError(text + _NO_LOGIN, 401) from error
        if isinstance(error, OfflineModeIsEnabled):
            raise OmniConvertError(f"{text}HF_HUB_OFFLINE is set. Unset it, then run again.") from error
        if status is not None:
            raise HubError(text + _reason(status, error), status) from error
        if type(error) is ValueError:
            raise OmniConvertError(f"{text}{redact(str(error))}. Correct it, then run again.") from error
        if trouble := setting_trouble(error):
            raise OmniConvertError(text + trouble) from error
        if not isinstance(error, (HTTPError, OSError, RuntimeError, ValueError)):
            raise
        what = redact(str(error)) or type(error).__name__
        raise HubError(f"{text}the Hub cannot be reached ({what}). Check the connection. {_AGAIN}") from error


def redact(text: str) -> str:
    """``text`` on one line, without tokens and without what signs an address."""
    from huggingface_hub import get_token

    token = get_token()
    text = _TOKEN.sub("[token]", text.replace(token, "[token]") if token else text)
    return printable(re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", " ".join(text.split())).rstrip(". "), 400)


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _reason(status: int, error: Exception) -> str:
    """What the Hub's answer means, and what to do."""
    from huggingface_hub import get_token

    said = redact(str(getattr(error, "server_message", None) or f"status {status}"))
    if status == 401 and get_token() is None:
        return _NO_LOGIN
    if status == 401:
        return f"the Hub does not take the token ({said}). Run: hf auth login, or correct HF_TOKEN."
    if status in (402, 413, 507) or (status == 403 and _QUOTA.search(said)):
        return f"the storage is full ({said}). Free some, or see https://huggingface.co/settings/billing. {_AGAIN}"
    if status == 403:
        return (
            f"the token has no right to do that ({said}). Take one that may write to this repository and open pull "
            "requests (https://huggingface.co/settings/tokens), ask its owner, or name one of your own."
        )
    if status == 404:
        return f"is not there, or is private and not yours ({said}). Check the name, and: hf auth whoami."
    if status in (409, 412):
        return f"the repository changed meanwhile ({said}). Look at it, then run again."
    if status in (408, 429) or status >= 500:
        return f"the Hub is in trouble ({status}: {said}). {_AGAIN}"
    return f"the Hub refused ({status}: {said})."
