"""Images by URL: only from sites of the list, without redirects, and never from the network of the service."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from starlette.requests import Request

from farout.core.errors import FaroutError, UnreadableImageError
from farout.data.read_settings import DEFAULT_READING
from farout.scoring.service import requests, urls
from farout.scoring.service.requests import Admission, RequestError, Reservation, read_images
from farout.scoring.service.settings import TOKEN_VARIABLE, ServiceSettings, read_token
from farout.scoring.service.urls import load_url

NOT_PUBLIC = ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"]
NOT_PUBLIC += ["::1", "fd00::1", "fe80::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "/image.png")
            self.end_headers()
        elif self.path == "/missing":
            self.send_error(404)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * 1000)

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def reason(url: str, allowed: list[str], limit: int = 10_000) -> str:
    with pytest.raises(UnreadableImageError) as raised:
        load_url(url, allowed, limit, timeout=30)
    return str(raised.value)


def test_an_allowed_url_is_loaded_within_its_limit(site: str) -> None:
    assert load_url(f"{site}/image.png?a=b", [site], 1000, timeout=30) == b"x" * 1000
    assert "more than 999 bytes" in reason(f"{site}/image.png", [site], limit=999)
    assert "status 404" in reason(f"{site}/missing", [site])


def test_redirects_are_not_followed(site: str) -> None:
    assert "redirects are not followed" in reason(f"{site}/redirect", [site])


def test_only_listed_sites_are_loaded(site: str) -> None:
    assert "--allow-urls" in reason(f"{site}/image.png", [])
    other_port = site.rpartition(":")[0] + ":1"
    for url in (f"{other_port}/image.png", f"{site.replace('http', 'https')}/x", "http://169.254.169.254/latest/"):
        assert "not among those" in reason(url, [site])
    for url in ("file:///etc/passwd", "ftp://a/b", f"{site.replace('//', '//user:word@')}/x", "http://[::1", "x"):
        assert "not a URL with http" in reason(url, [site])
    assert "control characters" in reason(f"{site}/a b", [site])


def test_a_site_that_sends_one_byte_after_another_is_left_in_time() -> None:
    """The time-out of a socket begins anew with every byte."""
    listener = socket.create_server(("127.0.0.1", 0))

    def send_headers_without_end() -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            for _ in range(50_000):  # fewer than the bytes of a header that http.client accepts
                connection.sendall(b"x")
                time.sleep(0.02)

    server = threading.Thread(target=send_headers_without_end, daemon=True)
    server.start()
    site = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with listener, pytest.raises(UnreadableImageError, match=r"could not be loaded within 0\.5 seconds"):
        load_url(f"{site}/image.png", [site], 1000, timeout=0.5)


def test_bytes_of_urls_count_while_they_are_loaded(site: str) -> None:
    reserved: list[int] = []
    load_url(f"{site}/image.png", [site], 1000, timeout=30, reserve=reserved.append)
    assert sum(reserved) == 1000

    def refuse(size: int) -> None:
        raise RequestError(429, "the queue is full")

    with pytest.raises(RequestError, match="queue is full"):
        load_url(f"{site}/image.png", [site], 1000, timeout=30, reserve=refuse)


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_a_name_that_leads_into_the_own_network_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(host: str, port: int, **options: object) -> list:
        return [(2, 1, 6, "", ("93.184.216.34", port)), (2, 1, 6, "", (address, port))]

    monkeypatch.setattr(urls.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(urls.socket, "create_connection", lambda *_, **__: pytest.fail("connected"))
    assert "not public" in reason("http://images.example.org/a.png", ["http://images.example.org"])


@pytest.mark.parametrize("site", ["images.example.org", "ftp://a", "https://a/path", "https://u@a", "https://a?b", "*"])
def test_a_list_of_other_things_than_sites_is_refused(site: str) -> None:
    with pytest.raises(FaroutError, match="expected a site"):
        ServiceSettings(allow_urls=(site,))


def test_the_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_token(ServiceSettings()) is None
    monkeypatch.setenv(TOKEN_VARIABLE, "environment-0123456789")
    assert read_token(ServiceSettings()) == "environment-0123456789"
    (tmp_path / "token").write_text("of-a-file-0123456789\n")
    assert read_token(ServiceSettings(token_file=str(tmp_path / "token"))) == "of-a-file-0123456789"
    monkeypatch.setenv(TOKEN_VARIABLE, "short")
    with pytest.raises(FaroutError, match="at least 16") as raised:
        read_token(ServiceSettings())
    assert "'short'" not in str(raised.value), "the token is not shown"
    with pytest.raises(FaroutError, match="cannot be read"):
        read_token(ServiceSettings(token_file=str(tmp_path / "none")))


def test_limits_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(FaroutError, match=r"queue_images is 2; expected at least max_images, 4"):
        ServiceSettings(max_images=4, queue_images=2)
    with pytest.raises(FaroutError, match="timeout is 0"):
        ServiceSettings(timeout=0)


def test_a_request_that_fails_while_urls_are_loaded_reserves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    may_answer = threading.Event()

    def load_slowly(*given: object) -> bytes:
        may_answer.wait(60)
        reserve = given[-1]
        assert callable(reserve)
        reserve(1000)
        return b"x" * 1000

    monkeypatch.setattr(requests, "load_url", load_slowly)
    admission = Admission(max_images=10, max_bytes=10_000)
    body = json.dumps({"images": [{"url": "http://a.example/1"}, {"key": "no data"}]}).encode()

    async def receive() -> dict:
        return {"type": "http.request", "body": body, "more_body": False}

    async def request_and_wait() -> None:
        request = Request({"type": "http", "headers": [(b"content-type", b"application/json")]}, receive)
        reservation = Reservation(admission)
        with pytest.raises(RequestError, match="neither data nor url"):
            await read_images(request, ServiceSettings(allow_urls=("http://a.example",)), DEFAULT_READING, reservation)
        reservation.release()
        may_answer.set()
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)

    asyncio.run(request_and_wait())
    assert admission.bytes == 0
