"""Names of files, keys and classes as text: reversible encoding for tables, safe printing, paths given by users.

A file name is any sequence of bytes without NUL and `/`. Python represents bytes that are not UTF-8 as surrogates,
which no text file and no parquet column can hold; control characters tear tables and steer terminals; some first
characters make a spreadsheet evaluate a cell. `encode_key` replaces only these, so that usual names stay as they are.
"""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from farout.core.errors import FaroutError

__all__ = [
    "decode_file_name",
    "decode_key",
    "encode_cell",
    "encode_file_name",
    "encode_key",
    "encode_name",
    "encode_name_once",
    "encode_source",
    "expand_path",
    "find_equivalent_name",
    "find_equivalent_path",
    "find_path",
    "is_utf8",
    "normalize_name",
    "printable",
]

_CONTROLS = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff"
"""C0, DEL and C1; line and paragraph separators; all bidirectional controls; the byte-order mark."""
_UNSAFE = (
    f"[\ud800-\udfff{_CONTROLS}]+"  # a run, because its bytes decide together how it is decoded
    "|(?:(?<=^)|(?<=;)|(?<=^ )|(?<=; ))[=+@\uff0b\uff1d\uff20\uff0d-]"  # spreadsheets may take `;` for a separator
)
_UNSAFE_IN_CELL = re.compile(_UNSAFE)
_UNSAFE_IN_KEY = re.compile(_UNSAFE + "|%(?=[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4})")
_ESCAPE = re.compile("((?:%[0-9A-Fa-f]{2})+)|%u([0-9A-Fa-f]{4})")
_UNDECODED = re.compile("[\udc80-\udcff]+")
_INVISIBLE = re.compile(f"[\ud800-\udfff{_CONTROLS}]")


def encode_key(text: str) -> str:
    """Percent-encode what tables, terminals and spreadsheets cannot hold as it is; `decode_key` is the inverse.

    Encoded as `%XX` per byte of UTF-8: bytes that are not UTF-8, control characters, line separators, bidirectional
    controls, a `%` that begins what looks like such a code, and a first character that makes a spreadsheet evaluate the
    cell (`=`, `+`, `-`, `@`). Surrogates that no file name contains on POSIX become `%uXXXX`. Every other text is
    returned unchanged, and the result is always valid Unicode on one line.
    """
    return _UNSAFE_IN_KEY.sub(lambda match: _encode_run(match[0]), text)


def _encode_run(run: str) -> str:
    data = run.encode("utf-8", "surrogatepass")
    try:
        data = run.encode("utf-8", "surrogateescape")
        reversible = data.decode("utf-8", "surrogateescape") == run
    except UnicodeEncodeError:  # a surrogate that encodes no byte
        reversible = False
    if reversible:
        return "".join(f"%{byte:02X}" for byte in data)
    if len(run) == 1:
        return f"%u{ord(run):04X}"
    # bytes that would be read as another character together, such as an escaped C3 A9 for an e with acute accent
    return "".join(f"%u{ord(sign):04X}" if "\ud800" <= sign <= "\udfff" else _encode_run(sign) for sign in run)


def encode_cell(text: str) -> str:
    """Percent-encode like `encode_key`, but for `%`: keys and other encoded texts stay as they are."""
    return _UNSAFE_IN_CELL.sub(lambda match: _encode_run(match[0]), text)


def decode_key(key: str) -> str:
    """Return the text that `encode_key` encoded as this key."""
    return _ESCAPE.sub(_decode_match, key)


def _decode_match(match: re.Match[str]) -> str:
    if match[2] is not None:
        return chr(int(match[2], 16))
    return bytes.fromhex(match[1].replace("%", "")).decode("utf-8", "surrogateescape")


def encode_file_name(name: str) -> str:
    """Encode the name or path of a file as a key, which is the same in every locale.

    Python decodes file names by the locale: under `LC_ALL=POSIX` without its UTF-8 mode, all non-ASCII bytes become
    surrogates. Here they are always read as UTF-8.
    """
    return encode_key(_decode_as_utf8(name))


def decode_file_name(key: str) -> str:
    """Return the file name that `encode_file_name` encoded as this key."""
    return _encode_for_file_system(decode_key(key))


def encode_name(text: str) -> str:
    """Encode the name of a class, group or source like a key, in Unicode normalization form C."""
    return encode_key(normalize_name(_decode_as_utf8(text)))


