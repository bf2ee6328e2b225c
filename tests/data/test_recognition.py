"""A file that is not the expected text: the error says what it looks like, and what to do."""

import io
import zipfile
from pathlib import Path

import pytest

from mlx_randygpt.data import DataError
from mlx_randygpt.data.reading import Reading, read_text

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
GERMAN = "Käse, Brötchen und süße Äpfel für die Größe der Übung; schön, daß Du kommst. " * 20
FRENCH = (
    "L’été dernier, à la fenêtre, le garçon a mangé une crêpe très sucrée où ça lui plaît. " * 20
)
SPANISH = "El niño comió piñas en la montaña, ¿verdad? Mañana será otro día. " * 20
POLISH = "Zażółć gęślą jaźń, a potem idź do łóżka, żeby śnić o świętej Łodzi. " * 20
RUSSIAN = "Все счастливые семьи похожи друг на друга. " * 20
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。" * 20
CHINESE = "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？人不知而不愠，不亦君子乎？" * 20


def archive(name: str) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as packed:
        packed.writestr(name, "content")
    return buffer.getvalue()


def refused(tmp_path: Path, raw: bytes, encoding: str = "utf-8") -> str:
    (file := tmp_path / "a.txt").write_bytes(raw)
    with pytest.raises(DataError) as caught:
        read_text(file, Reading(encoding=encoding))
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{file} ")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"%PDF-1.7\n%\xe2\xe3", "is a PDF, not text; extract its text, e.g. with pdftotext"),
        (archive("a.txt"), "is a zip archive, not text; unpack it"),
        (archive("word/document.xml"), "is a Word document, not text; save it as plain text"),
        (b"{\\rtf1\\ansi", "is an RTF document, not text; save it as plain text"),
        (LFS, "is a pointer of Git LFS, not text; get it by git lfs pull"),
        (b"\x1f\x8b\x08\0", "is packed by gzip, not text; let its name end in .gz"),
        (b"\x89PNG\r\n\x1a\n", "is a PNG image, not text; leave it out"),
        ("hi".encode("utf-32"), "is UTF-32, not UTF-8; give --encoding utf-32"),
        ("hällo".encode("utf-16-be"), "looks like utf-16-be, not UTF-8; give --encoding utf-16-be"),
        (bytes(100), "is binary, not text: a NUL byte at offset 0 (line 1)"),
    ],
)
def test_a_format_is_named_with_what_to_do(tmp_path: Path, raw: bytes, message: str) -> None:
    assert refused(tmp_path, raw) == message


@pytest.mark.parametrize(
    ("text", "encoding", "names"),
    [
        (GERMAN, "cp1252", {"cp1252"}),
        (FRENCH, "cp1252", {"cp1252"}),
        (SPANISH, "cp1252", {"cp1252"}),
        (POLISH, "cp1250", {"cp1250"}),
        (RUSSIAN, "cp1251", {"cp1251"}),
        (JAPANESE, "shift_jis", {"cp932", "shift_jis"}),
        (CHINESE, "gb2312", {"gb18030", "gb2312"}),
    ],
)
def test_a_likely_encoding_is_named_and_reads_the_text(
    tmp_path: Path, text: str, encoding: str, names: set[str]
) -> None:
    pytest.importorskip("charset_normalizer")
    name = refused(tmp_path, text.encode(encoding)).rpartition("--encoding ")[2].split()[0]
    assert name in names
    assert read_text(tmp_path / "a.txt", Reading(encoding=name)) == text


def test_utf16_without_a_mark_is_one_line(tmp_path: Path) -> None:
    said = refused(tmp_path, b"abcd", "utf-16")
    assert said.startswith("is not UTF-16 text: ")
