"""Reading the images of an HTTP request, within limits that are checked while the body arrives."""

from __future__ import annotations

import asyncio
import base64
import binascii
import math
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from farout.core.errors import UnreadableImageError
from farout.core.names import encode_file_name
from farout.data.read_settings import ReadSettings
from farout.scoring.service.batching import SubmittedImage
from farout.scoring.service.settings import ServiceSettings
from farout.scoring.service.urls import check_url, load_url

__all__ = ["Admission", "RequestError", "Reservation", "describe_score_body", "read_images"]

_URL_CONNECTIONS = 8
"""URLs of one request that are loaded at the same time."""
_URL_TIMEOUT_S = 10.0
"""Maximum time for loading a URL, so that a slow one does not use up the time of the request."""
_MAX_VALUES_PER_IMAGE = 1000
"""Values of a JSON body per image that is allowed, in a generous estimate: keys and URLs may contain commas."""


class RequestError(Exception):
    """An answer other than 200.

    Attributes:
        status: the status code.
        message: one line for the client.
        headers: further headers of the response.
    """

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}


class ImageInput(BaseModel):
    """One image: either `data` or `url`."""

    model_config = ConfigDict(extra="forbid")

    key: str | None = Field(None, description="key of the image in the response; default: its index")
    data: str | None = Field(None, description="the encoded image in base64")
    url: str | None = Field(None, description="URL of the image, on a site that the operator allows")


class ScoreBody(BaseModel):
    """Body of a request in JSON."""

    model_config = ConfigDict(extra="forbid")

    images: list[ImageInput] = Field(min_length=1)


def describe_score_body() -> dict[str, Any]:
    """The JSON schema of a body, without references."""
    schema = ScoreBody.model_json_schema()
    schema["properties"]["images"]["items"] = schema.pop("$defs")["ImageInput"]
    return schema


class Admission:
    """Counts what is accepted and not yet answered, of requests that arrive and of URLs that threads load."""

    def __init__(self, max_images: int, max_bytes: int) -> None:
        self.max_images, self.max_bytes = max_images, max_bytes
        self.images, self.bytes = 0, 0
        self.lock = threading.Lock()
        self.seconds_per_image: Callable[[], float] = lambda: 0.0

    def retry_after(self) -> int:
        """Seconds after which the accepted images are probably answered."""
        return max(1, min(60, math.ceil(self.images * self.seconds_per_image())))


@dataclass
class Reservation:
    """What one request takes of the `Admission`, until `release` returns it."""

    admission: Admission
    images: int = field(default=0, init=False)
    bytes: int = field(default=0, init=False)
    is_released: bool = field(default=False, init=False)

    def add(self, *, images: int = 0, size: int = 0, max_bytes: float = math.inf) -> None:
        """Reserve more, also from other threads.

        Raises RequestError with status 429 if there is not enough left, and with status 413 if the request then has
        more than `max_bytes`.
        """
        admission = self.admission
        with admission.lock:
            if self.is_released:  # a thread that still loads a URL
                raise RequestError(499, "the request has ended")
            if self.bytes + size > max_bytes:
                raise RequestError(413, f"the request has more than {max_bytes:.0f} bytes (--max-request-bytes)")
            if admission.images + images > admission.max_images or admission.bytes + size > admission.max_bytes:
                raise RequestError(
                    429,
                    f"the queue is full ({admission.images} images, {admission.bytes} bytes); try again later",
                    {"Retry-After": str(admission.retry_after())},
                )
            admission.images += images
            admission.bytes += size
            self.images += images
            self.bytes += size

    def release(self) -> None:
        """Return everything; nothing more can be reserved."""
        with self.admission.lock:
            self.is_released = True
            self.admission.images -= self.images
            self.admission.bytes -= self.bytes
            self.images = self.bytes = 0


class _InMemoryParser(MultiPartParser):
    """Keeps all parts in memory, whose size is limited: images of clients are not written to the disk."""

    spool_max_size = max_file_size = 2**62


async def read_images(
    request: Request, settings: ServiceSettings, reading: ReadSettings, reservation: Reservation
) -> list[SubmittedImage]:
    """Read the images of a request.

    An image that is larger than `reading.max_bytes`, not base64, or a URL that cannot be loaded, becomes an image
    without data. Raises RequestError for a request that is no list of images, exceeds a limit, or takes too long.
    """
    try:
        async with asyncio.timeout(settings.timeout):
            images = await _read_body(request, settings, reservation)
    except TimeoutError:
        message = f"the request did not arrive within {settings.timeout:g} seconds"
        raise RequestError(408, message, {"Connection": "close"}) from None
    except ClientDisconnect:
        raise RequestError(400, "the client has closed the connection") from None
    return [_limit_bytes(image, reading) for image in images]


