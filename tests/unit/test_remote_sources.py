"""Images on object stores and web servers: the same sets as the same files in a folder."""

import functools
import http.server
import pickle
import tarfile
import threading
import uuid
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from farout.core import remote_files
from farout.core.errors import (
    FaroutError,
    LeftOutWarning,
    SourceError,
    UnreachableStoreError,
    UnreadableImageError,
)
from farout.core.remote_files import RemotePath
from farout.core.storage import write_bytes, write_json
from farout.data.batching import iterate_batches
from farout.data.file_names import encode_inner_path
from farout.data.image_source import ImageSource
from farout.data.preprocessing import Preprocessing
from farout.data.read_settings import ReadSettings
from farout.data.source_spec import parse_spec
from farout.data.sources import open_source
from image_files import encode, picture, pixels, write_folder, write_parquet
from object_store import record_ranges


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest) -> str:
    """The URL of an empty prefix of each kind of store."""
    root = f"memory://{uuid.uuid4().hex}" if request.param == "memory" else request.getfixturevalue("bucket")
    return f"{root}/some/prefix"


def upload(folder: Path, url: str) -> str:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            write_bytes(f"{url}/{file.relative_to(folder).as_posix()}", file.read_bytes())
    return url


def open_quietly(source: object, **options) -> ImageSource:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftOutWarning)
        return open_source(source, **options)


