"""Recognition: what a file that is not the expected text looks like, for the advice in an error.

Nothing is read differently because of it.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_SAMPLE = 1 << 14  # bytes that decide about an encoding
MARGIN = 0.05  # of coherence, within which a common encoding is preferred
COMMON = ("cp1252", "cp932", "shift_jis", "gb18030", "gb2312", "big5", "euc_jp", "euc_kr")


class Format(NamedTuple):
    """A file format that is not plain text."""

    magic: bytes  # how its files begin
    name: str
    advice: str


FORMATS = (
    Format(
        b"version https://git-lfs.github.com/", "a pointer of Git LFS", "get it by git lfs pull"
    ),
    Format(b"%PDF-", "a PDF", "extract its text, e.g. with pdftotext"),
    Format(b"{\\rtf", "an RTF document", "save it as plain text"),
    Format(b"\xd0\xcf\x11\xe0", "an old Office document", "save it as plain text"),
    Format(b"PK\x03\x04", "a zip archive", "unpack it"),
    Format(b"\x1f\x8b", "packed by gzip", "let its name end in .gz"),
    Format(b"\x28\xb5\x2f\xfd", "packed by zstd", "let its name end in .zst"),
    Format(b"BZh", "packed by bzip2", "unpack it with bunzip2"),
    Format(b"\xfd7zXZ\0", "packed by xz", "unpack it with unxz"),
    Format(b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    Format(b"Rar!\x1a\x07", "a RAR archive", "unpack it"),
    Format(b"PAR1", "a parquet file", "let its name end in .parquet"),
    Format(b"SQLite format 3\0", "an SQLite database", "export its text"),
    Format(b"\x89PNG\r\n", "a PNG image", "leave it out"),
    Format(b"\xff\xd8\xff", "a JPEG image", "leave it out"),
    Format(b"GIF8", "a GIF image", "leave it out"),
    Format(b"\x7fELF", "a program", "leave it out"),
)
ZIPPED = {  # what a zip archive holds, by a name near its beginning
    b"word/": "a Word document",
    b"opendocument.text": "an OpenDocument text",
    b"application/epub": "an EPUB book",
    b"xl/": "an Excel workbook",
    b"ppt/": "a PowerPoint presentation",
}


def recognise(head: bytes) -> Format | None:
    """Return the format of a file that begins with these bytes, or None."""
    found = next((form for form in FORMATS if head.startswith(form.magic)), None)
    if found is not None and found.magic.startswith(b"PK"):
        for mark, name in ZIPPED.items():
            if mark in head[:8192]:
                return Format(found.magic, name, "save it as plain text")
    return found


def utf_by_mark(head: bytes) -> str:
    """Return utf-16 or utf-32 if the bytes begin with its byte order mark, else ""."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    return "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else ""


def guess_encoding(sample: bytes) -> str:
    """Return the encoding that bytes of text are probably in, or "" if there is no good guess."""
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        return ""
    guesses = from_bytes(sample[:MAX_SAMPLE])
    best = guesses.best()
    if best is None or best.encoding in ("utf_8", "ascii"):
        return ""
    good = [g for g in guesses if g.chaos <= best.chaos and g.coherence > best.coherence - MARGIN]
    fits = {name for guess in good for name in (guess.encoding, *guess.could_be_from_charset)}
    return next((name for name in COMMON if name in fits), best.encoding)
