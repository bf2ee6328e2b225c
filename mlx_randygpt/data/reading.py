"""Reading: files become pieces of text, strictly decoded, with a few megabytes in memory.

This module handles encodings, line ends, compression and formats with many documents. Pieces are
cut between words, so that encoding the pieces gives the tokens of the whole text. A turn of a
conversation is one piece.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from mlx_randygpt.config import missing
from mlx_randygpt.data import DataError, chats, recognition, rows
from mlx_randygpt.data.files import kind
from mlx_randygpt.data.rows import JSON_TYPES, RowError
from mlx_randygpt.dialogue import Turn
from mlx_randygpt.words import one_line

CHUNK_BYTES = 1 << 20
MAX_PIECE = 1 << 18  # characters
MAX_TRIES = 1000  # spaces to try when looking for a word boundary
MAX_NAMES = 20  # fields of a row, or files, that a message lists
MAX_NAME = 40  # characters of each
Seen = Callable[[int], None]  # bytes of the file that were read since the last call
Skipped = Callable[[str], None]  # the problem of a row that is left out
Document = Iterator[str] | list[Turn]  # a text in parts, or a conversation
CHAT_FILES = (".txt", ".md", ".markdown")  # that can hold an exported chat
ARRAY = re.compile(r"\s*\[\s*\{")  # how a JSON array of rows begins


@dataclass(frozen=True)
class Reading:
    """Reading options for files that do not declare their own."""

    encoding: str = "utf-8"
    text_field: str = "text"  # of a row of .jsonl or .parquet
    me: str = ""  # whose messages of a chat are the assistant's
    as_text: bool = False  # whether conversations and chats are read as texts
    skip_bad_rows: bool = False

    def __post_init__(self) -> None:
        try:
            "".encode(
                self.encoding
            )  # unlike codecs.lookup, this rejects codecs of bytes such as zip
        except (LookupError, ValueError) as error:
            raise DataError(
                f"encoding={self.encoding!r} is unknown; try utf-8, utf-16, latin-1 or cp1252"
            ) from error

    @property
    def key(self) -> dict[str, Any]:
        """Return everything that decides what is read; options of conversations only if given."""
        return {
            name: value
            for name, value in asdict(self).items()
            if value or name in ("encoding", "text_field")
        }


class Piece(NamedTuple):
    """A part of a document."""

    text: str
    begins: bool  # whether it is the first of its document
    ends: bool  # whether it is the last
    role: str = ""  # of a turn; a conversation is a document

    @property
    def identity(self) -> bytes:
        """Return what tells it apart from other pieces: its text, and who says it."""
        mark = f"<|{self.role}|>" if self.role else ""
        return (mark + self.text).encode("utf-8", "surrogatepass")


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
    skipped: Skipped = lambda problem: None,
) -> Iterator[Piece]:
    """Yield the documents of a file in pieces of at most `size` characters, or in turns.

    A file is one document, or one per row or conversation. Raises DataError like `read_text`.
    """
    empty, first_skipped = True, ""

    def skip(problem: str) -> None:
        nonlocal first_skipped
        first_skipped = first_skipped or problem
        skipped(problem)

    for document in _documents(file, reading or Reading(), seen, skip):
        for piece in _turns(document) if isinstance(document, list) else _cut(document, size):
            empty = False
            yield piece
    if empty and first_skipped:
        raise DataError(f"{file} has no valid row; the first that is invalid: {first_skipped}")
    if empty:
        raise DataError(f"{file} is empty; put text into it or leave it out")


def holds_conversations(file: Path, reading: Reading) -> bool:
    """Return whether a file is read as conversations; False if it cannot be read."""
    try:
        return next(pieces(file, reading), Piece("", True, True)).role != ""
    except DataError:
        return False


def _documents(file: Path, reading: Reading, seen: Seen, skipped: Skipped) -> Iterator[Document]:
    suffix = kind(file)
    if suffix == ".parquet":
        yield from _parquet_rows(file, reading, seen, skipped)
        return
    parts = _decode(file, reading.encoding, seen)
    if suffix in (".jsonl", ".ndjson"):
        places = enumerate(_lines(parts), start=1)
        lines = ((f"{file}: line {i}", line) for i, line in places if line.strip())
        yield from _rows(((place, _parse(line, place)) for place, line in lines), reading, skipped)
        return
    head = next(parts, "")
    parts = chain([head], parts)
    if reading.as_text:
        yield parts
    elif suffix == ".json" and ARRAY.match(head):
        yield from _json_array(file, "".join(parts), reading, skipped)
    elif suffix in CHAT_FILES and chats.is_whatsapp(head):
        messages = chats.whatsapp_messages(_lines(parts))
        yield from chats.conversations(messages, reading.me, str(file))
    elif suffix in CHAT_FILES and chats.is_markdown_chat(head, reading.me):
        messages = chats.markdown_messages(_lines(parts))
        yield from chats.conversations(messages, reading.me, str(file))
    else:
        yield parts


def _turns(turns: list[Turn]) -> Iterator[Piece]:
    for i, turn in enumerate(turns):
        yield Piece(turn.text, i == 0, i == len(turns) - 1, turn.role)


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


Row = Callable[[], Any]  # returns the value of a row, or raises RowError


def _parse(line: str, place: str) -> Row:
    def parse() -> Any:
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RowError(f"{place} is not JSON: {error}") from error

    return parse


def _json_array(file: Path, content: str, reading: Reading, skipped: Skipped) -> Iterator[Document]:
    """Yield the conversations of a JSON array of rows; an array of anything else is a text."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        values = []
    first = values[0] if values and isinstance(values[0], dict) else {}
    if reading.text_field in first or not rows.has_conversation(first):
        yield iter([content])
        return
    places = ((f"{file}: item {i}", value) for i, value in enumerate(values, start=1))
    yield from _rows(((place, _just(value)) for place, value in places), reading, skipped)


