"""Settings of the HTTP service."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from farout.core.errors import FaroutError, check_options
from farout.core.files import read_file
from farout.core.names import find_path

__all__ = ["METRICS_VARIABLE", "TOKEN_VARIABLE", "ServiceSettings", "read_token"]

TOKEN_VARIABLE = "FAROUT_TOKEN"
"""Environment variable of the bearer token; a flag would show it in the list of processes."""
METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable of prometheus_client: the folder in which several processes share their metrics."""
_MIN_TOKEN = 16


@dataclass(frozen=True)
class ServiceSettings:
    """Limits and times of the service. Raises FaroutError for values out of range.

    Args:
        max_images: images in one request.
        max_request_bytes: bytes of one request.
        queue_images: images that are accepted and not yet answered; a request that exceeds this number gets status 429.
        queue_bytes: bytes of requests that are accepted and not yet answered; likewise.
        batch_window_ms: milliseconds that an image waits for others, to be scored with them in one batch.
        timeout: seconds for receiving a request, and again for scoring it.
        stop_timeout: seconds for finishing accepted requests when the service is stopped.
        token_file: file with a token that every request must contain, except for /health and the description of the
            interface; default: the environment variable FAROUT_TOKEN, or no token.
        allow_urls: sites that images may be loaded from, such as https://images.example.org; default: none.
    """

    max_images: int = 64
    max_request_bytes: int = 64 * 2**20
    queue_images: int = 256
    queue_bytes: int = 512 * 2**20
    batch_window_ms: float = 5.0
    timeout: float = 60.0
    stop_timeout: float = 30.0
    token_file: str | None = None
    allow_urls: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "allow_urls", tuple(_parse_site(text) for text in self.allow_urls))
        check_options(
            self,
            "service's",
            [
                ("max_images", self.max_images >= 1, "at least 1"),
                ("max_request_bytes", self.max_request_bytes >= 1, "at least 1"),
                ("queue_images", self.queue_images >= self.max_images, f"at least max_images, {self.max_images}"),
                (
                    "queue_bytes",
                    self.queue_bytes >= self.max_request_bytes,
                    f"at least max_request_bytes, {self.max_request_bytes}",
                ),
                ("batch_window_ms", 0 <= self.batch_window_ms <= 10_000, "0 to 10000 milliseconds"),
                ("timeout", 0 < self.timeout <= 86_400, "seconds, more than 0 and at most one day"),
                ("stop_timeout", 0 <= self.stop_timeout <= 86_400, "seconds, at most one day"),
            ],
        )


def _parse_site(text: str) -> str:
    """Return `scheme://host[:port]` in lower case; raises FaroutError for anything else."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    is_site = host is not None and parts.scheme in ("http", "https") and parts.path in ("", "/") and not parts.username
    if not is_site or parts.query or parts.fragment:
        raise FaroutError(f"allow_urls has {text!r}; expected a site, such as https://images.example.org")
    return f"{parts.scheme}://{f'[{host}]' if ':' in str(host) else host}{'' if port is None else f':{port}'}"


def read_token(settings: ServiceSettings) -> str | None:
    """Return the token of `token_file`, else that of the environment variable `FAROUT_TOKEN`, else None.

    Raises:
        FaroutError: the file cannot be read, or the token is too short or contains spaces.
    """
    if settings.token_file is not None:
        path = find_path(settings.token_file)
        try:
            token = read_file(path, 2**16).decode("ascii").strip()
        except OSError as error:
            raise FaroutError(f"the token file {path} cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise FaroutError(f"the token file {path} contains other characters than ASCII") from error
        where = f"the token file {path}"
    elif TOKEN_VARIABLE in os.environ:
        token, where = os.environ[TOKEN_VARIABLE].strip(), TOKEN_VARIABLE
    else:
        return None
    if len(token) < _MIN_TOKEN or not all("!" <= sign <= "~" for sign in token):
        raise FaroutError(
            f"the token in {where} has {len(token)} characters; expected at least {_MIN_TOKEN} ASCII characters "
            "without spaces, such as the output of `openssl rand -hex 32`"
        )
    return token
