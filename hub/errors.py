"""What goes wrong between here and the Hub: what passes by itself is waited for; the rest is said for people to act on.

No text of these errors holds a token: a server may quote what it was sent.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

from omni_convert.formats.errors import OmniConvertError, printable

_T = TypeVar("_T")
_log = logging.getLogger(__name__)
_WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further attempt."""
_PASSING = (408, 425, 429, 500, 502, 503, 504)
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
    """Run a step that may be repeated, as often as it takes while the cause may pass.

    ``doing``: for the message, as in "cannot be merged".

    Raises:
        HubError: the Hub refused, or still cannot be reached; says what to do.
    """
    import httpx2
    from huggingface_hub.errors import LocalTokenNotFoundError

    for wait in (*_WAITS, None):
        try:
            return step()
        except httpx2.HTTPError as error:  # huggingface_hub's errors are of this class too
            status = _status(error)
            if wait is None or (status is not None and status not in _PASSING):
                raise HubError(f"{repo}: {doing}: {_reason(status, error)}", status) from error
            _wait(error, wait)
        except LocalTokenNotFoundError as error:
            raise HubError(f"{repo}: {doing}: {_NO_LOGIN}", 401) from error
        except ValueError as error:  # metadata that the Hub does not take, or an answer that is cut off
            if wait is None or not isinstance(error, json.JSONDecodeError):
                raise OmniConvertError(f"{repo}: {doing}: {redact(str(error))}.") from error
            _wait(error, wait)
        except (OSError, RuntimeError) as error:  # of hf_xet, which has none of its own for the network
            if isinstance(error, FileNotFoundError) or (wait is None and isinstance(error, OSError) and error.errno):
                raise OmniConvertError(f"{repo}: {doing}: {redact(str(error))}. Correct it, then run again.") from error
            if wait is None:
                raise HubError(f"{repo}: {doing}: {redact(str(error))}. {_AGAIN}") from error
            _wait(error, wait)
    raise AssertionError("the last attempt returns or raises")


def redact(text: str) -> str:
    """``text`` on one line, without tokens and without what signs an address."""
    from huggingface_hub import get_token

    token = get_token()
    text = _TOKEN.sub("[token]", text.replace(token, "[token]") if token else text)
    return printable(re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", " ".join(text.split())).rstrip(". "), 400)


def _wait(error: Exception, seconds: float) -> None:
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    seconds = max(seconds, min(float(asked), 300.0)) if asked.isdigit() else seconds
    _log.warning("%s. Trying again in %.0f s.", redact(str(error)), seconds)
    time.sleep(seconds)


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _reason(status: int | None, error: Exception) -> str:
    """What the Hub's answer means, and what to do."""
    from huggingface_hub import get_token

    if status is None:
        what = redact(str(error)) or type(error).__name__
        return f"the Hub cannot be reached ({what}). Check the connection. {_AGAIN}"
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
    if status in _PASSING:
        return f"the Hub is in trouble ({status}: {said}). {_AGAIN}"
    return f"the Hub refused ({status}: {said})."
