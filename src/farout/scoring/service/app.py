"""The web application of the service: FastAPI routes over one `Scorer`."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any, Literal

from fastapi import Depends, FastAPI, Request, Response, Security
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from farout.core import store
from farout.data.read_settings import DEFAULT_READING, ReadSettings
from farout.detectors.saving import describe_detector
from farout.scoring.scorer import Scorer
from farout.scoring.service.batching import ImageScore, ScoringQueue
from farout.scoring.service.metrics import CONTENT_TYPE_LATEST, ServiceMetrics
from farout.scoring.service.requests import Admission, RequestError, Reservation, describe_score_body, read_images
from farout.scoring.service.settings import ServiceSettings

__all__ = ["Service", "create_app"]

logger = logging.getLogger(__name__)

_BYTES = {"type": "string", "format": "binary"}
_FORM = {"type": "object", "properties": {"images": {"type": "array", "items": _BYTES}}}
_OPENAPI_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": _FORM},
        "application/octet-stream": {"schema": _BYTES},
        "image/*": {"schema": _BYTES},
        "application/json": {"schema": describe_score_body()},
    },
}


class ImageResult(BaseModel):
    """The row of one image."""

    key: str = Field(description="name of the file, or the key that was given, percent-encoded where necessary")
    score: float | None = Field(description="OOD score, higher = more anomalous; null unless the status is ok")
    p_value: float | None = Field(description="conformal p-value; null unless the status is ok")
    is_ood: bool | None = Field(description="whether p_value <= alpha; null unless the status is ok")
    status: Literal["ok", "unreadable", "not a number"]
    reason: str | None = Field(description="why there is no score")
    indicators: dict[str, float | None] = Field(description="all scores of the method by name")


class ScoreResponse(BaseModel):
    """The rows of the images of a request, in their order."""

    detector: str = Field(description="fingerprint of the detector: SHA-256 of everything that decides a score")
    alpha: float = Field(description="false-alarm rate of is_ood")
    images: list[ImageResult]


class HealthResponse(BaseModel):
    """Whether the service answers requests."""

    status: Literal["ok", "failed"]


class LimitsInfo(BaseModel):
    """Limits of requests."""

    max_images: int
    max_request_bytes: int
    max_bytes: int
    max_pixels: int
    queue_images: int
    queue_bytes: int
    timeout: float


class InfoResponse(BaseModel):
    """What the service scores with."""

    method: str
    fingerprint: str
    score: str = Field(description="the indicator that is the score")
    alpha: float
    calibration_images: int
    image_size: tuple[int, int] = Field(description="height and width for the networks; images may have any size")
    channels: int
    device: str
    precision: str
    batch_size: int
    detector: dict[str, Any] = Field(description="configuration of the detector")
    limits: LimitsInfo
    versions: dict[str, str]


class ErrorResponse(BaseModel):
    """An answer other than 200."""

    error: str = Field(description="one line")


class Service:
    """What the routes share: the queue, its limits and the metrics.

    Attributes:
        cut_off: number of requests that were not finished when the service stopped.
    """

    def __init__(self, scorer: Scorer, settings: ServiceSettings, reading: ReadSettings) -> None:
        self.scorer, self.settings, self.reading = scorer, settings, reading
        self.detector = scorer.detector
        self.fingerprint = self.detector.fingerprint
        self.metrics = ServiceMetrics()
        self.admission = Admission(settings.queue_images, settings.queue_bytes)
        self.cut_off = 0
        self.queue: ScoringQueue | None = None

    def start(self) -> None:
        """Start the thread that scores."""
        self.queue = ScoringQueue(
            self.scorer, self.detector.batch_size, self.settings.batch_window_ms / 1000, self.metrics.count_batch
        )
        queue = self.queue
        self.admission.seconds_per_image = lambda: queue.seconds_per_image

    async def score(self, request: Request) -> list[ImageScore]:
        """Read and score the images of a request; raises RequestError."""
        reservation = Reservation(self.admission)
        try:
            reservation.add(images=1)
            images = await read_images(request, self.settings, self.reading, reservation)
            reservation.add(images=len(images) - 1)
            self.metrics.queue_images.set(self.admission.images)
            if self.queue is None:
                raise RequestError(503, "the service has not been started")
            rows = asyncio.wrap_future(self.queue.submit(images))
            departure = asyncio.ensure_future(_wait_for_departure(request))
            try:
                awaited: set[asyncio.Future[Any]] = {rows, departure}
                await asyncio.wait(awaited, timeout=self.settings.timeout, return_when=asyncio.FIRST_COMPLETED)
                if rows.done():
                    error = rows.exception()
                    if error is not None:  # which the queue has logged
                        message = (
                            f"the images could not be scored ({type(error).__name__}); the log of the service has more"
                        )
                        raise RequestError(500, message)
                    return rows.result()
                if departure.done():
                    raise RequestError(499, "the client has closed the connection")
                raise RequestError(504, f"the images were not scored within {self.settings.timeout:g} seconds")
            finally:
                departure.cancel()
                rows.cancel()  # images that are not started are not scored
        except asyncio.CancelledError:  # by the server, which stops
            self.cut_off += 1
            raise RequestError(503, "the service stopped before the images were scored") from None
        finally:
            reservation.release()
            self.metrics.queue_images.set(self.admission.images)


async def _wait_for_departure(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _CountRequests:
    """Counts requests by path and status, and measures their time."""

    def __init__(self, app: ASGIApp, metrics: ServiceMetrics, paths: frozenset[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"
        started, status = time.perf_counter(), 500

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        finally:
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.request_seconds.labels(path).observe(time.perf_counter() - started)


def create_app(
    scorer: Scorer,
    settings: ServiceSettings | None = None,
    *,
    reading: ReadSettings = DEFAULT_READING,
    token: str | None = None,
    on_start: Callable[[], None] = lambda: None,
) -> FastAPI:
    """Create the application, for `farout serve` or any other ASGI server; it loads the detector at once.

    Args:
        scorer: scores the images.
        settings: limits and times; None: the defaults.
        reading: limits of an image.
        token: what every request except for `/health` must contain as `Authorization: Bearer TOKEN`; None: no token.
        on_start: is called when the application has started.

    Raises:
        FaroutError: the detector cannot be loaded.
    """
    service = Service(scorer, settings or ServiceSettings(), reading)

    @asynccontextmanager
    async def run(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        on_start()
        try:
            yield
        finally:
            if service.queue is not None:
                await asyncio.to_thread(service.queue.close, 0.0 if service.cut_off else None)

    authorize = Depends(_make_authorization(token))
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": text} for status, text in _ERRORS.items()
    }
    app = FastAPIOffline(
        title="farout",
        summary="Out-of-distribution detection on images.",
        version=store.versions()["farout"],
        lifespan=run,
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(
        _CountRequests, metrics=service.metrics, paths=frozenset({"/score", "/health", "/info", "/metrics"})
    )
    _handle_errors(app)

    @app.post(
        "/score",
        response_model=ScoreResponse,
        responses=errors,
        dependencies=[authorize],
        openapi_extra={"requestBody": _OPENAPI_BODY},
        summary="Score images",
        tags=["score"],
    )
    async def score(request: Request) -> ScoreResponse:
        """Score one or more images: files of a form, the bytes of one image as the body, or JSON with base64.

        An image that cannot be read gets the status `unreadable` and a reason; the others are scored.
        """
        rows = await service.score(request)
        return ScoreResponse(
            detector=service.fingerprint,
            alpha=service.detector.alpha,
            images=[ImageResult(**asdict(row)) for row in rows],
        )

    @app.get("/health", response_model=HealthResponse, responses={503: {"model": HealthResponse}}, tags=["service"])
    async def health(response: Response) -> HealthResponse:
        """Status 200 as soon as images can be scored, 503 if the thread that scores has ended; requires no token."""
        is_alive = service.queue is not None and service.queue.is_alive
        response.status_code = 200 if is_alive else 503
        return HealthResponse(status="ok" if is_alive else "failed")

    @app.get(
        "/info", response_model=InfoResponse, responses={401: errors[401]}, dependencies=[authorize], tags=["service"]
    )
    async def info() -> InfoResponse:
        """Describe the detector and the limits."""
        return _describe(service)

    @app.get("/metrics", response_class=Response, dependencies=[authorize], tags=["service"])
    async def metrics() -> Response:
        """Return the metrics in the text format of Prometheus."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return app


