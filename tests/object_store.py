"""An S3 server in this process, for tests of object stores."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from farout.core.remote_files import RemotePath


def record_ranges(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which every range that is read of a remote file adds its size."""
    sizes: list[int] = []
    read_range = RemotePath.read_range

    def read_and_record(self: RemotePath, start: int, length: int) -> bytes:
        data = read_range(self, start, length)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(RemotePath, "read_range", read_and_record)
    return sizes


@contextmanager
def serve_s3() -> Iterator[str]:
    """Start a server on a free port of this machine and set the environment for it; yields its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    settings = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield address
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
