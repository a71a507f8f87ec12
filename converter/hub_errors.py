"""What goes wrong between here and the Hub, said so that a person can act on it; and what is worth another try.

Texts of the client are never passed on: they hold addresses that are signed, and could hold more.
"""

from __future__ import annotations

import json
import logging
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from omni_convert.formats.errors import OmniConvertError, printable

if TYPE_CHECKING:
    from omni_convert.converter.hub_repo import Repo

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

WAITS = [1.0, 2.0, 4.0, 8.0]
"""Seconds between tries."""
_LONGEST_WAIT = 60.0
_TRANSIENT = (408, 429, 500, 502, 503, 504)


class GivenUpError(OmniConvertError):
    """The run stops, for a reason that somebody else tells."""


def retrying(action: Callable[[], _T], stopped: Callable[[float], object] = time.sleep) -> _T:
    """``action()``, again after a while if it failed for a reason that may pass.

    ``stopped``: waits so many seconds, and returns True if there is no use in going on.
    """
    for wait in [*WAITS, None]:
        try:
            return action()
        except Exception as error:
            if wait is None or not may_pass(error):
                raise
            wait = min(max(wait, _asked_wait(error)), _LONGEST_WAIT)
            _log.warning("The Hub: %s. Trying again in %.0f s.", _what(error), wait)
        if stopped(wait):
            raise GivenUpError("Stopped.")
    raise AssertionError


@contextmanager
def explained(repo: Repo, name: str = "") -> Iterator[None]:
    """Turn the client's errors into ours. ``name``: the file that was asked for.

    Raises:
        OmniConvertError: in place of any error of huggingface_hub, of the connection or of Xet.
    """
    try:
        yield
    except OmniConvertError:
        raise
    except Exception as error:
        text = _explanation(_cause(error), repo, "" if name else "found no such folder here, and ")
        if text is None:
            raise
        raise OmniConvertError(f"{repo.id}: {name and f'{printable(name)}: '}{text}") from None


def check_client() -> None:
    """Called before huggingface_hub is used for the first time.

    Raises:
        OmniConvertError: it cannot be imported, since it does not understand its settings.
    """
    try:
        import huggingface_hub.constants  # noqa: F401
    except ValueError as error:
        raise OmniConvertError(
            f"huggingface_hub cannot start ({printable(str(error))}). Correct or unset the environment variable that "
            "it read: one of those that begin with HF_."
        ) from error


def setting_trouble(error: Exception) -> str | None:
    """What is wrong here, or with what answers in place of the Hub, if that is the cause. It holds no secret."""
    from huggingface_hub import constants

    endpoint = re.sub("//[^/@]*@", "//", constants.ENDPOINT)
    if isinstance(error, UnicodeEncodeError):
        return "the token has characters that no token has. Log in anew (hf auth login), or correct HF_TOKEN."
    if isinstance(error, ImportError) and "SOCKS" in str(error):
        return "a SOCKS proxy is set (ALL_PROXY, HTTPS_PROXY), which takes a package: pip install 'httpx[socks]'."
    if isinstance(error, (json.JSONDecodeError, KeyError, AttributeError, TypeError, IndexError)):
        return (  # the client trusts what it reads
            f"{endpoint} answered something that is not the Hub's ({type(error).__name__}). Check HF_ENDPOINT, and "
            "proxies and login pages on the way."
        )
    if type(error).__name__ == "InvalidURL" or type(error) is ValueError:
        return f"no address can be made of {endpoint} and the proxies that are set. Correct HF_ENDPOINT or HTTP_PROXY."
    if isinstance(error, FileNotFoundError) and error.filename is None:
        return "there are no certificates where SSL_CERT_FILE or SSL_CERT_DIR says. Correct or unset it."
    if is_local(error):
        assert isinstance(error, OSError)
        return (
            f"{error.filename or 'a file'}: {error.strerror}. Check its rights and its disk: that of the Hub cache "
            "(HF_HOME), or of temporary files (TMPDIR)."
        )
    return None


def is_local(error: Exception) -> bool:
    """Whether the operating system refused a file, and not a connection."""
    from huggingface_hub.errors import HTTPError

    is_network = isinstance(error, (HTTPError, ConnectionError, TimeoutError, socket.gaierror))
    return isinstance(error, OSError) and error.errno is not None and not is_network


def _explanation(error: Exception, repo: Repo, here: str) -> str | None:
    """``here``: what was found in place of a folder of that name, if that may be what was meant."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo.id}"
    if isinstance(error, errors.GatedRepoError):
        return f"access to it is restricted. Accept its terms at {page}{_login(' with the account of your token')}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "found no such folder here, and no such repository on the Hub, or a private one that you may not see. "
            f"Check the name{_login(', and that your token may read it')}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the Hub has no revision {printable(repo.revision)} of it. Those it has are at {page}/tree/main."
    if isinstance(error, errors.EntryNotFoundError):
        return "the repository has no such file any more. Run again."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and the Hub cache does not hold it. Unset it, then run again."
    if isinstance(error, errors.HFValidationError):
        return "is no name that a repository can have, expected org/name. Check it."
    if isinstance(error, errors.HfHubHTTPError):
        return _status_explanation(error.response.status_code, page)
    if text := setting_trouble(error):
        return text
    if may_pass(error):
        return (
            f"{here}the connection to {constants.ENDPOINT} failed ({_what(error)}), again and again. Check the "
            "network, then run again; HF_HUB_OFFLINE=1 does without, if the Hub cache holds all of it."
        )
    return None


def _status_explanation(status: int, page: str) -> str:
    if status == 401:
        return "the Hub refuses your token. Log in anew (hf auth login), or correct or unset HF_TOKEN."
    if status == 403:
        return f"the Hub forbids it (403){_login(': your token lacks the right to read it')}"
    if status == 404:
        return f"is not on the Hub any more ({page}), or not for you. Run again, to begin with what is there now."
    if status == 429:
        return "the Hub answers no more requests for now (429, too many). Wait some minutes, then run again."
    return f"the Hub answers {status} ({page}). Wait a while, then run again."


def _login(with_token: str) -> str:
    """The end of a sentence: what to do about the login."""
    from huggingface_hub import get_token

    return f"{with_token}." if get_token() else ", and log in (hf auth login, or HF_TOKEN): you are not."


def _cause(error: Exception) -> Exception:
    """What the client found first: it says of any failure that the file is not in its cache."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a while later."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    error = _cause(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TRANSIENT
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, json.JSONDecodeError):
        return True  # an answer that was cut off
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
        return True
    if type(error) is OSError and error.errno is None:
        return True  # fewer bytes came than were announced
    return type(error).__module__ == "hf_xet" or (type(error) is RuntimeError and "error: " in str(error))


def _asked_wait(error: Exception) -> float:
    """Seconds that the Hub asks to wait; 0 if it does not say."""
    response = getattr(_cause(error), "response", None)
    text = response.headers.get("Retry-After", "") if response is not None else ""
    return float(text) if text.isdigit() else 0.0


def _what(error: Exception) -> str:
    error = _cause(error)
    response = getattr(error, "response", None)
    return f"answer {response.status_code}" if response is not None else type(error).__name__