def assert_same(remote: ImageSource, local: ImageSource) -> None:
    assert remote.keys == local.keys
    assert (remote.labels, remote.class_names, remote.groups) == (local.labels, local.class_names, local.groups)
    assert [*remote.left_out.values()] == [*local.left_out.values()]
    assert (remote.splits is None) == (local.splits is None)
    assert remote.content_hashes() == local.content_hashes()
    assert remote.unreadable.keys() == local.unreadable.keys()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders with everything that a folder may contain."""
    root = tmp_path_factory.mktemp("images")
    names = ["cat/1.png", "cat/a b.png", "dog/ü.png", "dog/2@2x.png", "dog/100%41.png"]
    write_folder(root, pixels(5), names)
    (root / "dog" / "broken.jpg").write_bytes(b"no image")
    (root / "dog" / "empty.png").write_bytes(b"")
    (root / "notes.txt").write_text("x")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "h.png").write_bytes(b"x")
    (root / "cat" / ".DS_Store").write_bytes(b"x")
    (root / "cat" / "@eaDir").mkdir()
    (root / "cat" / "@eaDir" / "1.png").write_bytes(b"x")
    (root / "results" / "maps").mkdir(parents=True)
    (root / "results" / "settings.json").write_text("{}")
    (root / "results" / "manifest.json").write_text("{}")
    (root / "results" / "maps" / "map.png").write_bytes(b"x")
    return root


def test_a_prefix_is_the_set_that_the_folder_is(folder: Path, store: str) -> None:
    local = open_quietly(folder, policy="nan")
    assert len(local) == 7
    assert len(local.left_out) == 3, local.left_out
    remote = open_quietly(upload(folder, store), policy="nan")
    assert_same(remote, local)
    assert remote.name == store
    assert remote.location == store
    assert open_quietly(f"{store}/").location == store
    assert open_quietly(f"{store}@classes=cat").keys == ("cat/1.png", "cat/a b.png")
    flipped = open_quietly(f"{store}@vflip,classes=cat")
    assert np.array_equal(flipped[0], remote[0].flip(-2))


@pytest.mark.parametrize(
    "pattern", ["**/*.png", "*/*.png", "cat/*", "*", "dog/?.png", "{cat,dog}/[12]*.png", "**", "d*/**/*.jpg"]
)
def test_a_glob_matches_what_it_matches_locally(folder: Path, store: str, pattern: str) -> None:
    upload(folder, store)
    try:
        local = open_quietly(f"{folder}/{pattern}", policy="nan")
    except SourceError:
        with pytest.raises(SourceError, match="matches no images"):
            open_source(f"{store}/{pattern}")
        return
    remote = open_quietly(f"{store}/{pattern}", policy="nan")
    assert_same(remote, local)
    assert remote.left_out == {what.replace(str(folder), store): count for what, count in local.left_out.items()}


def test_one_image_and_names_with_special_characters(folder: Path, store: str) -> None:
    upload(folder, store)
    for name in ("dog/2@2x.png", "dog/100%41.png", "dog/ü.png", "cat/a b.png"):
        remote = open_source(f"{store}/{name}")
        assert_same(remote, open_source(folder / name))
        assert open_source(remote.name).content_hashes() == remote.content_hashes(), "opens again by its name"
    write_bytes(f"{store}/time/10:30:00.png", (folder / "cat" / "1.png").read_bytes())
    write_bytes(f"{store}/time/a:b.png", (folder / "cat" / "1.png").read_bytes())
    write_bytes(f"{store}/set[1]/x.png", (folder / "cat" / "1.png").read_bytes())
    assert len(open_source(f"{store}/time/10:30:00.png")) == 1
    assert len(open_source(f"{store}/time/a:b.png")) == 1
    assert len(open_source(f"{store}/set[1]")) == 1


def test_keys_of_a_store_lead_out_of_no_folder(bucket: str) -> None:
    image = encode(picture(pixels(1)[0]), "PNG")
    write_bytes(f"{bucket}/p//y.png", image)
    source = open_source(f"{bucket}/p")
    assert source.keys == ("%2Fy.png",)
    assert source[0].shape == (1, 8, 8)
    assert encode_inner_path("a/../x.png") == "a/%2E%2E/x.png"


def test_parquet_shards(tmp_path: Path, store: str) -> None:
    names = ["a", "b"]
    for number in range(3):
        path = tmp_path / "set" / f"train-{number:05}-of-00003.parquet"
        write_parquet(path, pixels(4, seed=number), [0, 1, 0, 1], names, row_group=2)
    write_parquet(tmp_path / "set" / "test.parquet", pixels(2, seed=9), [0, 1], names)
    upload(tmp_path, store)
    assert_same(open_source(f"{store}/set:train"), open_source(f"{tmp_path}/set:train"))
    assert_same(open_source(f"{store}/set/train-*.parquet"), open_source(f"{tmp_path}/set/train-*.parquet"))
    assert_same(open_source(f"{store}/set/test.parquet"), open_source(f"{tmp_path}/set/test.parquet"))
    assert open_source(f"{store}/set:train@classes=a").location == f"{store}/set:train@classes=a"
    with pytest.raises(SourceError, match="several splits"):
        open_source(f"{store}/set")


def test_row_groups_are_read_rather_than_files(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_parquet(tmp_path / "x.parquet", pixels(40, side=64), row_group=2)
    write_bytes(f"{bucket}/x.parquet", file.read_bytes())
    received = record_ranges(monkeypatch)
    source = open_source(f"{bucket}/x.parquet")
    opened = sum(received)
    assert source[17].shape == (1, 64, 64)
    assert sum(received) - opened < file.stat().st_size / 5 + 2**16, "two images, and the end of the file"


def test_lists_of_paths_and_urls(folder: Path, store: str, tmp_path: Path) -> None:
    upload(folder, store)
    text = "path,label,group\ncat/1.png,c,g1\n./dog/ü.png,d,g2\n"
    write_bytes(f"{store}/list.csv", text.encode())
    (folder / "list.csv").write_text(text, encoding="utf-8")
    assert_same(open_source(f"{store}/list.csv"), open_source(folder / "list.csv"))
    (folder / "list.csv").unlink()
    write_bytes(f"{store}/lists/list.tsv", b"file_name\tlabel\n..\\cat\\1.png\tc\n../dog/2@2x.png\td\n")
    assert len(open_source(f"{store}/lists/list.tsv").content_hashes()) == 2
    write_bytes(f"{store}/list.txt", b"cat/1.png 0\ndog/2@2x.png 1\n")
    assert open_source(f"{store}/list.txt").labels == (0, 1)
    for list_file in (str(tmp_path / "urls.csv"), f"{store}/urls.csv"):
        write_bytes(list_file, f"path\n{store}/cat/1.png\n{store}/dog/2@2x.png\n{store}/missing.png\n".encode())
        source = open_source(list_file, policy="nan")
        assert source.keys[0] == f"{store}/cat/1.png"
        assert source[0].shape == (1, 8, 8)
        with pytest.raises(UnreadableImageError, match="no such file"):
            source[2]
    both = [f"{store}/cat/1.png", str(folder / "cat" / "1.png")]
    assert len(set(open_source(both).content_hashes())) == 1, "a list in Python"


def test_a_table_of_metadata_labels_a_prefix(store: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "set", pixels(3), ["a.png", "b.png", "c.png"])
    (tmp_path / "set" / "metadata.csv").write_text("file_name,label\na.png,x\nb.png,y\n")
    assert_same(open_quietly(upload(tmp_path / "set", store)), open_quietly(tmp_path / "set"))


def test_files_of_arrays(store: str, tmp_path: Path) -> None:
    images = pixels(6).numpy()[:, 0]
    np.save(tmp_path / "x.npy", images)
    np.savez_compressed(tmp_path / "x.npz", train_images=images, train_labels=[0, 1] * 3, test_images=images[:2])
    upload(tmp_path, store)
    for name in ("x.npy", "x.npz:train", "x.npz@array=test_images"):
        assert_same(open_source(f"{store}/{name}"), open_source(f"{tmp_path}/{name}"))
    with pytest.raises(SourceError, match="--max-bytes"):
        open_source(f"{store}/x.npz:train", reading=ReadSettings(max_bytes=300))


@pytest.mark.parametrize("suffix", ["tar", "zip"])
def test_archives_and_shards(store: str, tmp_path: Path, suffix: str) -> None:
    for number in range(3):
        members = {}
        for sample in range(4):
            members[f"{number}-{sample}.png"] = encode(picture(pixels(1, seed=number * 4 + sample)[0]), "PNG")
            members[f"{number}-{sample}.cls"] = str(sample % 2).encode()
        path = tmp_path / f"shard-{number:03}.{suffix}"
        if suffix == "zip":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, data in members.items():
                    archive.writestr(name, data)
        else:
            with tarfile.open(path, "w") as archive:
                for name, data in members.items():
                    (tmp_path / name).write_bytes(data)
                    archive.add(tmp_path / name, name)
                    (tmp_path / name).unlink()
    upload(tmp_path, store)
    for pattern in (f"shard-001.{suffix}", f"shard-{{000..002}}.{suffix}", f"*.{suffix}", ""):
        assert_same(open_source(f"{store}/{pattern}"), open_source(f"{tmp_path}/{pattern}"))
    with pytest.raises(SourceError, match=r"shard-003.* does not exist"):
        open_source(f"{store}/shard-{{000..003}}.{suffix}")


def test_a_listing_reads_in_another_process(folder: Path, bucket: str) -> None:
    """It pickles without connections, and the whole source without the images of others."""
    source = open_quietly(upload(folder, bucket))
    copy = pickle.loads(pickle.dumps(source.subset([0, 1])))  # noqa: S301
    assert copy.content_hashes() == source.subset([0, 1]).content_hashes()


def test_sizes_are_limited_before_reading(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(f"{store}/large.png", b"x" * 1000)
    source = open_source(store, policy="nan", reading=ReadSettings(max_bytes=999))
    monkeypatch.setattr(RemotePath, "_call", lambda *_: pytest.fail("a request"))
    with pytest.raises(UnreadableImageError, match=r"more than 999 bytes \(--max-bytes\)"):
        source[0]


def test_results_of_farout_on_a_store_are_images_or_left_out(store: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "images", pixels(2), ["1.png", "2.png"])
    upload(tmp_path, f"{store}/generated")
    write_bytes(f"{store}/x.png", (tmp_path / "images" / "1.png").read_bytes())
    write_json(f"{store}/generated/config.json", {"farout": {"kind": "images", "format": 2}})
    write_bytes(f"{store}/generated/figure.png", b"x")
    assert open_source(f"{store}/generated").keys == ("1.png", "2.png")
    with pytest.warns(LeftOutWarning, match=r"4 in generated \(written by farout\)"):
        assert open_source(store).keys == ("x.png",)


def test_what_does_not_exist_is_an_error(store: str, s3_server: str) -> None:
    with pytest.raises(SourceError, match=r"there is no file .*, and no file below it"):
        open_source(f"{store}/missing")
    with pytest.raises(SourceError, match=r"the glob .*\*\.png matches nothing"):
        open_source(f"{store}/missing/*.png")
    with pytest.raises(SourceError, match="there is no file s3://no-such-bucket-here"):
        open_source("s3://no-such-bucket-here/x")
    with pytest.raises(SourceError, match="wildcard in the name of the bucket"):
        open_source("s3://bucket*/x.png")
    write_bytes(f"{store}/text.bin", b"x")
    with pytest.raises(SourceError, match=r"is not an image source; expected .*\.parquet"):
        open_source(f"{store}/text.bin")
    with pytest.raises(SourceError, match=r"contains no images; it contains 1 \.bin"):
        open_source(store)


def test_a_file_url_is_a_path(folder: Path) -> None:
    assert_same(open_quietly(folder.as_uri(), policy="nan"), open_quietly(folder, policy="nan"))
    assert open_quietly(f"file://{folder}@classes=cat").location == open_quietly(f"{folder}@classes=cat").location


def test_urls_are_split_into_location_split_and_modifiers() -> None:
    def parts(text: str) -> tuple[str, str, str]:
        spec = parse_spec(text)
        assert spec.kind == "url"
        return spec.location, spec.split, spec.modifiers

    assert parts("s3://b/p") == ("s3://b/p", "", "")
    assert parts("s3://b/p:test@vflip") == ("s3://b/p", "test", "vflip")
    assert parts("s3://b/a@2x.png@noise=0.1,classes=0-3") == ("s3://b/a@2x.png", "", "noise=0.1,classes=0-3")
    assert parts("s3://b/p@column=image/encoded") == ("s3://b/p", "", "column=image/encoded")
    assert parts("https://h:8080/x.npz:test@label=y") == ("https://h:8080/x.npz", "test", "label=y")
    assert parts("s3://b/2024-01-01T10:00:00") == ("s3://b/2024-01-01T10:00:00", "", "")
    assert parse_spec("S3://b/p/@vflip").canonical == "s3://b/p@vflip"
    with pytest.raises(SourceError, match="unknown modifier 'vflipp'"):
        parse_spec("s3://b/p@vflipp")
    with pytest.raises(SourceError, match="chain of file systems"):
        parse_spec("simplecache::s3://b/p")
    with pytest.raises(SourceError, match="drops a slash"):
        open_source(Path("s3://b/p"))


def test_secrets_are_refused_and_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path\nhttps://host/x.png?X-Amz-Signature=hunter2\n")
    for source in (
        "s3://id:hunter2@bucket/x",
        "https://host/x.png?sig=hunter2@vflip",
        tmp_path / "list.csv",
        ["https://host/x.png?token=hunter2"],
    ):
        with pytest.raises(FaroutError, match="leave it out") as error:
            open_source(source)
        assert "hunter2" not in str(error.value)


def test_a_list_on_a_store_names_no_file_of_this_machine(folder: Path, store: str) -> None:
    for cell in (f"file://{folder}/cat/1.png", f"{folder}/cat/1.png", "../../../../../x.png"):
        write_bytes(f"{store}/list.csv", f"path\n{cell}\n".encode())
        with pytest.raises(SourceError, match=r"a list in .* (names|contains)"):
            open_source(f"{store}/list.csv")


class UnreliableFileSystem(MemoryFileSystem):
    """A store that loses the connection for the paths of `fails_for`."""

    protocol = "unreliable"
    fails_for = ""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("unreliable://", "memory://"))

    def cat_file(self, path, *args, **options):
        if self.fails_for and self.fails_for in path:
            raise TimeoutError("the endpoint https://host/x?X-Amz-Signature=hunter2 does not answer")
        return super().cat_file(path, *args, **options)

    def find(self, path, *args, **options):
        if self.fails_for == "listing":
            raise TimeoutError("the endpoint does not answer")
        return super().find(path, *args, **options)


def test_a_failed_network_is_no_unreadable_image_without_a_reason(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("unreliable", UnreliableFileSystem, clobber=True)
    url = f"unreliable://{uuid.uuid4().hex}/p"
    upload(folder / "cat", f"{url}/cat")
    write_bytes(f"{url}/shards/x.parquet", write_parquet(tmp_path / "x.parquet", pixels(4), row_group=2).read_bytes())
    source, shards = open_source(f"{url}/cat", policy="nan"), open_source(f"{url}/shards", policy="nan")
    monkeypatch.setattr(UnreliableFileSystem, "fails_for", "1.png")
    with pytest.raises(UnreadableImageError, match=r"1\.png: network error: .* does not answer") as error:
        source[0]
    assert "hunter2" not in str(error.value)
    assert "network error" in source.unreadable["1.png"]
    assert source[1].shape == (1, 8, 8)
    monkeypatch.setattr(UnreliableFileSystem, "fails_for", "x.parquet")
    with pytest.raises(UnreadableImageError, match=r"0: .*network error"):
        shards[0]
    monkeypatch.setattr(UnreliableFileSystem, "fails_for", "listing")
    with pytest.raises(SourceError, match="cannot be listed: network error"):
        open_source(f"{url}/cat")


def test_a_store_that_does_not_answer_any_more_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise all remaining images would be reported as unreadable, after a wait for each."""
    fsspec.register_implementation("unreliable", UnreliableFileSystem, clobber=True)
    write_folder(tmp_path, pixels(25), [f"{number:02}.png" for number in range(25)])
    source = open_source(upload(tmp_path, f"unreliable://{uuid.uuid4().hex}/p"), policy="nan")
    monkeypatch.setattr(UnreliableFileSystem, "fails_for", "/p/0")
    for index in range(9):
        with pytest.raises(UnreadableImageError, match="network error"):
            source[index]
    assert source[10].shape == (1, 8, 8), "it answers again"
    monkeypatch.setattr(UnreliableFileSystem, "fails_for", "/p/")
    with pytest.raises(UnreachableStoreError, match=r"did not answer 10 times in a row .*network error.*; run "):
        list(iterate_batches(source.subset(range(11, 25)), Preprocessing((8, 8), 1, (8, 8)), 4, workers=0))
    assert len(source.unreadable) == 9 + 9


