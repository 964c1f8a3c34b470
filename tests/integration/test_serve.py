"""The service over HTTP, with a real client: scores, limits, errors, clients that go away, and its end."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import farout
from farout.data.read_settings import DEFAULT_READING, ReadSettings
from farout.scoring.scorer import Scorer
from farout.scoring.service.settings import ServiceSettings
from small import pictures

httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi_offline")

from farout.scoring.service.app import create_app  # noqa: E402

WAIT = 300
TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a detector `d`, normal images and a broken one."""
    root = tmp_path_factory.mktemp("serve")
    pictures(root / "images", 40)
    farout.PCA(size=32).fit(root / "images", statistics=20, alpha=0.1).save(root / "d")
    (root / "broken.png").write_bytes((root / "images" / "000.png").read_bytes()[:40])
    return root


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Scorer:
    scorer = Scorer(folder / "d")
    assert scorer.detector.is_fitted
    return scorer


class GatedScorer:
    """A scorer that waits at a gate, so that tests decide when images are scored."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.detector = scorer, scorer.detector
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)
        self.keys: list[str] = []
        self.gate.set()

    def __call__(self, table: Any) -> Any:
        self.keys += table["key"]
        self.entered.release()
        assert self.gate.wait(WAIT)
        return self.scorer(table)


class RunningService:
    """A service in a thread of this process."""

    def __init__(self, app: Any, stop_timeout: int) -> None:
        self.state = app.state.service
        config = uvicorn.Config(app, port=0, log_config=None, lifespan="on", timeout_graceful_shutdown=stop_timeout)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        wait_until(lambda: self.server.started or not self.thread.is_alive())
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=WAIT, trust_env=False)

    def stop(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(WAIT)
        assert not self.thread.is_alive()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def running(
    scorer: Any,
    *,
    token: str | None = None,
    reading: ReadSettings = DEFAULT_READING,
    stop_timeout: int = WAIT,
    **settings: Any,
) -> Iterator[RunningService]:
    app = create_app(scorer, ServiceSettings(**settings), reading=reading, token=token)
    service = RunningService(app, stop_timeout)
    try:
        yield service
    finally:
        if isinstance(scorer, GatedScorer):
            scorer.gate.set()
        service.stop()


@pytest.fixture(scope="module")
def service(loaded: Scorer) -> Iterator[RunningService]:
    with running(loaded, max_images=8, max_request_bytes=20_000) as service:
        yield service


@pytest.fixture
def gated(loaded: Scorer) -> GatedScorer:
    return GatedScorer(loaded)


def form(*paths: Path) -> list[tuple[str, tuple[str, bytes]]]:
    return [("images", (path.name, path.read_bytes())) for path in paths]


def rows_of(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    return response.json()["images"]


def error_of(response: Any, status: int) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert "\n" not in body["error"]
    return str(body["error"])


def metric(service: RunningService, line: str) -> float:
    text = service.client.get("/metrics").text
    match = re.search(rf"^{re.escape(line)} (\S+)$", text, re.MULTILINE)
    return 0.0 if match is None else float(match[1])


# -- scores ---------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_detector_in_every_form(service: RunningService, folder: Path, loaded: Scorer) -> None:
    paths = sorted((folder / "images").iterdir())[:3]
    expected = loaded.detector.score(paths)
    deviation = loaded.detector.calibration_scores[loaded.detector.score_name].std()
    post = service.client.post
    several = rows_of(post("/score", files=form(*paths)))
    data = paths[0].read_bytes()
    encoded = [{"key": "a", "data": base64.b64encode(path.read_bytes()).decode()} for path in paths]
    as_json = rows_of(post("/score", json={"images": encoded}))
    raw = rows_of(post("/score", params={"key": "b"}, content=data, headers={"Content-Type": "image/png"}))
    plain = rows_of(post("/score", content=data))
    assert [row["key"] for row in several] == [path.name for path in paths]
    assert [row["key"] for row in (*as_json, *raw, *plain)] == ["a", "a", "a", "b", "image"]
    for rows, count in ((several, 3), (as_json, 3), (raw, 1), (plain, 1)):
        assert [row["score"] for row in rows] == pytest.approx(expected.score[:count], abs=1e-4 * deviation)
        assert [row["p_value"] for row in rows] == pytest.approx(expected.p_value[:count])
        assert [row["is_ood"] for row in rows] == expected.is_ood[:count].tolist()
        assert all(row["status"] == "ok" and set(row["indicators"]) == set(expected.indicators) for row in rows)


def test_a_broken_image_is_unreadable_and_the_others_have_scores(service: RunningService, folder: Path) -> None:
    image = folder / "images" / "001.png"
    rows = rows_of(service.client.post("/score", files=form(image, folder / "broken.png", image)))
    assert [row["status"] for row in rows] == ["ok", "unreadable", "ok"]
    assert rows[1]["reason"]
    assert (rows[1]["score"], rows[1]["p_value"], rows[1]["is_ood"]) == (None, None, None), "never normal"
    text = rows_of(service.client.post("/score", content=b"no image"))
    assert "not an image" in text[0]["reason"]
    both = [{"data": "no base64!"}, {"url": "http://127.0.0.1/"}]
    reasons = [row["reason"] for row in rows_of(service.client.post("/score", json={"images": both}))]
    assert reasons == ["the data are not base64", "this service loads no URLs (--allow-urls)"]


def test_names_of_files_cannot_break_anything(service: RunningService, folder: Path) -> None:
    data = (folder / "images" / "001.png").read_bytes()
    names = ["../../etc/passwd", "=cmd()", "ünï cödé.png", "a\u202eb.png"]
    rows = rows_of(service.client.post("/score", files=[("x", (name, data)) for name in names]))
    assert [row["key"] for row in rows][:3] == ["../../etc/passwd", "%3Dcmd()", "ünï cödé.png"]
    assert rows[3]["key"] == "a%E2%80%AEb.png"


def test_concurrent_requests_are_scored_together(gated: GatedScorer, folder: Path) -> None:
    paths = sorted((folder / "images").iterdir())[:16]
    expected = gated.detector.score(paths).score
    with running(gated) as service, ThreadPoolExecutor(16) as pool:
        gated.gate.clear()
        answers = [pool.submit(service.client.post, "/score", files=form(path)) for path in paths]
        wait_until(lambda: service.state.admission.images == 16)
        gated.gate.set()
        scores = [rows_of(answer.result(WAIT))[0]["score"] for answer in answers]
        assert scores == pytest.approx(expected, rel=1e-3)
        assert metric(service, "farout_batch_images_count") < 16
        assert metric(service, "farout_batch_images_sum") == 16
        assert metric(service, "farout_queue_images") == 0


# -- limits ---------------------------------------------------------------------------------------------------------


def test_oversized_bodies_are_refused_while_they_arrive(service: RunningService, folder: Path) -> None:
    error = error_of(service.client.post("/score", content=b"x" * 20_001), 413)
    assert error == "the request has more than 20000 bytes (--max-request-bytes)"
    sent = []

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            sent.append(1)
            yield b"x" * 1000

    error_of(service.client.post("/score", content=endless()), 413)  # without Content-Length
    large = [("images", ("a", b"x" * 15_000))] * 2
    error_of(service.client.post("/score", files=large), 413)
    many = form(*[folder / "images" / "001.png"] * 9)
    assert error_of(service.client.post("/score", files=many), 413).endswith("more than 8 images (--max-images)")
    error_of(service.client.post("/score", json={"images": [{"data": ""}] * 9}), 413)
    assert len(rows_of(service.client.post("/score", files=many[:8]))) == 8
    assert service.state.admission.bytes == service.state.admission.images == 0


def test_an_image_beyond_the_limits_is_unreadable(loaded: Scorer, folder: Path) -> None:
    paths = form(folder / "images" / "001.png")
    limited = Scorer(folder / "d", reading=ReadSettings(max_pixels=63))
    with running(limited, reading=ReadSettings(max_pixels=63)) as service:
        assert "--max-pixels" in rows_of(service.client.post("/score", files=paths))[0]["reason"]
    with running(loaded, reading=ReadSettings(max_bytes=50)) as service:
        assert "--max-bytes" in rows_of(service.client.post("/score", files=paths))[0]["reason"]


def test_requests_that_are_no_images_are_explained(service: RunningService) -> None:
    post = service.client.post
    assert "no images" in error_of(post("/score"), 400)
    assert "no images" in error_of(post("/score", content=b"", headers={"Content-Type": "image/png"}), 400)
    assert "expected files only" in error_of(post("/score", files={"a": (None, b"text")}), 400)
    assert "boundary" in error_of(post("/score", content=b"x", headers={"Content-Type": "multipart/form-data"}), 400)
    cut = {"Content-Type": "multipart/form-data; boundary=a"}
    error_of(post("/score", content=b"no form", headers=cut), 400)
    assert "content type is text/html" in error_of(
        post("/score", content=b"x", headers={"Content-Type": "text/html"}), 415
    )
    error_of(post("/score", content=b"{", headers={"Content-Type": "application/json"}), 422)
    assert "images.0.size" in error_of(post("/score", json={"images": [{"data": "", "size": 1}]}), 422)
    assert "neither data nor url" in error_of(post("/score", json={"images": [{"key": "a"}]}), 422)
    many = b'{"images":[' + b",".join([b"0"] * 9000) + b"]}"  # each would be an object and an error of its own
    assert "more than 8 images" in error_of(
        post("/score", content=many, headers={"Content-Type": "application/json"}), 413
    )
    assert "POST /score" in error_of(service.client.get("/nothing"), 404)
    assert "POST /score" in error_of(service.client.get("/score"), 405)


def test_a_full_queue_refuses_and_keeps_what_it_accepted(gated: GatedScorer, folder: Path) -> None:
    images = form(*sorted((folder / "images").iterdir())[:2])
    with running(gated, max_images=2, queue_images=4) as service, ThreadPoolExecutor(2) as pool:
        gated.gate.clear()
        accepted = [pool.submit(service.client.post, "/score", files=images) for _ in range(2)]
        wait_until(lambda: service.state.admission.images == 4)
        refused = service.client.post("/score", files=images)
        assert "queue is full" in error_of(refused, 429)
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        assert metric(service, "farout_queue_images") == 4
        assert service.client.get("/health").status_code == 200
        gated.gate.set()
        assert all(len(rows_of(answer.result(WAIT))) == 2 for answer in accepted)
        assert len(rows_of(service.client.post("/score", files=images))) == 2, "it accepts again"
        assert metric(service, 'farout_requests_total{path="/score",status="429"}') == 1


def test_time_outs(gated: GatedScorer, folder: Path) -> None:
    with running(gated, timeout=0.3) as service:
        gated.gate.clear()
        error = error_of(service.client.post("/score", files=form(folder / "images" / "001.png")), 504)
        assert "not scored within 0.3 seconds" in error
        gated.gate.set()
        with socket.create_connection(("127.0.0.1", service.port), timeout=WAIT) as slow:
            slow.sendall(b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nab")
            answer = b""
            while chunk := slow.recv(4096):  # until the service closes the connection
                answer += chunk
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"did not arrive within 0.3 seconds" in answer


def test_images_of_a_client_that_goes_away_are_not_scored(gated: GatedScorer, folder: Path) -> None:
    data = (folder / "images" / "001.png").read_bytes()
    head = f"POST /score?key=gone HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    with running(gated) as service, ThreadPoolExecutor(1) as pool:
        gated.gate.clear()
        first = pool.submit(service.client.post, "/score?key=first", content=data)
        assert gated.entered.acquire(timeout=WAIT)
        with socket.create_connection(("127.0.0.1", service.port), timeout=WAIT) as gone:
            gone.sendall(head + data)
            wait_until(lambda: service.state.admission.images == 2)
        wait_until(lambda: service.state.admission.images == 1)
        with socket.create_connection(("127.0.0.1", service.port), timeout=WAIT) as gone:  # in the middle of its body
            gone.sendall(head + data[:-1])
            wait_until(lambda: service.state.admission.images == 2)
        wait_until(lambda: service.state.admission.images == 1)
        gated.gate.set()
        assert rows_of(first.result(WAIT))[0]["key"] == "first"
        assert rows_of(service.client.post("/score?key=last", content=data))[0]["key"] == "last"
    assert gated.keys == ["first", "last"]


def test_an_error_in_the_networks_is_an_answer_and_the_service_goes_on(gated: GatedScorer, folder: Path) -> None:
    class Failing(GatedScorer):
        def __call__(self, table: Any) -> Any:
            if "bad" in table["key"]:
                raise RuntimeError("secret path /etc")
            return super().__call__(table)

    data = (folder / "images" / "001.png").read_bytes()
    with running(Failing(gated.scorer)) as service:
        error = error_of(service.client.post("/score?key=bad", content=data), 500)
        assert "secret" not in error, "details are for the log"
        assert rows_of(service.client.post("/score?key=good", content=data))[0]["status"] == "ok"
        assert service.client.get("/health").json() == {"status": "ok"}


# -- access and description -----------------------------------------------------------------------------------------


def test_every_path_but_health_requires_the_token(loaded: Scorer, folder: Path) -> None:
    data = (folder / "images" / "001.png").read_bytes()
    with running(loaded, token=TOKEN) as service:
        client = service.client
        for wrong in ({}, {"Authorization": f"Bearer {TOKEN[:-1]}"}, {"Authorization": f"Basic {TOKEN}"}):
            for answer in (
                client.post("/score", content=data, headers=wrong),
                client.get("/info", headers=wrong),
                client.get("/metrics", headers=wrong),
            ):
                assert "Bearer TOKEN" in error_of(answer, 401)
                assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert client.get("/health").status_code == 200
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert rows_of(client.post("/score", content=data, headers=right))[0]["status"] == "ok"
        assert client.get("/info", headers=right).status_code == 200
        assert client.get("/metrics", headers=right).status_code == 200
        paths = client.get("/openapi.json").json()["paths"]
        assert "security" in paths["/score"]["post"]
        assert "security" not in paths["/health"]["get"]


def test_info_and_the_description_of_the_interface(service: RunningService, loaded: Scorer) -> None:
    info = service.client.get("/info").json()
    assert (info["method"], info["fingerprint"], info["alpha"]) == ("pca", loaded.detector.fingerprint, 0.1)
    assert (info["image_size"], info["limits"]["max_images"]) == ([32, 32], 8)
    api = service.client.get("/openapi.json").json()
    assert set(api["paths"]) == {"/score", "/health", "/info", "/metrics"}
    content = api["paths"]["/score"]["post"]["requestBody"]["content"]
    assert {"multipart/form-data", "application/json", "application/octet-stream"} <= set(content)
    references = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(api)))
    assert references <= set(api["components"]["schemas"])
    page = service.client.get("/docs").text
    assert "http" not in "".join(re.findall(r'(?:src|href)="([^"]*)"', page)), "loads nothing from outside"
    for path in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert service.client.get(path).status_code == 200


def test_metrics_count_images_by_status_and_flags(loaded: Scorer, folder: Path) -> None:
    far = pictures(folder / "far", 1, low=0, spread=255, seed=5)
    with running(loaded) as service:
        rows = rows_of(
            service.client.post(
                "/score", files=form(folder / "images" / "001.png", folder / "broken.png", far / "000.png")
            )
        )
        assert metric(service, 'farout_images_total{status="ok"}') == 2
        assert metric(service, 'farout_images_total{status="unreadable"}') == 1
        assert metric(service, "farout_flagged_images_total") == sum(row["is_ood"] is True for row in rows)
        assert metric(service, 'farout_request_seconds_count{path="/score"}') == 1


def test_the_health_check_of_the_container_agrees(service: RunningService) -> None:
    text = (Path(__file__).parents[2] / "Dockerfile").read_text(encoding="utf-8")
    command = re.search(r"HEALTHCHECK.*\\\n\s*CMD (\[.*\])", text)
    assert command is not None
    _, flag, code = json.loads(command[1])
    check = [sys.executable, flag, code.replace("8000", str(service.port))]
    assert subprocess.run(check, check=False).returncode == 0
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        check = [sys.executable, flag, code.replace("8000", str(unused.getsockname()[1]))]
        assert subprocess.run(check, check=False, stderr=subprocess.DEVNULL).returncode == 1


# -- the end --------------------------------------------------------------------------------------------------------


def send_requests(service: RunningService, pool: ThreadPoolExecutor, path: Path, count: int) -> list[Future[Any]]:
    answers = [pool.submit(service.client.post, "/score", files=form(path)) for _ in range(count)]
    wait_until(lambda: service.state.admission.images == count)
    return answers


def test_accepted_requests_are_finished_and_new_ones_refused(gated: GatedScorer, folder: Path) -> None:
    with running(gated) as service, ThreadPoolExecutor(8) as pool:
        gated.gate.clear()
        answers = send_requests(service, pool, folder / "images" / "001.png", 8)
        service.server.should_exit = True

        def is_refused() -> bool:
            try:
                socket.create_connection(("127.0.0.1", service.port), timeout=WAIT).close()
            except ConnectionError:
                return True
            return False

        wait_until(is_refused)
        gated.gate.set()
        assert [rows_of(answer.result(WAIT))[0]["status"] for answer in answers] == ["ok"] * 8
        service.thread.join(WAIT)
        assert not service.thread.is_alive()
        assert service.state.cut_off == 0


def test_requests_that_are_not_finished_in_time_are_answered_and_counted(gated: GatedScorer, folder: Path) -> None:
    with running(gated, stop_timeout=1) as service, ThreadPoolExecutor(2) as pool:
        gated.gate.clear()
        answers = send_requests(service, pool, folder / "images" / "001.png", 2)
        service.server.should_exit = True
        for answer in answers:
            assert "stopped before" in error_of(answer.result(WAIT), 503)
        wait_until(lambda: service.state.cut_off == 2)


def start_command(*words: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "farout", "serve", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )


def read_until(process: subprocess.Popen[str], pattern: str, times: int = 1) -> str:
    """Read lines of the error stream until one has matched so often; returns what the first group matched."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if match := re.search(pattern, line):
            times -= 1
            if not times:
                return match[1]
    pytest.fail(f"no line {pattern!r} in {''.join(lines)}")


