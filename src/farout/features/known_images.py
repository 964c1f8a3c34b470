"""Content hashes of encoded images by the hash of their bytes, so that known images need not be decoded again.

A second detector, or a second run, finds the cached features of an image by its content hash, which is often that of
its pixels. They are stored next to the features, as rows of 16 bytes. Only images that their bytes alone decide are
stored: of 8 bits, and of one frame.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from farout.core import store
from farout.core.errors import StoreError
from farout.features.cache_folder import HASHES_PREFIX, CacheFullError, cache_folder
from farout.features.feature_files import FORMAT
from farout.features.feature_store import open_store

__all__ = ["KnownImages"]

_WIDTH = 4
"""A hash of 16 bytes is stored as a row of this many float32."""


class KnownImages:
    """The stored content hashes; for any thread.

    Args:
        root: folder of the cache; None: `cache_folder()`. Without one, no image is known.
    """

    def __init__(self, root: Path | None = None) -> None:
        versions = {name: store.versions()[name] for name in ("farout", "torch", "pillow")}
        settings = {"format": FORMAT, "width": _WIDTH, "versions": versions, "kind": "content hashes"}
        name = HASHES_PREFIX + hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        try:
            folder = (root or cache_folder()) / "features" / name
        except StoreError:  # the feature cache has warned
            folder = Path(os.devnull, name)
        self._store = open_store(folder, _WIDTH, settings)
        self._is_writable, self._lock = True, threading.Lock()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Find what other processes have stored meanwhile, and at the end write what was added."""
        self._store.refresh()
        try:
            yield
        finally:
            self._write({})

    def find(self, encoded_hash: bytes) -> str | None:
        """Return the content hash of an encoded image (`EncodedImage.hash`), or None."""
        row = self._store.read([encoded_hash]).get(encoded_hash)
        return None if row is None else row.tobytes().hex()

    def add(self, encoded_hash: bytes, content_hash: str) -> None:
        """Store the content hash of an encoded image."""
        self._write({encoded_hash: np.frombuffer(bytes.fromhex(content_hash), "<f4")})

    def _write(self, rows: dict[bytes, np.ndarray]) -> None:
        with self._lock:
            if not self._is_writable:
                return
            try:
                if rows:
                    self._store.add(rows)
                else:
                    self._store.flush(may_wait=True)
            except (OSError, CacheFullError):  # the feature cache, in the same folder, warns
                self._is_writable = False
