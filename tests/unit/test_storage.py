"""Files in folders and on object stores, through the same operations."""

import errno
import os
import pickle
import threading
import uuid
from pathlib import Path

import fsspec
import pytest

from farout.core import remote_files, store
from farout.core.errors import FaroutError, MissingExtraError, ReadError, StoreError, WriteError
from farout.core.remote_files import RemotePath, check_url, is_url, normalize_url
from farout.core.storage import (
    as_file_path,
    exists,
    list_files,
    read_bytes,
    read_json,
    read_sealed_json,
    read_text,
    remove,
    write_bytes,
    write_json,
    write_sealed_json,
    write_text,
)
from object_store import record_ranges


@pytest.fixture(params=["local", "memory", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new location of each kind."""
    if request.param == "local":
        return str(tmp_path / "out")
    return (
        f"memory://{uuid.uuid4().hex}/out" if request.param == "memory" else f"{request.getfixturevalue('bucket')}/out"
    )


def test_files_are_written_listed_read_and_removed(location: str) -> None:
    out = as_file_path(location)
    assert list_files(out) == {}
    assert not exists(out)
    write_bytes(out / "parts" / "0001.bin", b"\0\1\2")
    write_text(out / "a text.txt", "über")
    write_bytes(out / "empty", b"")
    assert list_files(out) == {"a text.txt": 5, "empty": 0, "parts/0001.bin": 3}
    assert list_files(out / "parts") == {"0001.bin": 3}
    assert list_files(out / "part") == {}, "a part of a name is no folder"
    assert exists(out)
    assert exists(out / "parts")
    assert exists(out / "parts" / "0001.bin")
    assert not exists(out / "parts" / "0002.bin")
    assert read_bytes(out / "parts" / "0001.bin") == b"\0\1\2"
    assert read_bytes(out / "empty") == b""
    assert read_text(str(out / "a text.txt")) == "über"
    remove(out / "a text.txt")
    remove(out / "a text.txt")
    assert list_files(out) == {"empty": 0, "parts/0001.bin": 3}


def test_a_file_is_replaced_as_a_whole(location: str) -> None:
    """Readers see the old or the new content, while two writers write the same file again and again."""
    path = as_file_path(location) / "part"
    contents = [bytes([number]) * 10_000 for number in range(2)]
    write_bytes(path, contents[0])

    def write(content: bytes) -> None:
        for _ in range(5):
            write_bytes(path, content)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    seen = {read_bytes(path) for _ in range(5)}
    for thread in threads:
        thread.join()
    assert seen <= set(contents)
    assert list_files(as_file_path(location)) == {"part": 10_000}


def test_json_is_the_same_in_folders_and_on_stores(location: str, tmp_path: Path) -> None:
    content = {"b": [1, 2.5, None], "a": {"ü": "x"}}
    path = as_file_path(location) / "settings.json"
    write_sealed_json(path, content)
    store.write_sealed_json(tmp_path / "same.json", content)
    assert read_bytes(path) == (tmp_path / "same.json").read_bytes()
    assert read_sealed_json(path) == content
    write_text(path, read_text(path).replace("2.5", "2.6"))
    with pytest.raises(StoreError, match="was changed"):
        read_sealed_json(path)
    write_json(path, content)
    assert read_json(path) == content
    with pytest.raises(StoreError, match=r"missing\.json is missing"):
        read_json(as_file_path(location) / "missing.json")
    write_bytes(path, b"\xff")
    with pytest.raises(StoreError, match="not text in UTF-8"):
        read_json(path)


def test_a_missing_or_larger_file_is_an_error(location: str) -> None:
    path = as_file_path(location) / "x"
    with pytest.raises(ReadError) as missing:
        read_bytes(path)
    assert missing.value.errno == errno.ENOENT
    write_bytes(path, b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(ReadError, match="more than 4 bytes"):
        read_bytes(path, 4)


def test_a_listing_has_several_pages(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "_S3_PAGE", 2)
    names = ["a/1", "a/2+ä %41", "b", "c/d/e", "f//g"]
    for name in names:
        write_bytes(f"{bucket}/p/{name}", b"12")
    write_bytes(f"{bucket}/p2", b"")
    assert list_files(f"{bucket}/p") == dict.fromkeys(names, 2)
    assert len(list_files(bucket)) == 6


def test_ranges_are_read_with_few_requests(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_file_path(f"{bucket}/large")
    assert isinstance(path, RemotePath)
    content = os.urandom(100_000)
    write_bytes(path, content)
    sizes = record_ranges(monkeypatch)
    with path.open(buffering=1000) as file:
        file.seek(-10, os.SEEK_END)
        assert file.read() == content[-10:]
        file.seek(50_000)
        assert file.read(10) == content[50_000:50_010]
        assert file.read(10) == content[50_010:50_020], "from the buffer"
    assert sum(sizes) < 5000
    assert path.read_range(99_990, 100) == content[-10:]


def test_locations_pickle_without_their_connection(location: str) -> None:
    path = as_file_path(location) / "x"
    write_bytes(path, b"1")
    assert b"session" not in pickle.dumps(path)
    assert read_bytes(pickle.loads(pickle.dumps(path))) == b"1"  # noqa: S301


def test_urls_are_normalized() -> None:
    assert normalize_url("S3A://Bucket/Key//") == "s3://Bucket/Key"
    assert normalize_url("memory:///x") == "memory://x"
    assert str(as_file_path("file:///tmp/x")) == "/tmp/x"
    assert RemotePath("s3://b/p") / "a.png" == RemotePath("s3://b/p/a.png")
    assert RemotePath("s3://b/p").parent == RemotePath("s3://b")
    assert RemotePath("s3://b").parent == RemotePath("s3://b")
    assert RemotePath("https://h/a/x.tar?download=1").suffix == ".tar"
    assert not is_url("C:/images")
    assert not is_url("a/b://c")


@pytest.mark.parametrize(
    "url",
    [
        "s3://id:hunter2@bucket/prefix",
        "https://hunter2@host/x.png",
        "https://host/x.png?X-Amz-Credential=a&X-Amz-Signature=hunter2",
        "https://account.blob.core.windows.net/c/x.png?sv=2020&sig=hunter2",
        "https://host/x.png?access_token=hunter2",
        "HTTPS://host?api_key=hunter2",
    ],
)
def test_a_url_with_a_secret_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(FaroutError, match="leave it out") as error:
        check_url(url)
    assert "hunter2" not in str(error.value)


def test_usual_urls_are_accepted() -> None:
    for url in (
        "s3://bucket/a@b.png",
        "abfs://container@account.dfs.core.windows.net/path",
        "hdfs://user@host:9000/path",
        "https://host:8080/x.png?download=true&size=3",
    ):
        check_url(url)


def test_errors_name_the_location_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FaroutError, match="names no bucket"):
        as_file_path("s3:///")
    with pytest.raises(FaroutError, match="nosuchscheme://"):
        read_bytes("nosuchscheme://x/y")
    with pytest.raises(WriteError, match="cannot write https://host/x: a web server takes no files"):
        write_bytes("https://host/x", b"")

    def refuse(scheme: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", refuse)
    with pytest.raises(MissingExtraError, match=r'pip install "farout\[remote\]"'):
        read_bytes("s3://bucket/x")


def test_a_missing_bucket_is_no_empty_folder_to_write_to(s3_server: str) -> None:
    with pytest.raises(WriteError, match="cannot write s3://no-such-bucket-here/x: there is no such file"):
        write_bytes("s3://no-such-bucket-here/x", b"1")