@pytest.mark.skipif(os.name == "nt", reason="Windows does not send these signals to processes")
@pytest.mark.slow
def test_a_signal_ends_the_command_after_the_accepted_requests(folder: Path) -> None:
    with start_command(folder / "d", "--port", 0, FAROUT_TOKEN=TOKEN) as process:
        url = read_until(process, r"serving .* at (http://127\.0\.0\.1:\d+)")
        headers = {"Authorization": f"Bearer {TOKEN}"}
        files = form(*sorted((folder / "images").iterdir())[:20])
        with httpx.Client(base_url=url, headers=headers, timeout=WAIT, trust_env=False) as client:
            assert client.get("/health").json() == {"status": "ok"}
            assert client.get("/info", headers={"Authorization": ""}).status_code == 401
            with ThreadPoolExecutor(4) as pool:
                answers = [pool.submit(client.post, "/score", files=files) for _ in range(4)]
                wait_until(lambda: "farout_queue_images 0.0" not in client.get("/metrics").text or answers[0].done())
                process.send_signal(signal.SIGTERM)
                finished = [answer for answer in answers if answer.exception(WAIT) is None]
            assert finished
            assert all(len(rows_of(answer.result())) == 20 for answer in finished)
        assert process.wait(WAIT) == 0
        assert process.stdout is not None
        assert "all accepted requests were finished" in process.stdout.read()