class _Handler(http.server.SimpleHTTPRequestHandler):
    """A web server that serves ranges, and is unavailable for the first requests of some files."""

    refusals = 0

    def send_head(self):
        if "busy" in self.path and _Handler.refusals:
            _Handler.refusals -= 1
            self.send_error(503)
            return None
        if self.headers.get("Range") is None:
            self.extra = []
            return super().send_head()
        data = Path(self.translate_path(self.path)).read_bytes()
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)
        return None

    def end_headers(self):
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a web server for the folder `web`."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "web").mkdir()
    handler = functools.partial(_Handler, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setattr(_Handler, "refusals", 1)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_files_of_a_web_server(web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files.time, "sleep", lambda seconds: None)
    root = tmp_path / "web"
    write_folder(root, pixels(3), ["a.png", "busy.png", "c.png"])
    for number in range(2):
        write_parquet(root / f"x-{number}.parquet", pixels(4, seed=number), [0, 1, 0, 1], row_group=2)
    with zipfile.ZipFile(root / "x.zip", "w") as archive:
        archive.write(root / "a.png", "a.png")
    (root / "list.csv").write_text("path\na.png\nc.png\n")
    for name in ("a.png", "busy.png", "x-0.parquet", "x-{0..1}.parquet", "x.zip", "list.csv"):
        assert_same(open_source(f"{web}/{name}"), open_source(f"{root}/{name}"))
    assert open_source(f"{web}/a.png?download=1").keys == ("a.png",)
    source = open_source(f"{web}/a.png", policy="nan", reading=ReadSettings(max_bytes=20))
    with pytest.raises(UnreadableImageError, match="more than 20 bytes"):
        source[0]
    with pytest.raises(UnreadableImageError, match="no such file"):
        open_source(f"{web}/missing.png")[0]
    for name in ("busy.png", "busy.parquet"):
        monkeypatch.setattr(_Handler, "refusals", 100)
        with pytest.raises(FaroutError, match="network error: 503"):
            open_source(f"{web}/{name}")[0]
    with pytest.raises(UnreadableImageError, match="network error"):
        open_source("http://127.0.0.1:9/x.png")[0]
    with pytest.raises(SourceError, match="a web server has no folders"):
        open_source(f"{web}/folder")
