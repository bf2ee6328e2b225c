"""Text, rows, packed files, any encoding: read in pieces, never changed by where a piece ends."""

import gzip
import json
import re
from pathlib import Path

import pytest

from mlx_randygpt.data import DataError
from mlx_randygpt.data.reading import CHUNK_BYTES, Piece, Reading, pieces, read_text


def rows(path: Path, *texts: object) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("size", [1, 7, 50, 10_000])
def test_pieces_add_up_to_the_text(tmp_path: Path, text: str, size: int) -> None:
    (file := tmp_path / "a.txt").write_text(text)
    found = list(pieces(file, size=size))
    assert "".join(piece.text for piece in found) == text
    assert max(len(piece.text) for piece in found) <= size
    assert [piece.begins for piece in found] == [True, *[False] * (len(found) - 1)]
    assert [piece.ends for piece in found] == [*[False] * (len(found) - 1), True]


def test_a_piece_ends_between_two_words(tmp_path: Path) -> None:
    (file := tmp_path / "a.txt").write_text("one two. three four,  five")
    assert [piece.text for piece in pieces(file, size=20)] == ["one two. three", " four,  five"]
    file.write_text("龍" * 30 + "\n\n" + "龍" * 30)
    assert [len(piece.text) for piece in pieces(file, size=40)] == [30, 32]


def test_what_spans_two_chunks_is_read_whole(tmp_path: Path) -> None:
    raw = b"x" * (CHUNK_BYTES - 1) + "龍".encode() + b"y" * (CHUNK_BYTES - 3) + b"\r\nz"
    (file := tmp_path / "a.txt").write_bytes(raw)
    assert read_text(file) == raw.decode().replace("\r\n", "\n")


def test_a_wrong_byte_in_a_later_chunk_is_placed_rightly(tmp_path: Path) -> None:
    raw = b"line\r\n" * (CHUNK_BYTES // 4) + b"\xe9"
    (file := tmp_path / "a.txt").write_bytes(raw)
    place = rf"byte 0xe9 at offset {len(raw) - 1} \(line {CHUNK_BYTES // 4 + 1}\)"
    with pytest.raises(DataError, match=place):
        read_text(file)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "cp1252", "utf-8-sig"])
def test_another_encoding_is_read_when_it_is_named(tmp_path: Path, encoding: str) -> None:
    (file := tmp_path / "a.txt").write_bytes("héllo\r\nwörld".encode(encoding))
    assert read_text(file, Reading(encoding=encoding)) == "héllo\nwörld"


@pytest.mark.parametrize("encoding", ["klingon", "zip", ""])
def test_an_unknown_encoding_is_refused(encoding: str) -> None:
    with pytest.raises(DataError, match=f"encoding='{encoding}' is unknown; try utf-8"):
        Reading(encoding=encoding)


def test_gzip_is_unpacked_and_a_cut_off_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.txt.gz"
    file.write_bytes(gzip.compress(text.encode()))
    assert read_text(file) == text
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.txt\.gz is damaged or cut off"):
        read_text(file)
    file.write_bytes(b"plain text")
    with pytest.raises(DataError, match=r"a\.txt\.gz is damaged or cut off"):
        read_text(file)


def test_zstandard_is_unpacked_and_a_cut_off_file_is_refused(tmp_path: Path, text: str) -> None:
    zstandard = pytest.importorskip("zstandard")
    file = tmp_path / "a.txt.zst"
    packed = zstandard.compress(text.encode())
    file.write_bytes(packed + packed)  # two frames
    assert read_text(file) == text * 2
    for damaged in (packed[:-20], b"plain text"):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.txt\.zst is damaged or cut off"):
            read_text(file)


def test_every_row_is_a_document(tmp_path: Path) -> None:
    file = rows(tmp_path / "a.jsonl", "one\r\ntwo", "", "th\u2028ree")
    assert list(pieces(file)) == [
        Piece("one\ntwo", True, True),
        Piece("th\u2028ree", True, True),
    ]


def test_rows_may_be_packed_and_their_field_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"story": "one", "id": 1}\n\n{"story": "two"}'))
    found = pieces(file, Reading(text_field="story"))
    assert [piece.text for piece in found] == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", 'line 2 is a list, not an object such as {"text": …}'),
        ("null", "line 2 is null, not an object"),
        ("true", "line 2 is true or false, not an object"),
        ('"text"', "line 2 is a text, not an object"),
        ("{}", "line 2 has no text under 'text'; it is empty; choose another with --text-field"),
        ('{"a\\nb": 1}', "line 2 has no text under 'text'; it has a b; choose another"),
        (json.dumps(dict.fromkeys(map(str, range(99)))), "18, 19 and 79 more; choose another"),
        ('{"text": null}', "line 2 has null under 'text', not a text; remove the row or choose"),
        ('{"text": ["a"]}', "line 2 has a list under 'text', not a text"),
        ('{"text": {"a": "b"}}', "line 2 has an object under 'text', not a text"),
        ('{"text": 1.5}', "line 2 has a number under 'text', not a text"),
        ('{"text": false}', "line 2 has true or false under 'text', not a text"),
        (
            '{"a": "x", "b": 1}',
            "line 2 has no text under 'text'; it has a, b; choose another with --text",
        ),
        ('{"text": 7}', "line 2 has a number under 'text', not a text"),
    ],
)
def test_a_row_without_text_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": "ok"}}\n{line}\n')
    with pytest.raises(DataError, match=re.escape(message)):
        list(pieces(file))


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", "", "two"], "n": [1, 2, 3]}), file)
    assert [piece.text for piece in pieces(file)] == ["one", "two"]
    with pytest.raises(
        DataError, match="has no column 'story'; it has text, n; choose another with --t"
    ):
        list(pieces(file, Reading(text_field="story")))
    with pytest.raises(DataError, match="row 1 has a number under 'n', not a text"):
        list(pieces(file, Reading(text_field="n")))
    table = pyarrow.table({"text": ["\r\n"] * 300 + [None]})
    parquet.write_table(table, file)
    with pytest.raises(DataError, match=r"row 301 has null under 'text', not a text; remove the"):
        list(pieces(file))
    file.write_text("no")
    with pytest.raises(DataError, match=r"a\.parquet is not a parquet file"):
        list(pieces(file))


def test_a_file_without_a_valid_row_is_not_called_empty(tmp_path: Path) -> None:
    (file := tmp_path / "a.jsonl").write_text('[1]\n{"a": 1}\n')
    with pytest.raises(DataError, match=r"a.jsonl has no valid row; .*: line 1 is a list"):
        read_text(file, Reading(skip_bad_rows=True))