@pytest.mark.skipif(os.name == "nt", reason="Windows does not send these signals to processes")
@pytest.mark.slow
def test_several_processes_share_the_port_and_the_metrics(folder: Path) -> None:
    with start_command(folder / "d", "--port", 0, "--processes", 2) as process:
        url = read_until(process, r"serving .* at (http://127\.0\.0\.1:\d+)", times=2)
        files = form(folder / "images" / "001.png")

        def count_images() -> str:
            match = re.search(
                r'^farout_images_total\{status="ok"\} (\S+)', httpx.get(f"{url}/metrics").text, re.MULTILINE
            )
            return "" if match is None else match[1]

        for _ in range(8):  # new connections, which the processes accept in turn
            rows_of(httpx.post(f"{url}/score", files=files, timeout=WAIT))
        assert {count_images() for _ in range(4)} == {"8.0"}, "whichever process answers"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if children.exists():
            workers = [
                int(child)
                for child in children.read_text().split()
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
            ]
            assert len(workers) == 2
            os.kill(workers[0], signal.SIGKILL)
            read_until(process, r"serving .* at (http://127\.0\.0\.1:\d+)")  # another one has been started
            rows_of(httpx.post(f"{url}/score", files=files, timeout=WAIT))
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT) == 0


def test_what_cannot_be_served_is_one_clear_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from farout.cli import main

    monkeypatch.delenv("FAROUT_TOKEN", raising=False)
    assert main(["serve", str(folder / "images"), "--port", "0"]) == 1
    assert "is not a detector folder" in capsys.readouterr().err
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", str(folder / "d"), "--port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err
    assert main(["serve", str(folder / "d"), "--frames", "all"]) == 1
    assert "frames must be first" in capsys.readouterr().err
    monkeypatch.setenv("FAROUT_TOKEN", "short")
    assert main(["serve", str(folder / "d"), "--port", "0"]) == 1
    assert "at least 16" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(folder / "d")]) == 1
    assert 'pip install "farout[serve]"' in capsys.readouterr().err
