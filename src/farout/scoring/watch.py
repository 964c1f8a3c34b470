"""Scoring of image files as they arrive in a folder, into a table that only grows and survives any interruption."""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal

from farout.core import store
from farout.core.csv_files import format_rows
from farout.core.errors import DamagedFileWarning, FaroutError, LeftOutWarning, StoreError, UnreadableImageError
from farout.core.file_errors import read_errors, write_errors
from farout.core.files import lock_file, open_regular_file
from farout.core.interruption import defer_interruption
from farout.core.names import encode_file_name, expand_path, find_path
from farout.core.schema import Schema, check_content
from farout.data.file_names import count_by_suffix, is_image_name, join_counts, limit_descriptions
from farout.data.folder_scan import scan_folder
from farout.data.untrusted_files import read_bytes
from farout.scoring.scorer import Scorer

__all__ = ["FolderWatcher", "WatchedFolder", "is_watched", "read_watch_settings"]

logger = logging.getLogger(__name__)

_SETTINGS_FILE, _TABLE, _LOCK = "watch.json", "scores.csv", ".watch.lock"
_FIRST_COLUMNS = ("time", "key", "score", "p_value", "is_ood", "status", "reason")
_VERSION = "file_version"
"""Last column: which content of the file was scored, so that a restarted watcher knows it."""
_MAX_BATCH_BYTES = 2**28


class _WatchContent(Schema):
    """`watch.json`: what must not change while a table grows."""

    watch: Literal[1]
    detector: str
    alpha: float
    calibration_images: int
    folder: str
    reading: dict[str, str]
    runtime: dict[str, str]
    columns: list[str]


@dataclass(frozen=True)
class WatchedFolder:
    """What a watcher has written.

    Attributes:
        folder: the folder with `scores.csv`.
        counts: number of rows by status, of this and of earlier runs.
        flagged: number of rows with `is_ood`.
        scored_now: number of rows that this watcher has added.
    """

    folder: Path
    counts: dict[str, int]
    flagged: int
    scored_now: int


@dataclass(frozen=True)
class _FileVersion:
    """One content of a file: its size and modification time, and the hash that decides."""

    size: int
    modified_ns: int
    content: str

    def __str__(self) -> str:
        return f"{self.size}-{self.modified_ns}-{self.content}"

    @classmethod
    def parse(cls, text: str) -> _FileVersion:
        """Invert `str`; raises ValueError."""
        size, modified, content = text.rsplit("-", 2)
        return cls(int(size), int(modified), content)


_State = tuple[int, int, int]
"""Size, modification time in ns, and file number."""


@dataclass
class _WaitingFile:
    """A file that was seen in this state, and is scored once it stays in it."""

    state: _State
    since: float


