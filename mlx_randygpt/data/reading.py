"""Reading: files become pieces of text, strictly decoded, with a few megabytes in memory.

This module handles encodings, line ends, compression and formats with many documents. Pieces are
cut between words, so that encoding the pieces gives the tokens of the whole text.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from mlx_randygpt.config import missing
from mlx_randygpt.data import DataError, recognition
from mlx_randygpt.data.files import kind
from mlx_randygpt.words import one_line

CHUNK_BYTES = 1 << 20
MAX_PIECE = 1 << 18  # characters
MAX_TRIES = 1000  # spaces to try when looking for a word boundary
MAX_NAMES = 20  # fields of a row, or files, that a message lists
MAX_NAME = 40  # characters of each
JSON_TYPES: dict[type, str] = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
}
Seen = Callable[[int], None]  # bytes of the file that were read since the last call


@dataclass(frozen=True)
class Reading:
    """Reading options for files that do not declare their own."""

    encoding: str = "utf-8"
    text_field: str = "text"  # of a row of .jsonl or .parquet

    def __post_init__(self) -> None:
        try:
            "".encode(
                self.encoding
            )  # unlike codecs.lookup, this rejects codecs of bytes such as zip
        except (LookupError, ValueError) as error:
            raise DataError(
                f"encoding={self.encoding!r} is unknown; try utf-8, utf-16, latin-1 or cp1252"
            ) from error


class Piece(NamedTuple):
    """A part of a document."""

    text: str
    begins: bool  # whether it is the first of its document
    ends: bool  # whether it is the last


def read_text(file: Path, reading: Reading | None = None) -> str:
    r"""Return the text of a file without byte order mark, with "\r\n" and "\r" as "\n".

    Raises DataError if the file cannot be read, is empty or binary, or is not in its encoding.
    """
    return "".join(piece.text for piece in pieces(file, reading))


def pieces(
    file: Path,
    reading: Reading | None = None,
    seen: Seen = lambda n: None,
    size: int = MAX_PIECE,
) -> Iterator[Piece]:
    """Yield the documents of a file in pieces of at most `size` characters.

    A file is one document, or one per row. Raises DataError like `read_text`.
    """
    reading, suffix, empty = reading or Reading(), kind(file), True
    documents: Iterator[Iterator[str]]
    if suffix in (".jsonl", ".ndjson"):
        documents = (iter([row]) for row in _json_rows(file, reading, seen))
    elif suffix == ".parquet":
        documents = (iter([row]) for row in _parquet_rows(file, reading, seen))
    else:
        documents = iter([_decode(file, reading.encoding, seen)])
    for document in documents:
        for piece in _cut(document, size):
            empty = False
            yield piece
    if empty:
        raise DataError(f"{file} is empty; put text into it or leave it out")


def _cut(parts: Iterator[str], size: int) -> Iterator[Piece]:
    """Yield one document in pieces; an empty document has none."""
    waiting, begins = "", True
    for part in parts:
        text, start = waiting + part, 0
        while len(text) - start > size:
            end = _find_cut(text, start, start + size)
            yield Piece(text[start:end], begins, False)
            start, begins = end, False
        waiting = text[start:]
    if waiting:
        yield Piece(waiting, begins, True)


def _find_cut(text: str, start: int, end: int) -> int:
    """Return the index at which to cut `text`, at most `end`.

    It is that of a space between two words, which the usual tokenizers attach to the following
    word; else that of other white space; else `end`.
    """
    at = end
    for _ in range(MAX_TRIES):
        at = text.rfind(" ", start + 1, at)
        if at < 0:
            break
        if text[at - 1].isalnum() and text[at + 1].isalnum():
            return at
    spaces = (i for i in range(end - 1, start, -1) if text[i].isspace())
    return next((i for i in spaces if not text[i - 1].isspace()), end)


def _decode(file: Path, encoding: str, seen: Seen) -> Iterator[str]:
    r"""Yield the decoded text of a file in chunks, with "\n" at the ends of lines."""
    inner = codecs.getincrementaldecoder(encoding)("strict")
    decoder = io.IncrementalNewlineDecoder(inner, translate=True)
    utf8 = codecs.lookup(encoding).name == "utf-8"
    offset, first = 0, True
    for chunk in _chunks(file, seen):
        if not offset:
            _refuse_other_formats(file, chunk, utf8)
        if utf8 and (nul := chunk.find(0)) >= 0:
            raise DataError(_describe_nul(file, chunk, offset, nul))
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            start = error.start if isinstance(error.object, bytes) else 0
            at = offset + len(chunk) - len(error.object) + start
            raise DataError(
                f"{file} is not {encoding.upper()} text: byte {error.object[start]:#04x} "
                f"{_locate(file, at)}; {_other_encoding(error.object[max(0, start - 4096) :])}"
            ) from error
        except UnicodeError as error:  # such as UTF-16 without a byte order mark
            raise DataError(f"{file} is not {encoding.upper()} text: {one_line(error)}") from error
        if not utf8 and "\0" in text:
            raise DataError(f"{file} is binary, not {encoding} text: it holds a NUL character")
        offset += len(chunk)
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        if text:
            yield text


def _refuse_other_formats(file: Path, head: bytes, utf8: bool) -> None:
    if found := recognition.recognise(head):
        raise DataError(f"{file} is {found.name}, not text; {found.advice}")
    if utf8 and (name := recognition.utf_by_mark(head)):
        raise DataError(f"{file} is {name.upper()}, not UTF-8; give --encoding {name}")


def _describe_nul(file: Path, chunk: bytes, offset: int, nul: int) -> str:
    """Return why a chunk with a NUL byte is not UTF-8 text."""
    zeros, others = chunk[nul % 2 :: 2], chunk[1 - nul % 2 :: 2]
    # In UTF-16 of mostly Latin letters, every other byte is zero.
    if zeros.count(0) > 0.8 * len(zeros) and others.count(0) < 0.2 * len(others):
        name = f"utf-16-{'be' if (offset + nul) % 2 == 0 else 'le'}"
        return f"{file} looks like {name}, not UTF-8; give --encoding {name}"
    return f"{file} is binary, not text: a NUL byte {_locate(file, offset + nul)}"


def _other_encoding(sample: bytes) -> str:
    if name := recognition.guess_encoding(sample):
        return f"it looks like {name}: give --encoding {name} if that is right"
    return "give its encoding with --encoding, such as cp1252"


def _chunks(file: Path, seen: Seen) -> Iterator[bytes]:
    """Yield the decompressed content in chunks, and b"" at its end."""
    unpack = {".gz": _gunzip, ".zst": _unzstd}.get(file.suffix.lower(), _unchanged)
    try:
        with open(file, "rb") as raw:
            done = 0
            for chunk in unpack(raw):
                seen(raw.tell() - done)
                done = raw.tell()
                yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file} is damaged or cut off: {error}") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    yield b""


def _unchanged(raw: IO[bytes]) -> Iterator[bytes]:
    while chunk := raw.read(CHUNK_BYTES):
        yield chunk


def _gunzip(raw: IO[bytes]) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=raw) as unpacked:
        while chunk := unpacked.read(CHUNK_BYTES):
            yield chunk


def _unzstd(raw: IO[bytes]) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise missing("a .zst file", "zstandard", "zst") from error
    unpacker = zstandard.ZstdDecompressor()
    frame = unpacker.decompressobj()
    try:
        while packed := raw.read(CHUNK_BYTES >> 8):  # a small part can decompress to a large one
            while packed:
                frame = unpacker.decompressobj() if frame.eof else frame
                if chunk := frame.decompress(packed):
                    yield chunk
                packed = frame.unused_data
    except zstandard.ZstdError as error:
        raise EOFError(error) from error
    if not frame.eof:
        raise EOFError("it ends inside a frame")


def _json_rows(file: Path, reading: Reading, seen: Seen) -> Iterator[str]:
    """Yield the text of each line, which must be a JSON object."""
    for number, line in enumerate(_lines(_decode(file, reading.encoding, seen)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}: line {number} is not JSON: {error}") from error
        yield _row_text(row, reading.text_field, f"{file}: line {number}")


def _row_text(row: Any, field: str, place: str) -> str:
    """Return the text of a row; raise DataError with the reason if it has none."""
    if not isinstance(row, dict):
        raise DataError(
            f"{place} is {JSON_TYPES[type(row)]}, not an object such as {{{json.dumps(field)}: …}}"
        )
    if field not in row:
        names = f"it has {_list_names(row)}" if row else "it is empty"
        raise DataError(
            f"{place} has no text under {field!r}; {names}; choose another with --text-field"
        )
    return _text_of(row[field], field, place)


def _text_of(value: Any, field: str, place: str) -> str:
    if not isinstance(value, str):
        kind = JSON_TYPES.get(type(value), type(value).__name__)
        raise DataError(
            f"{place} has {kind} under {field!r}, not a text; remove the row or choose another "
            "field with --text-field"
        )
    return _with_newlines(value)


def _list_names(names: Collection[str]) -> str:
    shown = [one_line(name)[:MAX_NAME] for name in islice(names, MAX_NAMES)]
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(shown) + more


def _lines(parts: Iterator[str]) -> Iterator[str]:
    waiting: list[str] = []
    for part in parts:
        head, *rest = part.split("\n")
        waiting.append(head)
        for line in rest:
            yield "".join(waiting)
            waiting = [line]
    yield "".join(waiting)


def _parquet_rows(file: Path, reading: Reading, seen: Seen) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing(str(file), "pyarrow", "parquet") from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if reading.text_field not in names:
                raise DataError(
                    f"{file} has no column {reading.text_field!r}; it has {_list_names(names)}; "
                    "choose another with --text-field"
                )
            n_rows, size = max(1, table.metadata.num_rows), file.stat().st_size
            rows = count(1)
            for batch in table.iter_batches(256, columns=[reading.text_field]):
                seen(size * batch.num_rows // n_rows)
                for value in batch.column(0).to_pylist():
                    yield _text_of(value, reading.text_field, f"{file}: row {next(rows)}")
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} is not a parquet file: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error


def _with_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _locate(file: Path, offset: int) -> str:
    """Return the offset and line of a byte; counting lines reads the file again up to it."""
    lines = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("latin-1")(), translate=True)
    n_lines, n_left = 1, offset
    for chunk in _chunks(file, lambda n: None):
        n_lines += lines.decode(chunk[:n_left], final=len(chunk) >= n_left).count("\n")
        n_left -= len(chunk)
        if n_left <= 0:
            break
    return f"at offset {offset} (line {n_lines})"


def all_pieces(
    files: Sequence[Path], reading: Reading, seen: Seen = lambda n: None
) -> Iterator[tuple[int, Piece]]:
    """Yield the number of each file and its pieces; DataError names all that cannot be read."""
    for i, file in enumerate(files):
        try:
            for piece in pieces(file, reading, seen):
                yield i, piece
        except DataError as error:
            raise explain_all(error, files[i + 1 :], reading) from error


def explain_all(first: DataError, rest: Sequence[Path], reading: Reading) -> DataError:
    """Return one error about a file and about all later files that cannot be read either."""
    errors = [str(first)]
    for file in rest:
        try:
            for _ in pieces(file, reading):
                pass
        except DataError as error:
            errors.append(str(error))
    if len(errors) == 1:
        return first
    more = f"; and {len(errors) - MAX_NAMES} more" if len(errors) > MAX_NAMES else ""
    return DataError(f"{len(errors)} files cannot be read: {'; '.join(errors[:MAX_NAMES])}{more}")
