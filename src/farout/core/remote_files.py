"""Files on object stores and web servers, addressed by URL and read through fsspec: whole, or in ranges.

Credentials and options come from the environment, or from the configuration of fsspec, never from the URL: URLs are
written to results and logs.
"""

from __future__ import annotations

import errno
import io
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from urllib.parse import parse_qsl

from farout.core.errors import FaroutError, MissingExtraError, UnreachableStoreError
from farout.core.names import expand_path

__all__ = [
    "NETWORK_ERROR",
    "FilePath",
    "RemotePath",
    "as_file_path",
    "check_url",
    "is_url",
    "local_path_of",
    "normalize_url",
]

T = TypeVar("T")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_ALIASES = {"s3a": "s3", "gcs": "gs", "local": "file"}
_LIBRARIES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "http": "aiohttp"}
"""Libraries of fsspec by scheme, for the error of a missing one."""
_WEB = ("http", "https")
_SECRET_NAMES = re.compile(
    r"(?i)^(x-amz-.*|x-goog-.*|awsaccesskeyid|googleaccessid|sig|.*signature.*|.*token.*|.*secret.*|.*passw.*|.*credential.*"
    r"|(api|access)[-_]?key|auth|authorization|policy|key-pair-id)$"
)
"""Parameters of a query that give access, such as those of a signed URL."""
_SECRET_VALUES = re.compile(r"(?i)\?\S*?(sig|token|secret|credential|key)\S*")
_CONTAINERS = frozenset(
    {"blockcache", "cached", "data", "dir", "filecache", "generic", "reference", "simplecache", "tar", "zip"}
)
"""Schemes of fsspec that name no store."""
_REFUSALS = {errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.EPERM, errno.ENAMETOOLONG, errno.EEXIST, errno.ENOSYS}
_S3_PAGE = 1000
_MAX_ATTEMPTS = 3
"""For web servers; the libraries of object stores repeat failed requests themselves."""
NETWORK_ERROR = "network error"
"""How the reason begins if a store could not be reached or did not answer, after the usual repetitions."""
_MAX_FAILURES = 10
"""Requests to one object store that fail in a row: each takes many seconds, and the next ones would fail, too."""
_failures: dict[str, int] = {}


def is_url(text: object) -> bool:
    """Whether a text is a URL, such as `s3://bucket/prefix`."""
    return isinstance(text, RemotePath) or (isinstance(text, str) and _SCHEME.match(text) is not None)


def check_url(url: str) -> None:
    """Raise FaroutError for a URL that contains a password or a signature, or names no store; never repeats a secret.

    URLs are written to results and logs, where nobody expects a secret.
    """
    scheme, rest = _split_scheme(url)
    place, _, query = rest.partition("?")
    user, mark, host = place.partition("/")[0].rpartition("@")
    if mark and (":" in user or scheme in _WEB):
        raise FaroutError(
            f"a URL on {scheme}://{host} contains a user name or a password, which would be written to results; leave "
            "it out, and set credentials in the environment or in the configuration of fsspec"
        )
    secrets = [name for name, _ in parse_qsl(query, keep_blank_values=True) if _SECRET_NAMES.match(name)]
    if secrets:
        raise FaroutError(
            f"a URL on {scheme}://{host or user} is signed or contains a secret ({secrets[0]}=…), which would be "
            "written to results; leave it out and set credentials in the environment, or download the file"
        )
    if not place.strip("/"):
        raise FaroutError(f"{url!r} names no bucket or host; expected for example {scheme}://bucket/prefix")


def normalize_url(url: str) -> str:
    """Return the URL in the form in which equal locations are equal: scheme in lower case, no `/` at the end."""
    scheme, rest = _split_scheme(url)
    rest = rest.lstrip("/") if scheme == "memory" else rest
    return f"{scheme}://{rest.rstrip('/')}"


def _split_scheme(url: str) -> tuple[str, str]:
    match = _SCHEME.match(url)
    assert match is not None, "not a URL"
    scheme = match[1].lower()
    return _ALIASES.get(scheme, scheme), url[match.end() :]


def local_path_of(url: str) -> str | None:
    """Return the path in a URL `file:///…`; None for a URL of another scheme."""
    scheme, rest = _split_scheme(url)
    return rest if scheme == "file" else None