class FolderWatcher:
    """Scores the image files of a folder and of its subfolders as they arrive.

    Every file becomes one row of `OUT/scores.csv`: the time in UTC, key, score, p_value, is_ood, status, reason, the
    indicators, and the version of the file. A file is read when its size and modification time have not changed for
    `settle` seconds, so that a file that is being written is not read by half. A file whose content is replaced is
    scored again, as a further row with the same key; one that is only touched is not. An unreadable file is a row with
    a reason.

    Rows are appended, flushed to disk, and never changed. A watcher that was killed continues where it was: a last line
    that was not written completely is removed, and its image is scored again. Two watchers cannot write one table.

    Args:
        scorer: scores the images.
        folder: the folder to watch.
        out: folder of the results.
        settle: seconds for which a file must not have changed.

    Raises:
        StoreError: `out` contains something else, or rows of another detector, folder or setting.
        FaroutError: `folder` is no folder, or another watcher writes to `out`.
    """

    def __init__(self, scorer: Scorer, folder: str | Path, out: str | Path, *, settle: float = 2.0) -> None:
        self.scorer, self.folder, self.out = scorer, find_path(folder), expand_path(out)
        if not self.folder.is_dir():
            raise FaroutError(f"{self.folder} is not a folder; --watch scores the files that arrive in a folder")
        if not settle >= 0:
            raise FaroutError(f"settle is {settle}; expected 0 seconds or more")
        self._settle = settle
        detector = scorer.detector
        self._columns = [*_FIRST_COLUMNS, *detector.calibration_scores, _VERSION]
        settings = {
            "watch": 1,
            "detector": detector.fingerprint,
            "alpha": detector.alpha,
            "calibration_images": len(detector.calibration),
            "folder": encode_file_name(os.path.abspath(self.folder)),
            "reading": scorer.reading.to_dict(),
            "runtime": {"device": detector.runtime.device.partition(":")[0], "precision": detector.precision},
            "columns": self._columns,
        }
        self._waiting: dict[str, _WaitingFile] = {}
        self._known: dict[str, _FileVersion] = {}
        self._left_out: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._flagged, self._scored_now = 0, 0
        self._lock: BinaryIO | None = None
        _open_folder(self.out, settings)
        self._lock = _open_locked(self.out / _LOCK)
        try:
            self._read_table()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> FolderWatcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another watcher write the table."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def result(self) -> WatchedFolder:
        """What has been written so far."""
        return WatchedFolder(self.out, dict(sorted(self._counts.items())), self._flagged, self._scored_now)

    def run(self, interval: float = 2.0, stop: threading.Event | None = None) -> WatchedFolder:
        """Look for new files every `interval` seconds, until `stop` is set or an interruption is raised."""
        if not interval > 0:
            raise FaroutError(f"interval is {interval}; expected more than 0 seconds")
        stop = stop or threading.Event()
        total = sum(self._counts.values())
        logger.info("watching %s every %g s; %s has %d images", self.folder, interval, self.out / _TABLE, total)
        while not stop.is_set():
            added = self.poll()
            if added:
                flagged = sum(row["is_ood"] is True for row in added)
                unreadable = sum(row["status"] == "unreadable" for row in added)
                others = f", {unreadable} unreadable" if unreadable else ""
                total = sum(self._counts.values())
                logger.info("%d new images (%d flagged%s), %d in %s", len(added), flagged, others, total, self.out)
            stop.wait(interval)
        return self.result

    def poll(self, now: float | None = None) -> list[dict[str, Any]]:
        """List the folder once, and score the files that have not changed for `settle` seconds.

        Args:
            now: the time of a monotonic clock, for tests.

        Returns:
            The rows that were added.
        """
        now = time.monotonic() if now is None else now
        scan = scan_folder(self.folder)
        self._warn_about_others(scan.left_out + count_by_suffix(path for path in scan.files if not is_image_name(path)))
        states: dict[str, _State | None] = dict.fromkeys(scan.problems)
        for path in scan.files:
            if is_image_name(path):
                try:
                    stat = os.stat(self.folder / path)
                except OSError:  # removed meanwhile
                    continue
                states[path] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
        self._waiting = {path: file for path, file in self._waiting.items() if path in states}
        ready = [path for path in sorted(states) if self._is_ready(path, states[path] or (0, 0, 0), now)]
        added = []
        for batch in self._read_batches(ready, scan.problems):
            added += self._score(batch)
        return added

    def _is_ready(self, path: str, state: _State, now: float) -> bool:
        """Whether a file is new or changed, and has been in this state for long enough."""
        known = self._known.get(encode_file_name(path))
        if known is not None and (known.size, known.modified_ns) == state[:2]:
            self._waiting.pop(path, None)
            return False
        file = self._waiting.get(path)
        if file is None or file.state != state:
            file = self._waiting[path] = _WaitingFile(state, now)
        return now - file.since >= self._settle

    def _read_batches(self, paths: Sequence[str], problems: dict[str, str]) -> Iterator[list[_ReadFile]]:
        """Read files; a batch has as many as the networks measure together, and a limited size."""
        batch: list[_ReadFile] = []
        size = 0
        for path in paths:
            file = self._read(path, problems.get(path))
            if file is None:
                continue
            batch.append(file)
            size += len(file.data or b"")
            if len(batch) >= self.scorer.detector.batch_size or size >= _MAX_BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _read(self, path: str, problem: str | None) -> _ReadFile | None:
        """Read a file; None if it was removed, is being changed, or has the content that was scored."""
        key, state = encode_file_name(path), self._waiting[path].state
        data, reason = None, problem or ""
        if problem is None:
            try:
                data = read_bytes(self.folder / path, self.scorer.reading.max_bytes)
            except UnreadableImageError as error:
                reason = str(error)
            try:
                stat = os.stat(self.folder / path)
            except OSError:
                logger.info("%s was removed before it was scored", key)
                return None
            if (stat.st_size, stat.st_mtime_ns, stat.st_ino) != state or (data is not None and len(data) != state[0]):
                return None  # it is being changed; the next listing shows its new state
        if data is None:  # it is read again at every look, because permissions are no part of its state
            version = _FileVersion(0, 0, _digest(reason.encode()))
        else:
            version = _FileVersion(state[0], state[1], _digest(data))
        known = self._known.get(key)
        if known is not None and known.content == version.content:  # it was only touched
            self._known[key] = version
            return None
        return _ReadFile(key, data, reason, version)

    def _score(self, files: Sequence[_ReadFile]) -> list[dict[str, Any]]:
        """Score files and append their rows."""
        readable = [file for file in files if file.data is not None]
        rows = {file.key: _unreadable_row(file, self._columns) for file in files}
        if readable:
            keys, images = [file.key for file in readable], [file.data for file in readable]
            table = self.scorer({"key": keys, "image": images})
            for index, file in enumerate(readable):
                row = {name: _to_cell(values[index]) for name, values in table.items()}
                rows[file.key] = {**rows[file.key], **row}
        time_text = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        added = [{**rows[file.key], "time": time_text} for file in files]
        with defer_interruption():
            self._append(added)
            for file, row in zip(files, added, strict=True):
                self._known[file.key] = file.version
                self._count(str(row["status"]), row["is_ood"] is True)
            self._scored_now += len(added)
        return added

    def _count(self, status: str, is_ood: bool) -> None:
        self._counts[status] += 1
        self._flagged += is_ood

    def _append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows and flush them to disk, before the next ones are scored."""
        path = self.out / _TABLE
        text = format_rows(self._columns, rows, header=False)
        with write_errors(path), path.open("ab") as file:
            end = file.tell()
            try:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:  # such as a full disk: the table ends with a complete line
                os.truncate(path, end)
                raise

    def _read_table(self) -> None:
        """Read what earlier watchers have written, and remove a last line that is incomplete."""
        path = self.out / _TABLE
        header = format_rows(self._columns, [], header=True)
        if not os.path.lexists(path):
            with store.atomic_file(path) as temporary:
                temporary.write_text(header, encoding="utf-8", newline="")
            return
        with read_errors(path), open_regular_file(path) as file:
            content = file.read()
        lines = content.splitlines(keepends=True)
        if not lines or lines[0] != header.encode():
            raise StoreError(f"{path} has other columns than this detector gives; give a new folder, or remove it")
        end = len(lines[0])
        damaged = 0
        for number, line in enumerate(lines[1:], start=2):
            row = _parse_line(line, self._columns)
            if row is None:
                damaged = damaged or number
                continue
            if damaged:
                raise StoreError(f"{path} is damaged in line {damaged}; repair or remove this line, or the whole table")
            self._known[row["key"]] = _FileVersion.parse(row[_VERSION])
            self._count(row["status"], row["is_ood"] == "True")
            end += len(line)
        if damaged:
            warnings.warn(
                f"{path} ends with an incomplete line, which is removed; its images are scored again",
                DamagedFileWarning,
                stacklevel=3,
            )
            with write_errors(path):
                os.truncate(path, end)

    def _warn_about_others(self, left_out: Counter[str]) -> None:
        """Warn of files that are no images, when there are more than before."""
        new = Counter({name: count for name, count in left_out.items() if count > self._left_out[name]})
        if new:
            counts = join_counts(limit_descriptions(new))
            warnings.warn(f"{self.folder}: not scored: {counts}", LeftOutWarning, stacklevel=3)
        self._left_out |= left_out


@dataclass(frozen=True)
class _ReadFile:
    """A file that is to be scored; without data it is unreadable for a reason."""

    key: str
    data: bytes | None
    reason: str
    version: _FileVersion = field(repr=False)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _unreadable_row(file: _ReadFile, columns: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(columns, "")
    return {**row, "key": file.key, "status": "unreadable", "reason": file.reason, _VERSION: str(file.version)}


def _to_cell(value: Any) -> Any:
    """A value of a scored table as `scores.csv` has it: empty where there is none."""
    value = getattr(value, "item", lambda: value)()
    return "" if value is None or value != value else value


def _parse_line(line: bytes, columns: Sequence[str]) -> dict[str, str] | None:
    """The cells of a line; None for a line that was not written completely."""
    if not line.endswith(b"\n") or b"\0" in line:
        return None
    try:
        cells = next(csv.reader(io.StringIO(line.decode(), newline=""), strict=True), [])
        row = dict(zip(columns, cells, strict=True))
        _FileVersion.parse(row[_VERSION])
    except (ValueError, csv.Error):
        return None
    return row


def is_watched(out: Path) -> bool:
    """Whether a folder has the rows of a watcher."""
    return os.path.lexists(out / _SETTINGS_FILE)


def read_watch_settings(out: Path) -> dict[str, Any]:
    """Read detector, folder and settings of the rows of a watcher; raises StoreError if they were changed."""
    settings = store.read_sealed_json(out / _SETTINGS_FILE)
    check_content(settings, _WatchContent, str(out / _SETTINGS_FILE))
    return settings


def _open_folder(out: Path, settings: dict[str, Any]) -> None:
    """Create the folder of the results, or continue in it."""
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out} is a file; give a folder for the results")
    path = out / _SETTINGS_FILE
    if not os.path.lexists(path):
        others = sorted(each.name for each in out.iterdir() if not each.name.startswith(".")) if out.is_dir() else []
        if others:
            raise StoreError(f"{out} is not empty ({', '.join(others[:3])}, …); give a new folder for the results")
        store.write_sealed_json(path, settings)
        return
    before = read_watch_settings(out)
    if before["detector"] != settings["detector"]:
        raise StoreError(f"{out} contains scores of another detector; give a new folder")
    changed = [
        f"{name}: {before[name]} before, {settings[name]} now" for name in settings if before[name] != settings[name]
    ]
    if changed:
        raise StoreError(f"{out} contains scores with other settings ({'; '.join(changed)}); give a new folder")


def _open_locked(path: Path) -> BinaryIO:
    """Open a file and lock it until it is closed; raises FaroutError if another process has locked it."""
    with write_errors(path):
        file = path.open("ab")
    is_locked = lock_file(file)
    if is_locked is None:
        logger.warning("the file system of %s has no locks; let only one process write to it", path.parent)
    elif not is_locked:
        file.close()
        raise FaroutError(f"another process writes to {path.parent}; stop it, or give another folder")
    return file
