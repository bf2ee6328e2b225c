"""Folders and patterns for --data: links, closed folders, dead ends, odd names; nothing is dropped
silently."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from privileges import unprivileged

from mlx_randygpt.data import DataError
from mlx_randygpt.data.corpus import load_corpus
from mlx_randygpt.data.files import find_files

WAYS = ["texts", "texts/**", "texts/*.txt"]  # to name the same files


@pytest.fixture(autouse=True)
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a text, below the current one."""
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("some text\n")
    return Path("texts")


def test_a_linked_folder_is_read(texts: Path) -> None:
    Path("far").mkdir()
    Path("far/b.txt").write_text("more\n")
    (texts / "link").symlink_to(Path("far").absolute())
    expected = [Path("texts/a.txt"), Path("texts/link/b.txt")]
    assert find_files(["texts"]) == find_files(["texts/**"]) == expected
    assert find_files(["texts/*/b.txt"]) == expected[1:]


def test_links_in_a_circle_are_read_once_under_their_plain_names(texts: Path) -> None:
    (texts / "sub").mkdir()
    (texts / "sub/b.txt").write_text("more\n")
    (texts / "sub/up").symlink_to("..")
    (texts / "0").symlink_to("sub")
    expected = [Path("texts/a.txt"), Path("texts/sub/b.txt")]
    assert find_files(["texts"]) == find_files(["texts/**"]) == expected


@pytest.mark.parametrize("way", WAYS)
def test_a_link_to_nothing_is_an_error(way: str, texts: Path) -> None:
    (texts / "b.txt").symlink_to("gone.txt")
    with pytest.raises(
        DataError, match=r"^texts/b\.txt is a link to gone\.txt, which does not exist"
    ):
        find_files([way])


@pytest.mark.parametrize("way", WAYS)
def test_a_link_to_itself_is_an_error(way: str, texts: Path) -> None:
    (texts / "b.txt").symlink_to("b.txt")
    with pytest.raises(
        DataError, match=r"^texts/b\.txt cannot be read: Too many levels of symbolic"
    ):
        find_files([way])


@pytest.mark.parametrize("way", ["texts", "texts/**", "texts/*/*.txt", "texts/*/a.txt", "*/sub/*"])
@pytest.mark.parametrize("mode", [0, 0o444])
def test_a_closed_folder_is_an_error(way: str, mode: int, texts: Path) -> None:
    (texts / "sub").mkdir()
    (texts / "sub/a.txt").write_text("more\n")
    (texts / "sub").chmod(mode)
    with (
        unprivileged(),
        pytest.raises(DataError, match=r"^texts/sub\S* cannot be read: Permission"),
    ):
        find_files([way])


@pytest.mark.parametrize("way", WAYS)
def test_a_closed_file_is_an_error(way: str, texts: Path) -> None:
    (texts / "b.txt").write_text("more\n")
    (texts / "b.txt").chmod(0)
    with unprivileged(), pytest.raises(DataError, match=r"texts/b\.txt cannot be read: Permission"):
        load_corpus(way)


@pytest.mark.parametrize("way", WAYS)
def test_a_pipe_in_a_folder_is_reported_and_left_out(way: str, texts: Path) -> None:
    os.mkfifo(texts / "b.txt")
    notes: list[str] = []
    assert find_files([way], notes.append) == [texts / "a.txt"]
    assert notes == [f"Left out: 1 pipe or device of {way} (b.txt); name a pipe to read it."]


def test_a_file_that_vanishes_is_an_error(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (texts / "b.txt").write_text("more\n")
    files = find_files(["texts"])
    (texts / "b.txt").unlink()
    monkeypatch.setattr("mlx_randygpt.data.corpus.find_files", lambda names: files)
    with pytest.raises(
        DataError, match=r"^texts/b\.txt cannot be read: No such file or directory$"
    ):
        load_corpus("texts")


def test_a_sparse_file_is_binary(texts: Path) -> None:
    os.truncate(texts / "a.txt", 1 << 16)
    with pytest.raises(DataError, match=r"texts/a\.txt is binary"):
        load_corpus("texts")


@pytest.mark.parametrize("name", [b"\xff.txt", b"a\nb.txt", b"\x1b[31m.txt", b"x" * 251 + b".txt"])
def test_an_odd_name_is_read_as_any_other(name: bytes, texts: Path) -> None:
    if sys.platform == "darwin" and not name.isascii():
        pytest.skip("names are UTF-8 there")
    Path(os.fsdecode(b"texts/" + name)).write_text("other text\n")
    assert [os.fsencode(file.name) for file in find_files(["texts"])] == sorted([b"a.txt", name])
    assert load_corpus("texts")[1].characters == 21