class RemotePath:
    """The URL of a file or of a prefix, with those operations of `pathlib.Path` that readers and writers need.

    It pickles as the URL and the size; the connection is opened in the process that reads. Errors of the store are
    raised as OSError, with a reason that says what went wrong: "network error: …" if the store could not be reached or
    did not answer, after the usual repetitions.

    Args:
        url: the URL; see `check_url` for what is refused.
        size: number of bytes, if it is known, such as from a listing.
    """

    __slots__ = ("_size", "url")

    def __init__(self, url: str, size: int | None = None) -> None:
        self.url, self._size = url, size

    @classmethod
    def parse(cls, url: str) -> RemotePath:
        """Return the path of a URL given by a user; raises FaroutError as `check_url`."""
        check_url(url)
        return cls(normalize_url(url))

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RemotePath({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __reduce__(self) -> tuple[Any, ...]:
        return RemotePath, (self.url, self._size)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}" if name else self.url)

    def with_size(self, size: int) -> RemotePath:
        """Return this path with a known size."""
        return RemotePath(self.url, size)

    @property
    def scheme(self) -> str:
        """The scheme of the URL, such as `s3`."""
        return self.url.partition("://")[0]

    @property
    def is_web(self) -> bool:
        """Whether the file is on a web server, which can be read and neither listed nor written."""
        return self.scheme in _WEB

    @property
    def name(self) -> str:
        """The last component, without the query of a web address."""
        path = self.url.partition("?")[0] if self.is_web else self.url
        return path.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The suffix of the name, such as `.png`; empty if there is none."""
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> RemotePath:
        """The prefix that contains this one; that of a bucket or host is itself."""
        path = self.url.partition("?")[0] if self.is_web else self.url
        parent = path.rpartition("/")[0]
        return self if parent.endswith("/") else RemotePath(parent)

    @property
    def size(self) -> int:
        """Number of bytes; asks the store if it is not known. Raises OSError."""
        if self._size is None:
            size = self._call(lambda system, path: system.info(path))["size"]
            if size is None:
                raise OSError(errno.EINVAL, "the server does not state the size of the file", self.url)
            self._size = int(size)
        return self._size

    def find_kind(self) -> str | None:
        """Return `file`, `directory` for a prefix, or None if there is nothing; raises OSError if that is unknown."""

        def ask(system: Any, path: str) -> str | None:
            try:
                entry = system.info(path)
            except FileNotFoundError:
                return None
            return str(entry["type"])

        return self._call(ask)

    def exists(self) -> bool:
        """Whether there is a file of this name, or any file below it. Raises OSError if the store cannot be asked."""
        return self.find_kind() is not None

    def list_files(self) -> dict[str, int]:
        """Return the sizes of all files below this prefix, by their path relative to it, sorted.

        Raises OSError if the listing failed; never returns a part of it.
        """
        return {name: size for name, size in self._list(recursive=True).items() if size is not None}

    def list_entries(self) -> dict[str, int | None]:
        """Return what is directly in this prefix, by name: the sizes of files, and None for folders; raises OSError."""
        return self._list(recursive=False)

    def _list(self, *, recursive: bool) -> dict[str, int | None]:
        def find(system: Any, path: str) -> dict[str, int | None]:
            try:
                if recursive and hasattr(system, "call_s3"):
                    return dict(sorted(_list_s3(system, path)))
                entries = system.find(path, detail=True).values() if recursive else system.ls(path, detail=True)
            except FileNotFoundError:
                return {}
            start = path.rstrip("/") + "/"
            sizes: dict[str, int | None] = {}
            for entry in entries:
                name, is_folder = entry["name"][len(start) :], entry["type"] != "file" or entry["name"].endswith("/")
                if entry["name"].startswith(start) and name.rstrip("/"):  # some list the prefix itself
                    sizes[name.rstrip("/") if is_folder else name] = None if is_folder else int(entry["size"] or 0)
            return dict(sorted(sizes.items()))

        return self._call(find)

    def read(self, limit: int) -> bytes:
        """Return the content of at most `limit` bytes; raises OSError, with EFBIG for a larger file."""
        too_large = OSError(errno.EFBIG, f"it has more than {limit:,} bytes", self.url)
        if self._size is not None and self._size > limit:
            raise too_large
        if self._size == 0:  # a range of an empty file is an error of some stores
            return b""
        content = self._call(_read_stream if self.is_web else _read_start, limit + 1)
        if len(content) > limit:
            raise too_large
        return content

    def read_range(self, start: int, length: int) -> bytes:
        """Return up to `length` bytes from `start`, fewer only at the end of the file; raises OSError."""
        length = min(length, self.size - start)
        if length <= 0:
            return b""
        content = self._call(_read_web_range if self.is_web else _read_range, start, length, self.size)
        if len(content) != length:
            raise OSError(errno.EIO, f"{len(content)} of {length} bytes were received; the file was changed", self.url)
        return content

    def open(self, mode: str = "rb", buffering: int = 2**22) -> io.BufferedReader:
        """Open the file for reading in ranges, as `Path.open("rb")`.

        Args:
            mode: `rb`.
            buffering: the least number of bytes that a request fetches.
        """
        assert mode == "rb", "files are written whole, by `write`"
        return io.BufferedReader(self.open_unbuffered(), buffering)

    def open_unbuffered(self) -> io.RawIOBase:
        """Open the file for reading; every read is one request for exactly these bytes."""
        return _RangeReader(self)

    def write(self, data: bytes) -> None:
        """Write the whole file; other processes see the old content or the new one. Raises OSError."""
        if self.is_web:
            raise OSError(errno.EROFS, "a web server takes no files; give a folder or an object store", self.url)
        self._call(lambda system, path: system.pipe_file(path, data))

    def upload(self, file: Path) -> None:
        """Write the whole file with the content of a file on this machine, as `write` does. Raises OSError."""
        if self.is_web:
            raise OSError(errno.EROFS, "a web server takes no files; give a folder or an object store", self.url)
        self._call(lambda system, path: system.put_file(str(file), path))
        self._size = file.stat().st_size

    def remove(self) -> None:
        """Remove the file if it exists; raises OSError."""

        def remove(system: Any, path: str) -> None:
            try:
                system.rm_file(path)
            except FileNotFoundError:
                return

        self._call(remove)

    def _call(self, operation: Callable[..., T], *arguments: Any) -> T:
        """Return the result of an operation on the file system and the path in it.

        On a web server, network errors are repeated. A list may name many servers, of which some do not exist any more;
        an object store that does not answer several times in a row is an UnreachableStoreError.
        """
        store = "/".join(self.url.split("/")[:3])
        for attempt in range(_MAX_ATTEMPTS):
            try:
                with _store_errors(self.url):
                    system = _open_file_system(self.url)
                    result = operation(system, system._strip_protocol(self.url), *arguments)
                _failures.pop(store, None)
                return result
            except ConnectionError as error:
                if not self.is_web:
                    count = _failures[store] = _failures.get(store, 0) + 1  # other threads may reset it
                    if count < _MAX_FAILURES:
                        raise
                    _failures.pop(store, None)
                    raise UnreachableStoreError(
                        f"{store} did not answer {count} times in a row ({error.strerror}); run the same command "
                        "again when it does"
                    ) from error
                if attempt == _MAX_ATTEMPTS - 1:
                    raise
                time.sleep(0.2 * 4**attempt)
        raise AssertionError("unreachable")


FilePath: TypeAlias = Path | RemotePath
"""A file or folder on this machine or on a store."""


def as_file_path(location: str | FilePath) -> FilePath:
    """Return the path of a location given by a user: a URL as RemotePath, everything else as local path, expanded."""
    if isinstance(location, RemotePath):
        return location
    if isinstance(location, str) and is_url(location):
        local = local_path_of(location)
        return RemotePath.parse(location) if local is None else expand_path(local)
    return expand_path(location)


class _RangeReader(io.RawIOBase):
    """A remote file as a stream, of which every read is one request."""

    def __init__(self, path: RemotePath) -> None:
        self._path, self._position = path, 0
        self._length = path.size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, f"a position before the start of the file: {base + offset}", self._path.url)
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._path.read_range(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _list_s3(system: Any, path: str) -> Iterator[tuple[str, int]]:
    """List the names and sizes of objects on S3, page by page: s3fs holds all that S3 says of every object.

    Older versions of s3fs also take a page that could not be fetched for the end of the listing.
    """
    bucket, prefix, _ = system.split_path(path)
    prefix = f"{prefix}/" if prefix else ""
    request = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": _S3_PAGE, **system.req_kw}
    while True:
        page = system.call_s3("list_objects_v2", **request)
        for entry in page.get("Contents", ()):
            if not entry["Key"].endswith("/"):  # made by programs that show folders
                yield entry["Key"][len(prefix) :], int(entry["Size"])
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _read_start(system: Any, path: str, count: int) -> bytes:
    try:
        content = system.cat_file(path, start=0, end=count)
    except OSError:
        if system.info(path)["size"] != 0:  # a range of an empty file is an error of some stores
            raise
        return b""
    return bytes(content)


def _read_stream(system: Any, path: str, count: int) -> bytes:
    """Read from a web server, which may send more than the length it states, and may not serve ranges."""
    parts = list[bytes]()
    with system.open(path, "rb", block_size=0) as stream:
        while count > 0 and (part := stream.read(min(count, 2**20))):
            parts.append(part)
            count -= len(part)
    return b"".join(parts)


def _read_range(system: Any, path: str, start: int, length: int, size: int) -> bytes:
    return bytes(system.cat_file(path, start=start, end=start + length))


def _read_web_range(system: Any, path: str, start: int, length: int, size: int) -> bytes:
    with system.open(path, "rb", block_size=length, size=size, cache_type="none") as stream:
        stream.seek(start)
        return bytes(stream.read(length))


_FILE_SYSTEMS: dict[tuple[Any, ...], Any] = {}


def _open_file_system(url: str) -> Any:
    """Return the file system of fsspec for a URL, one per process, shared by its threads.

    Listings are not cached: another process may write meanwhile.
    """
    import fsspec

    scheme = url.partition("://")[0]
    if scheme in _CONTAINERS:
        raise FaroutError(f"{scheme}:// is no store of files; give the URL of the file itself")
    try:
        of_url = fsspec.get_filesystem_class(scheme)._get_kwargs_from_urls(url)  # host, or account, of some
        key = os.getpid(), scheme, *sorted(of_url.items())
        if key not in _FILE_SYSTEMS:
            _FILE_SYSTEMS[key] = fsspec.filesystem(scheme, **of_url, use_listings_cache=False)
    except ImportError as error:
        library = _LIBRARIES.get(scheme.replace("https", "http"), "")
        how = 'pip install "farout[remote]"' if library in ("s3fs", "aiohttp") else f"pip install {library}"
        raise MissingExtraError(
            f"{scheme}:// requires {library}, which is not installed: {how}" if library else f"{scheme}://: {error}"
        ) from error
    except ValueError as error:
        raise FaroutError(
            f"{scheme}:// cannot be opened ({error}); expected s3://, gs://, az://, https:// or another scheme that "
            "fsspec knows"
        ) from error
    return _FILE_SYSTEMS[key]


@contextmanager
def _store_errors(url: str) -> Iterator[None]:
    """Convert what libraries of stores raise to OSError with a reason; ConnectionError is that of the network."""
    try:
        yield
    except FaroutError:
        raise
    except Exception as error:
        raise _convert_error(error, url) from error


def _convert_error(error: Exception, url: str) -> OSError:
    if isinstance(error, FileNotFoundError):
        cause = error.__cause__  # of a web server, fsspec reports everything that goes wrong as a missing file
        if isinstance(cause, Exception) and url.startswith("http") and getattr(cause, "status", None) not in (404, 410):
            return _convert_error(cause, url)
        return FileNotFoundError(errno.ENOENT, "there is no such file, prefix or bucket", url)
    reason = _SECRET_VALUES.sub("?…", " ".join(str(error).split()))[:300] or type(error).__name__
    status = getattr(error, "status", None)
    names = {cls.__name__ for cls in type(error).__mro__}
    if "NoCredentialsError" in names or "DefaultCredentialsError" in names:
        hint = ", or FSSPEC_S3_ANON=true for a public bucket" if url.startswith("s3://") else ""
        return PermissionError(errno.EACCES, f"no credentials ({reason}); set them in the environment{hint}", url)
    if isinstance(error, PermissionError) or status in (401, 403):
        return PermissionError(errno.EACCES, f"access denied ({reason}); check the credentials", url)
    if isinstance(error, NotImplementedError):
        return OSError(errno.ENOTSUP, f"this store does not support that ({reason})", url)
    is_of_request = isinstance(error, ValueError | TypeError) or "ParamValidationError" in names
    number = None if isinstance(error, ConnectionError | TimeoutError) else getattr(error, "errno", None)
    if is_of_request or number in _REFUSALS or (isinstance(status, int) and status < 500 and status != 429):
        return OSError(number or errno.EINVAL, f"the store refuses the request ({reason})", url)
    return ConnectionError(errno.EIO, f"{NETWORK_ERROR}: {reason}", url)
