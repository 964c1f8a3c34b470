"""Access to the Hugging Face hub that fails at once where the hub cannot be reached.

The libraries of the hub retry each of several requests for about 20 seconds. Here one short request comes first; if it
fails, they are called in their offline mode, in which files that were downloaded before are found and all others are
missing at once.
"""

from __future__ import annotations

import os
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["explain_failure", "find_hub_obstacle", "hub_access"]

_TIMEOUT_S = 5.0
"""For one request, the look-up of the name included."""


@contextmanager
def hub_access() -> Iterator[str]:
    """Inside this context, the libraries of the hub do not retry where it cannot be reached.

    Yields why the hub cannot be reached, for errors; an empty text if it can.
    """
    obstacle = find_hub_obstacle()
    if not obstacle:
        yield ""
        return
    from huggingface_hub import constants

    changed: list[Any] = [constants]
    if "datasets" in sys.modules:
        changed.append(sys.modules["datasets"].config)
    before = [(each, each.HF_HUB_OFFLINE) for each in changed]
    try:
        for each in changed:
            each.HF_HUB_OFFLINE = True
        _reset_sessions()
        yield obstacle
    finally:
        for each, value in before:
            each.HF_HUB_OFFLINE = value
        _reset_sessions()


def explain_failure(error: BaseException, obstacle: str) -> str:
    """Why something could not be downloaded: the obstacle, unless the error is about something else.

    Args:
        error: what a library raised inside `hub_access`.
        obstacle: what `hub_access` yielded.
    """
    is_of_hub = type(error).__module__.partition(".")[0] in ("huggingface_hub", "datasets")
    if obstacle and (is_of_hub or "OfflineModeIsEnabled" in str(error)):
        return obstacle  # the error would only say that the offline mode is on
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _reset_sessions() -> None:
    """Older versions of huggingface_hub read the mode only when they open a session."""
    from huggingface_hub import utils

    reset = getattr(utils, "reset_sessions", None)
    if reset is not None:
        reset()


def find_hub_obstacle() -> str:
    """Why the hub cannot be reached; empty if it can."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{name} is set"
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    results: list[str] = []

    def request() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_TIMEOUT_S).close()
            results.append("")
        except urllib.error.HTTPError as error:  # an answer; of a proxy, it may be a refusal
            results.append(f"{address} answers {error.code} {error.reason}" if error.code in (403, 407) else "")
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            results.append(f"{address} cannot be reached: {getattr(reason, 'strerror', None) or reason}")

    # the look-up of a name has no timeout of its own
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(_TIMEOUT_S)
    return results[0] if results else f"{address} does not answer within {_TIMEOUT_S:g} s"
