"""Every file of a folder is an image, an unreadable image with a reason, or counted, whatever its name and content."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import unicodedata
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from farout.core.errors import SourceError
from farout.core.names import decode_file_name
from farout.data.decoding import FORMATS, image_suffixes
from farout.data.sources import open_source


def encoded(form: str) -> bytes:
    data = io.BytesIO()
    Image.new("L", (4, 4), 90).save(data, format=form)
    return data.getvalue()


PNG, GIF = encoded("PNG"), encoded("GIF")
CONTENTS = st.one_of(
    st.just(PNG),
    st.just(GIF),
    st.just(b""),
    st.binary(max_size=64),
    st.integers(1, len(PNG) - 1).map(lambda size: PNG[:size]),
    st.tuples(st.integers(0, len(PNG) - 1), st.integers(0, 255)).map(
        lambda change: PNG[: change[0]] + bytes([change[1]]) + PNG[change[0] + 1 :]
    ),
)
NAMED_SUFFIXES = sorted({suffix for all_of in FORMATS.values() for suffix in all_of})
SUFFIXES = st.one_of(
    st.sampled_from(["", ".txt", ".heic", ".exr", ".dcm", ".PNG", ".jpeg", ".json", ".db", *NAMED_SUFFIXES]),
    st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), max_size=4).map(
        lambda text: f".{text}"
    ),
)
# any bytes but the separator and zero; a leading dot hides a file
NAMES = st.lists(st.integers(1, 255).filter(lambda byte: byte != 47), min_size=1, max_size=40).map(bytes)
FOLDERS = st.sampled_from([b"", b"a", b"b", b"a/deep", "caf\u00e9".encode(), b"\xff\xfe", b"=x"])
FILES = st.lists(st.tuples(FOLDERS, NAMES, SUFFIXES, CONTENTS), min_size=1, max_size=8)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse names that are not UTF-8")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=FILES)
def test_rows_and_counted_files_are_all_files(files: list[tuple[bytes, bytes, str, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = os.fsencode(folder)
        visible, hidden = set(), 0
        for where, name, suffix, content in files:
            full = os.path.join(root, where, name + suffix.encode())
            if name + suffix.encode() in (b".", b"..") or len(name + suffix.encode()) > 255 or os.path.lexists(full):
                continue
            os.makedirs(os.path.dirname(full), exist_ok=True)
            Path(os.fsdecode(full)).write_bytes(content)
            if name.startswith(b"."):
                hidden += 1
            else:
                visible.add(os.fsdecode(os.path.relpath(full, root)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if all(Path(name).suffix.lower() not in image_suffixes() for name in visible):
                with pytest.raises(SourceError, match=r"\d|empty"):  # the message counts what there is
                    open_source(folder)
                return
            source = open_source(folder, policy="nan")
        hashes = source.content_hashes()
        unreadable = [key for key, content in zip(source.keys, hashes) if content is None]
        assert set(unreadable) == set(source.unreadable)
        assert all(source.unreadable.values())
        assert len(source.keys) + sum(source.left_out.values()) == len(visible)
        assert {decode_file_name(key) for key in source.keys} <= visible
        assert len(set(source.keys)) == len(source.keys)
        for key in source.keys:
            assert not {"Cc", "Cs"} & set(map(unicodedata.category, key))
            assert key[0] not in "=+-@"
