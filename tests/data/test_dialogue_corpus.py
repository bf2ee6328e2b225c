"""A corpus with conversations: whole ones for validation, from memory as from the cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_randygpt.data import DataError
from mlx_randygpt.data.audit import audit
from mlx_randygpt.data.corpus import Corpus, Loader, check_length
from mlx_randygpt.data.decoding import decoded
from mlx_randygpt.data.files import TextSource, find_sources
from mlx_randygpt.data.mixture import (
    Drawing,
    conversations_in,
    training_windows,
    validation_windows,
)
from mlx_randygpt.data.reading import Reading, all_pieces
from mlx_randygpt.data.vocabulary import Vocabulary
from mlx_randygpt.data.windows import Documents, Mixture, Windows, sample_batch
from mlx_randygpt.dialogue import has_dialogue
from mlx_randygpt.state import IGNORED, plain_ids
from mlx_randygpt.tokenizers import Tokenizer

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """(name, questions) -> a file of conversations; each answers with the question, reversed."""

    def make(name: str, questions: list[str]) -> Path:
        rows = [{"prompt": q, "completion": q[::-1]} for q in questions]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    return make


def load(*files: Path, folder: Path, small: int = 1 << 24) -> tuple[Tokenizer, Corpus]:
    return Loader(folder=folder, small=small).load(files, Vocabulary("char"))


def questions(tokens: object, tokenizer: Tokenizer) -> list[str]:
    """Every second piece: the answers are the others."""
    return [piece.text for piece in decoded(tokens, tokenizer)][::2]  # type: ignore[arg-type]


ASKED = [f"q{i:02}" for i in range(40)]


def test_the_last_conversations_are_for_validation(write: Write, tmp_path: Path) -> None:
    tokenizer, corpus = load(write("a.jsonl", ASKED), folder=tmp_path)
    assert has_dialogue(tokenizer)
    assert corpus.n_conversations == 40
    assert questions(corpus.train, tokenizer) == ASKED[:36]
    assert questions(corpus.val, tokenizer) == ASKED[36:]
    assert corpus.validation == "the last 10 % of a.jsonl"
    assert (np.asarray(corpus.tokens) >= 0).sum() == 40 * 4  # three characters and the end


def test_copies_of_a_conversation_are_for_training(write: Write, tmp_path: Path) -> None:
    tokenizer, corpus = load(write("a.jsonl", [*ASKED, ASKED[3]]), folder=tmp_path)
    held = questions(corpus.val, tokenizer)
    assert held == ASKED[36:]
    assert questions(corpus.train, tokenizer) == [*ASKED[:36], ASKED[3]]


def test_beside_conversations_all_text_is_for_training(write: Write, tmp_path: Path) -> None:
    talks, notes = write("a.jsonl", ASKED), tmp_path / "b.txt"
    notes.write_text("some notes " * 30)
    tokenizer, corpus = load(talks, notes, folder=tmp_path)
    assert questions(corpus.val, tokenizer) == ASKED[36:]
    assert corpus.validation == "the last 10 % of a.jsonl"
    assert tokenizer.decode(plain_ids(np.asarray(corpus.train))).endswith("some notes " * 30)


@pytest.mark.parametrize("more", [[], [ASKED[3]]])
def test_memory_and_cache_hold_the_same(write: Write, tmp_path: Path, more: list[str]) -> None:
    files, folder = [write("a.jsonl", ASKED + more), write("b.jsonl", ["x", "y"])], tmp_path / "c"
    tokenizer, corpus = load(*files, folder=folder)
    for _ in range(2):  # written, then read again
        again, cached = load(*files, folder=folder, small=0)
        assert again == tokenizer
        assert cached.tokens.dtype == np.int16
        for name in ("tokens", "train", "val", "starts"):
            assert np.array_equal(np.asarray(getattr(cached, name)), getattr(corpus, name)), name
        assert (cached.split, cached.sha256) == (corpus.split, corpus.sha256)
        assert cached.n_conversations == corpus.n_conversations


def test_who_says_it_is_a_part_of_the_text(tmp_path: Path) -> None:
    file, digests = tmp_path / "a.jsonl", set()
    for roles in (("user", "assistant"), ("assistant", "user")):
        messages = [{"role": role, "content": "same"} for role in roles]
        file.write_text((json.dumps({"messages": messages}) + "\n") * 2)
        digests.add(load(file, folder=tmp_path)[1].sha256)
    assert len(digests) == 2


@pytest.mark.parametrize("asked", [["one"], ["one", "one"]])
def test_one_conversation_is_too_few(asked: list[str], write: Write, tmp_path: Path) -> None:
    _, corpus = load(write("a.jsonl", asked), folder=tmp_path)
    with pytest.raises(DataError, match="has 1 conversation, or copies of one; give at least 2"):
        check_length(corpus, 8)


def test_two_conversations_are_enough(write: Write, tmp_path: Path) -> None:
    tokenizer, corpus = load(write("a.jsonl", ["a" * 90, "b"]), folder=tmp_path)
    check_length(corpus, 8)
    assert questions(corpus.val, tokenizer) == ["b"]


def windows_of(*given: str, size: int = 12, **how: bool) -> tuple[Corpus, Windows | None]:
    sources = find_sources(given)
    tokenizer, corpus = load(*(source.file for source in sources), folder=Path(given[0]).parent)
    return corpus, training_windows(corpus, tokenizer, sources, Drawing(size, **how))


def shares(corpus: Corpus, windows: Windows | None, size: int = 12) -> tuple[float, float]:
    """The shares of windows of text and of conversations among 4,000."""
    batch = sample_batch(corpus.train, 4000, size, 1, 0, windows=windows)
    is_talk = (np.asarray(corpus.train)[batch.starts] < 0).mean()
    assert (batch.y() != IGNORED).any(axis=1).all()
    return 1 - is_talk, is_talk


def test_weights_are_shares_of_the_windows(write: Write, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("some notes " * 300)
    talks = write("a.jsonl", ASKED)
    assert shares(*windows_of(str(notes), f"{talks}:0.3"))[1] == pytest.approx(0.3, abs=0.03)
    assert shares(*windows_of(f"{notes}:.3", f"{talks}:.1"))[1] == pytest.approx(0.25, abs=0.03)
    # Without weights by size: 3,302 tokens of text in windows of 12, beside 36 conversations.
    expected = 36 / (36 + 3302 / 12)
    assert shares(*windows_of(str(notes), str(talks)))[1] == pytest.approx(expected, abs=0.03)


def test_texts_alone_can_have_weights(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name * 1000)
    corpus, windows = windows_of(f"{tmp_path}/a:0.2", f"{tmp_path}/b")
    assert isinstance(windows, Mixture)
    batch = sample_batch(corpus.train, 4000, 12, 1, 0, windows=windows)
    assert (batch.starts < 1000).mean() == pytest.approx(0.2, abs=0.03)
    (tmp_path / "b").write_text("b")
    with pytest.raises(DataError, match="b has no text for training"):
        windows_of(f"{tmp_path}/a", f"{tmp_path}/b:0.2")


def test_a_text_beside_conversations_must_fill_a_window(write: Write, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("short")
    with pytest.raises(DataError, match="a text beside others has 7 tokens; a context of 12 needs"):
        windows_of(str(write("a.jsonl", ASKED)), f"{tmp_path}/b.txt")


def test_without_weights_and_conversations_nothing_changes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc" * 400)
    assert windows_of(f"{tmp_path}/a.txt")[1] is None
    assert isinstance(windows_of(f"{tmp_path}/a.txt", respect_documents=True)[1], Documents)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["a:1.5"], "a weight is above 0 and below 1, such as .*a:0.3"),
        (["a:0"], "a weight is above 0 and below 1"),
        (["a:0.5", "b:0.5", "c"], "add up to 1, which leaves nothing for the texts without"),
        (["a", "a:0.5"], "an earlier --data names its files already"),
        (["a:x"], "no such file"),
    ],
)
def test_a_wrong_weight_is_refused(given: list[str], problem: str, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_text(name)
    with pytest.raises(DataError, match=problem):
        find_sources([f"{tmp_path}/{name}" for name in given])


def test_a_file_whose_name_ends_like_a_weight_is_that_file(tmp_path: Path) -> None:
    file = tmp_path / "a:0.3"
    file.write_text("text")
    assert find_sources([str(file)]) == [TextSource(file)]
    assert find_sources([f"{file}:0.25"]) == [TextSource(file, str(file), 0.25)]


def test_validation_reads_the_windows_of_its_conversations(write: Write, tmp_path: Path) -> None:
    tokenizer, corpus = load(write("a.jsonl", ASKED), folder=tmp_path)
    found = validation_windows(corpus, tokenizer, Drawing(12))
    assert found is not None
    assert len(found.first) == 4
    assert found.ends[-1] == len(corpus.val)
    whole = conversations_in(corpus.tokens, corpus.starts, tokenizer, Drawing(12))
    assert len(whole.first) == 40
    assert validation_windows(replace(corpus, n_conversations=0), tokenizer, Drawing(12)) is None


def test_an_audit_knows_the_split_of_conversations(write: Write, tmp_path: Path) -> None:
    files = [write("a.jsonl", [*ASKED, ASKED[3]]), write("b.jsonl", ["x", "y"])]
    (tmp_path / "c.txt").write_text("some notes " * 30)
    files.append(tmp_path / "c.txt")
    found = audit(lambda: all_pieces(files, Reading()))
    _, corpus = load(*files, folder=tmp_path)
    assert corpus.split is not None
    assert found.n_conversations == corpus.n_conversations == 43
    names = ["a.jsonl", "b.jsonl", "c.txt"]
    assert [bool(n) for n in found.split.n_val] == [bool(n) for n in corpus.split.n_val]
    assert found.split.describe(names).endswith(" and all of b.jsonl")
    assert found.n_leaks == 0
