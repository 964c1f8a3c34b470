"""Loading images from URLs on behalf of a client, without reaching anything that the operator has not allowed.

Only sites of the list are loaded, redirects are not followed, no credentials are sent. A host name must resolve to
public addresses only, and the connection goes to the address that was checked, so that a name server cannot exchange it
in between. An address that the list itself contains may be private.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager, suppress
from urllib.parse import quote, urlsplit

from farout.core.errors import UnreadableImageError

__all__ = ["check_url", "load_url"]

_CHUNK = 2**16
_DEFAULT_PORTS = {"http": 80, "https": 443}


def check_url(url: str, allowed: Collection[str]) -> None:
    """Raise UnreadableImageError unless the URL belongs to one of the sites `scheme://host[:port]`."""
    if not allowed:
        raise UnreadableImageError("this service loads no URLs (--allow-urls)")
    if _site_of(url) not in {_site_of(site) for site in allowed}:
        raise UnreadableImageError("the site of the URL is not among those that this service loads from (--allow-urls)")


def load_url(
    url: str, allowed: Collection[str], limit: int, timeout: float, reserve: Callable[[int], object] = lambda size: None
) -> bytes:
    """Load at most `limit` bytes from an allowed URL within `timeout` seconds.

    `reserve` is called with the number of bytes of each piece that is kept; an error that it raises ends the loading.

    Raises UnreadableImageError, whose message does not reveal addresses or contents of the network of the service.
    """
    check_url(url, allowed)
    deadline = time.monotonic() + timeout
    scheme, host, port = _site_of(url)
    parts = urlsplit(url)
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._") + (f"?{parts.query}" if parts.query else "")
    too_late = f"the URL could not be loaded within {timeout:g} seconds"
    try:
        plain = _connect(host, port, timeout)
        with _closed_at(deadline, plain), closing(_speak_http(plain, scheme, host, port)) as connection:
            connection.request("GET", target, headers={"Accept": "image/*, application/octet-stream, */*;q=0.1"})
            response = connection.getresponse()
            if response.status != 200:
                hint = "; redirects are not followed" if 300 <= response.status < 400 else ""
                raise UnreadableImageError(f"the site answered with status {response.status}{hint}")
            data = bytearray()
            while chunk := response.read1(_CHUNK):
                if len(data) + len(chunk) > limit:
                    raise UnreadableImageError(f"the URL has more than {limit} bytes (--max-request-bytes)")
                reserve(len(chunk))
                data += chunk
            if time.monotonic() >= deadline:
                raise UnreadableImageError(too_late)
            return bytes(data)
    except UnreadableImageError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, TimeoutError) or time.monotonic() >= deadline:
            raise UnreadableImageError(too_late) from error
        raise UnreadableImageError(f"the URL could not be loaded ({type(error).__name__})") from error


def _site_of(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port; raises UnreadableImageError for what is no URL of a site."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or parts.scheme not in _DEFAULT_PORTS or parts.username is not None:
        raise UnreadableImageError("this is not a URL with http or https, a host, and no user name")
    if any(sign <= " " or sign == "\x7f" for sign in url):
        raise UnreadableImageError("the URL contains spaces or control characters")
    return parts.scheme, host.rstrip("."), port or _DEFAULT_PORTS[parts.scheme]


def _connect(host: str, port: int, timeout: float) -> socket.socket:
    """Connect to the first address of the host, after all of them were checked."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UnreadableImageError("the host of the URL is not known") from error
    addresses = [str(info[4][0]) for info in infos]
    is_listed_address = _is_address(host)
    if not is_listed_address and not all(_is_public(address) for address in addresses):
        raise UnreadableImageError("the host of the URL has an address that is not public")
    return socket.create_connection((addresses[0], port), timeout=timeout)


def _speak_http(plain: socket.socket, scheme: str, host: str, port: int) -> http.client.HTTPConnection:
    """HTTP over a connection that exists, encrypted if the scheme is https."""
    connection = http.client.HTTPConnection(host, port)
    connection.default_port = _DEFAULT_PORTS[scheme]  # which the header Host leaves out
    connection.sock = plain
    if scheme == "https":
        connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
    return connection


@contextmanager
def _closed_at(deadline: float, connection: socket.socket) -> Iterator[None]:
    """Inside this context, the connection ends at a deadline: the time-out of a socket begins anew with every byte."""
    duplicate = connection.dup()  # stays valid when the connection is encrypted

    def end() -> None:
        with suppress(OSError):  # it has ended
            duplicate.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        duplicate.close()
        connection.close()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_public(address: str) -> bool:
    """Whether an address is one of the public internet; addresses of IPv4 within IPv6 count as the former."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        embedded = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo[1] if parsed.teredo else None)
        if embedded is not None:
            return embedded.is_global and not embedded.is_multicast
        if parsed in ipaddress.ip_network("64:ff9b::/96"):
            return _is_public(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
    return parsed.is_global and not parsed.is_multicast