def encode_name_once(text: str) -> str:
    """Encode a name like `encode_name`, unless it already is encoded, as a name copied from a table of results."""
    return text if encode_name(decode_key(text)) == text else encode_name(text)


def encode_source(text: str) -> str:
    """Encode a source string, whose names may be given as they are or encoded: codes in it stay as they are."""
    return encode_cell(normalize_name(_decode_as_utf8(text)))


def _decode_as_utf8(text: str) -> str:
    if sys.getfilesystemencoding() == "utf-8":
        return text
    try:
        return os.fsencode(text).decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # not from the file system or the command line
        return text


def _encode_for_file_system(text: str) -> str:
    if sys.getfilesystemencoding() == "utf-8":
        return text
    try:
        return os.fsdecode(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return text


def is_utf8(path: str | Path) -> bool:
    """Return whether the bytes of a path are UTF-8; some libraries in C++ and Rust open no other paths."""
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeError:
        return False
    return True


def printable(text: object, *, multiline: bool = False) -> str:
    r"""Text for terminals and logs: control characters, bidirectional controls and undecodable bytes as `\x1b`.

    Args:
        text: a text, a path, or any object.
        multiline: keep line feeds and tabs, for messages of several lines.
    """

    def escape(match: re.Match[str]) -> str:
        sign = match[0]
        if multiline and sign in "\n\t":
            return sign
        return f"\\x{ord(sign):02x}" if sign < "\u0100" else f"\\u{ord(sign):04x}"

    decoded = _UNDECODED.sub(
        lambda run: run[0].encode("ascii", "surrogateescape").decode("utf-8", "backslashreplace"), str(text)
    )
    return _INVISIBLE.sub(escape, decoded)


def expand_path(path: str | Path) -> Path:
    """Return a path given by a user, with `~` and `~user` expanded.

    The result never begins with `~`, so that a second expansion changes nothing: a file with the name `~x`
    (there is no such user, or it is given as `./~x`) is returned as an absolute path.

    Raises:
        FaroutError: the path begins with `~/` and there is no home folder.
    """
    text = os.fspath(path)
    try:
        os.fsencode(text)
    except UnicodeEncodeError:  # from a file in UTF-8, in a locale with another encoding
        text = _encode_for_file_system(text)
    if not Path(text).parts or not Path(text).parts[0].startswith("~"):
        return Path(text)
    if not text.startswith("~"):  # ./~/x
        return Path(os.getcwd(), text)
    expanded = os.path.expanduser(text)
    of_this_user = Path(text).parts[0] == "~"
    if of_this_user and (expanded.startswith("~") or os.environ.get("HOME") == ""):
        raise FaroutError(f"{text}: there is no home folder to replace ~ by; set HOME, or give the whole path")
    return Path(os.getcwd(), text) if expanded.startswith("~") else Path(expanded)


def normalize_name(text: str) -> str:
    """Return the text in Unicode normalization form C, in which names are compared.

    The same name may be stored with composed or decomposed accents; systems and archives differ.
    """
    return unicodedata.normalize("NFC", text)


def find_equivalent_name(name: str, known: Iterable[str]) -> str | None:
    """Return the one known name that is equal or differs only in its Unicode normalization form; None otherwise."""
    names = list(known)
    if name in names:
        return name
    encoded = encode_name(name)
    equivalent = [other for other in names if encode_name(other) == encoded]
    return equivalent[0] if len(equivalent) == 1 else None


def find_equivalent_path(path: Path) -> Path:
    """Return the path with each name replaced by the existing one that differs only in Unicode normalization form.

    Names that exist stay, and so do those that no name or several names of their folder match.
    """
    if os.path.lexists(path) or path.parent == path:
        return path
    parent = find_equivalent_path(path.parent)
    try:
        name = find_equivalent_name(path.name, os.listdir(parent))
    except (OSError, ValueError):
        name = None
    return parent / (name or path.name)


def find_path(text: str | Path) -> Path:
    """Return the path of an input given by a user: as it is, in the other normalization form, or encoded by farout.

    The result is that of `expand_path` if nothing exists under any of these names.

    Raises:
        FaroutError: the path begins with `~/` and there is no home folder.
    """
    path = find_equivalent_path(expand_path(text))
    if not os.path.lexists(path) and decode_key(str(text)) != str(text):
        decoded = find_equivalent_path(expand_path(decode_file_name(str(text))))
        if os.path.lexists(decoded):
            return decoded
    return path