_ERRORS = {
    400: "The request has no images, or cannot be read.",
    401: "The token is missing or wrong.",
    408: "The request did not arrive in time.",
    413: "The request is too large, or has too many images.",
    415: "The content type is not supported.",
    422: "The JSON is not as expected.",
    429: "The queue is full; `Retry-After` gives the seconds to wait.",
    500: "An error of the service.",
    503: "The service is being stopped.",
    504: "The images were not scored in time.",
}


def _make_authorization(token: str | None) -> Callable[..., Awaitable[None]]:
    """A dependency that raises RequestError unless a request contains the token."""
    bearer = HTTPBearer(auto_error=False, description="The token of the service, if it has one.")
    expected = None if token is None else hashlib.sha256(token.encode()).digest()

    async def authorize(credentials: HTTPAuthorizationCredentials | None = Security(bearer)) -> None:  # noqa: B008
        if expected is None:
            return
        given = b"" if credentials is None else credentials.credentials.encode()
        # digests have one length, and are compared in a time that does not depend on the token
        if not hmac.compare_digest(hashlib.sha256(given).digest(), expected):
            message = "the token is missing or wrong; expected the header `Authorization: Bearer TOKEN`"
            raise RequestError(401, message, {"WWW-Authenticate": "Bearer"})

    return authorize


def _handle_errors(app: FastAPI) -> None:
    """Answer every error with `{"error": "one line"}`."""

    @app.exception_handler(RequestError)
    async def answer(request: Request, error: RequestError) -> JSONResponse:
        return JSONResponse({"error": error.message}, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def answer_unknown(request: Request, error: HTTPException) -> JSONResponse:
        known = "POST /score, GET /health, GET /info, GET /metrics, GET /docs"
        return JSONResponse(
            {"error": f"{request.method} {request.url.path}: {error.detail}; there are {known}"},
            error.status_code,
            error.headers,
        )

    @app.exception_handler(Exception)
    async def answer_failure(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": f"an error of the service ({type(error).__name__}); its log has more"}, 500)


def _describe(service: Service) -> InfoResponse:
    detector, settings, reading = service.detector, service.settings, service.reading
    about = describe_detector(detector)
    return InfoResponse(
        method=about["method"],
        fingerprint=service.fingerprint,
        score=detector.score_name,
        alpha=detector.alpha,
        calibration_images=len(detector.calibration),
        image_size=detector.preprocessing.size,
        channels=detector.preprocessing.channels,
        device=detector.runtime.device,
        precision=detector.precision,
        batch_size=detector.batch_size,
        detector=about["config"],
        limits=LimitsInfo(
            max_images=settings.max_images,
            max_request_bytes=settings.max_request_bytes,
            max_bytes=reading.max_bytes,
            max_pixels=reading.max_pixels,
            queue_images=settings.queue_images,
            queue_bytes=settings.queue_bytes,
            timeout=settings.timeout,
        ),
        versions=store.versions(),
    )