async def _read_body(request: Request, settings: ServiceSettings, reservation: Reservation) -> list[SubmittedImage]:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > settings.max_request_bytes:
        raise _too_large(settings)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    stream = _stream(request, settings, reservation)
    if kind == "multipart/form-data":
        images = await _read_multipart(request, stream, settings)
    elif kind == "application/json":
        images = await _read_json(b"".join([chunk async for chunk in stream]), settings, reservation)
    elif kind == "" or kind.startswith("image/") or kind in ("application/octet-stream", "application/dicom"):
        data = b"".join([chunk async for chunk in stream])
        images = [SubmittedImage(encode_file_name(request.query_params.get("key") or "image"), data)] if data else []
    else:
        raise RequestError(
            415,
            f"the content type is {kind}; expected multipart/form-data, image/*, application/octet-stream or "
            "application/json",
        )
    if not images:
        raise RequestError(400, "the request has no images; send files as multipart/form-data, or the bytes of one")
    return images


async def _stream(request: Request, settings: ServiceSettings, reservation: Reservation) -> AsyncGenerator[bytes, None]:
    """The body as it arrives; raises RequestError as soon as it exceeds a limit."""
    async for chunk in request.stream():
        reservation.add(size=len(chunk), max_bytes=settings.max_request_bytes)
        yield chunk


def _too_large(settings: ServiceSettings) -> RequestError:
    return RequestError(413, f"the request has more than {settings.max_request_bytes} bytes (--max-request-bytes)")


def _too_many(settings: ServiceSettings) -> RequestError:
    return RequestError(413, f"the request has more than {settings.max_images} images (--max-images)")


async def _read_multipart(
    request: Request, stream: AsyncGenerator[bytes, None], settings: ServiceSettings
) -> list[SubmittedImage]:
    parser = _InMemoryParser(request.headers, stream, max_files=settings.max_images, max_fields=0)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise _too_many(settings) from error
        if error.message.startswith("Too many fields"):
            raise RequestError(400, "a part of the form is not a file; expected files only") from error
        raise RequestError(400, f"the form cannot be read: {error.message}") from error
    except FormParserError as error:  # which older versions of Starlette do not convert
        raise RequestError(400, f"the form cannot be read: {error}") from error
    images = []
    for index, (_, file) in enumerate(form.multi_items()):
        assert isinstance(file, UploadFile)
        images.append(SubmittedImage(encode_file_name(file.filename or str(index)), await file.read()))
        await file.close()
    return images


async def _read_json(body: bytes, settings: ServiceSettings, reservation: Reservation) -> list[SubmittedImage]:
    # each value needs hundreds of times its bytes while it is read; base64 contains none of these signs
    if sum(body.count(sign) for sign in (b",", b"[", b"{")) > _MAX_VALUES_PER_IMAGE * settings.max_images:
        raise _too_many(settings)
    try:
        inputs = ScoreBody.model_validate_json(body).images
    except ValidationError as error:
        first: Any = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise RequestError(
            422, f"the JSON is not as expected{f', at {where}' if where else ''}: {first['msg']}"
        ) from error
    if len(inputs) > settings.max_images:
        raise _too_many(settings)
    connections = asyncio.Semaphore(_URL_CONNECTIONS)

    async def load(index: int, image: ImageInput) -> SubmittedImage:
        async with connections:
            return await _load(index, image, settings, reservation)

    tasks = [asyncio.ensure_future(load(index, image)) for index, image in enumerate(inputs)]
    try:
        return list(await asyncio.gather(*tasks))
    finally:  # what they reserve after the answer to a failed request would never be released
        for task in tasks:
            task.cancel()


async def _load(index: int, image: ImageInput, settings: ServiceSettings, reservation: Reservation) -> SubmittedImage:
    key = encode_file_name(image.key or str(index))
    if (image.data is None) == (image.url is None):
        given = "neither data nor url" if image.data is None else "both data and url"
        raise RequestError(422, f"image {index} has {given}; expected one")
    if image.data is not None:
        try:
            return SubmittedImage(key, base64.b64decode(image.data, validate=True))
        except (binascii.Error, ValueError):
            return SubmittedImage(key, None, "the data are not base64")
    url, loaded = str(image.url), 0

    def reserve(size: int) -> None:
        nonlocal loaded
        reservation.add(size=size, max_bytes=settings.max_request_bytes)
        loaded += size

    try:
        check_url(url, settings.allow_urls)
        timeout = min(_URL_TIMEOUT_S, settings.timeout / 2)
        data = await asyncio.to_thread(load_url, url, settings.allow_urls, settings.max_request_bytes, timeout, reserve)
    except UnreadableImageError as error:
        reservation.add(size=-loaded)
        return SubmittedImage(key, None, str(error))
    return SubmittedImage(key, data)


def _limit_bytes(image: SubmittedImage, reading: ReadSettings) -> SubmittedImage:
    if image.data is None or len(image.data) <= reading.max_bytes:
        return image
    return SubmittedImage(image.key, None, f"it has more than {reading.max_bytes} bytes (--max-bytes)")