def _rows(
    found: Iterator[tuple[str, Row]], reading: Reading, skipped: Skipped
) -> Iterator[Document]:
    """Yield the document of each row, with its place; those of a file are of one kind."""
    is_text: bool | None = reading.as_text or None
    for place, read in found:
        try:
            row = read()
            if is_text is None and isinstance(row, dict):
                is_text = reading.text_field in row or not rows.has_conversation(row)
            document = _document(row, reading.text_field, place, is_text)
        except RowError as error:
            if not reading.skip_bad_rows:
                raise
            skipped(str(error))
        else:
            yield document


def _document(row: Any, field: str, place: str, is_text: bool | None) -> Document:
    """Return the text or the conversation of a row; raise RowError with the reason if it has none.

    `is_text` is None as long as no row of the file was an object.
    """
    if not isinstance(row, dict):
        wanted = json.dumps(field) if is_text is not False else '"messages"'
        raise RowError(f"{place} is {JSON_TYPES[type(row)]}, not an object such as {{{wanted}: …}}")
    if is_text is False:
        if not rows.has_conversation(row):
            raise RowError(f"{place} has no conversation, as rows before it have; {_has(row)}")
        return rows.conversation(row, place)
    if field not in row:
        hint = "; conversations and texts need files of their own" * rows.has_conversation(row)
        raise RowError(
            f"{place} has no text under {field!r}; {_has(row)}; choose another with --text-field"
            f"{hint}"
        )
    return iter([_text_of(row[field], field, place)])


def _has(row: Mapping[str, Any]) -> str:
    return f"it has {_list_names(row)}" if row else "it is empty"


def _text_of(value: Any, field: str, place: str) -> str:
    if not isinstance(value, str):
        kind = JSON_TYPES.get(type(value), type(value).__name__)
        raise RowError(
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


def _parquet_rows(file: Path, reading: Reading, seen: Seen, skipped: Skipped) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing(str(file), "pyarrow", "parquet") from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            columns = _columns(file, names, reading)
            n_rows, size = max(1, table.metadata.num_rows), file.stat().st_size
            numbers = count(1)
            for batch in table.iter_batches(256, columns=columns):
                seen(size * batch.num_rows // n_rows)
                found = ((f"{file}: row {next(numbers)}", _just(row)) for row in batch.to_pylist())
                yield from _rows(found, reading, skipped)
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} is not a parquet file: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error


def _columns(file: Path, names: Sequence[str], reading: Reading) -> list[str]:
    """Return the columns of a table to read."""
    if reading.text_field in names:
        return [reading.text_field]
    if not reading.as_text and rows.has_conversation(dict.fromkeys(names)):
        return [name for name in names if name in rows.COLUMNS]
    raise DataError(
        f"{file} has no column {reading.text_field!r}; it has {_list_names(names)}; "
        "choose another with --text-field"
    )


def _just(value: Any) -> Row:
    return lambda: value


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
    files: Sequence[Path],
    reading: Reading,
    seen: Seen = lambda n: None,
    skipped: Skipped = lambda problem: None,
) -> Iterator[tuple[int, Piece]]:
    """Yield the number of each file and its pieces; DataError names all that cannot be read."""
    for i, file in enumerate(files):
        try:
            for piece in pieces(file, reading, seen, skipped=skipped):
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
