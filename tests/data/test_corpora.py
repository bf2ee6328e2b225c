"""Corpora by name: whole, unpacked, stripped, each book once."""

import json
import zipfile
from pathlib import Path

import pytest

from mlx_randygpt.data import DataError, corpora
from mlx_randygpt.data.corpora import LIBRARY, find_corpus, install, install_books
from mlx_randygpt.data.download import Remote

BOOK = """The Project Gutenberg eBook of A Tale

*** START OF THE PROJECT GUTENBERG EBOOK A TALE
OF TWO ***

Produced by Somebody
and Another

CHAPTER I.
It was the best.
* * *
It was the worst.

*** END OF THE PROJECT GUTENBERG EBOOK A TALE OF TWO ***
Section 1. General Terms of Use
"""


OLD = "START OF THIS PROJECT GUTENBERG EBOOK"


def test_a_book_is_what_stands_between_the_marks() -> None:
    assert (
        corpora.strip_gutenberg(BOOK) == "CHAPTER I.\nIt was the best.\n* * *\nIt was the worst.\n"
    )


@pytest.mark.parametrize(
    ("text", "book"),
    [
        ("no marks at all\n", "no marks at all\n"),
        (f"***{OLD} X***\nold\nEnd of Project Gutenberg's X", "old\n"),
        (f"x\n*** {OLD} X ***\nno end", "no end\n"),
    ],
)
def test_older_and_missing_marks_are_understood(text: str, book: str) -> None:
    assert corpora.strip_gutenberg(text) == book


def test_editions_that_differ_in_breaks_and_marks_are_the_same() -> None:
    marks = {corpora.book_fingerprint(text) for text in ("It was--the BEST.", "it was\nthe best")}
    assert len(marks) == 1
    assert corpora.book_fingerprint("it was the worst") not in marks


def test_books_become_documents_and_doubles_are_left_out(tmp_path: Path) -> None:
    fetched, told = list[Remote](), list[str]()

    def fetch(remote: Remote, path: Path) -> None:
        fetched.append(remote)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(BOOK.replace("best", "BEST" if "84" in remote.url else "best"))

    for _ in range(2):
        books = install_books([98, 84, 98, 11], tmp_path, fetch, told.append)
    assert [book.name for book in books] == ["98-a-tale-of-two-cities.txt"]
    assert books[0].read_text().startswith("CHAPTER I.")
    assert told[:2] == [
        "Left out: book 84 is the same as 98-a-tale-of-two-cities.txt",
        "Left out: book 11 is the same as 98-a-tale-of-two-cities.txt",
    ]
    assert len(fetched) == 3  # once each


def test_a_zip_becomes_its_text(tmp_path: Path) -> None:
    def fetch(remote: Remote, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("enwik8", "<mediawiki>")

    assert install(find_corpus("enwik8"), tmp_path, fetch).read_text() == "<mediawiki>"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["enwik8.txt"]


def test_what_is_no_zip_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_text("no")
    with pytest.raises(DataError, match=r"a\.zip is not a zip file"):
        corpora.unzip(tmp_path / "a.zip", tmp_path / "a.txt")


def test_stories_become_rows(tmp_path: Path) -> None:
    stories = "One day.\n\nThe end.\n<|endoftext|>\n \nTwo.\n<|endoftext|>\nThree"
    (tmp_path / "raw").write_text(stories)
    corpora.split_stories(tmp_path / "raw", tmp_path / "a.jsonl")
    rows = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert rows == ["One day.\n\nThe end.", "Two.", "Three"]


def test_every_corpus_says_its_licence_size_and_place() -> None:
    for corpus in LIBRARY.values():
        assert corpus.licence
        assert corpus.size > 1000
        assert corpus.remote is None or corpus.remote.url.startswith("https://")
        if corpus.remote and corpus.remote.sha256:
            assert (corpus.remote.size, len(corpus.remote.sha256)) == (corpus.size, 64)


def test_an_unknown_name_is_said() -> None:
    with pytest.raises(DataError, match="no corpus is called 'bible'; choose from tinyshakespeare"):
        find_corpus("bible")
