"""Copies in a sample: compared with a search of every substring, and found where planted."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_randygpt.analysis import copies
from mlx_randygpt.analysis.copies import MIN_RUN, Copies, Span, find_copies
from mlx_randygpt.data import hashing
from mlx_randygpt.data.reading import Piece


def cut(text: str, *sizes: int) -> list[Piece]:
    """One document in pieces of these sizes, and the rest."""
    pieces, at = list[Piece](), 0
    for size in (*sizes, len(text)):
        if part := text[at : at + size]:
            pieces.append(Piece(part, at == 0, at + size >= len(text)))
        at += size
    return pieces


def naive(sample: str, documents: list[str]) -> Copies:
    """The same by asking for every run whether it occurs."""
    n = len(sample)
    ends = list[int]()  # of the longest run from each start
    for start in range(n):
        stop = start
        while stop < n and any(sample[start : stop + 1] in text for text in documents):
            stop += 1
        ends.append(stop)
    runs = [Span(start, stop) for start, stop in enumerate(ends)]
    passages = tuple(
        run
        for i, run in enumerate(runs)
        if run.stop - run.start >= MIN_RUN and (i == 0 or runs[i - 1].stop < run.stop)
    )
    inside = {i for run in passages for i in range(*run)}
    longest = max(runs, key=lambda run: run.stop - run.start, default=Span(0, 0))
    return Copies(longest, passages, len(inside) / max(1, n))


@st.composite
def texts_and_samples(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    """Documents, and samples of parts of them between other characters."""
    letters = st.text(st.sampled_from(draw(st.sampled_from(["ab", "abc \n", "aé漢🙂\0"]))))
    unit = draw(st.text("ab漢", min_size=1, max_size=6))
    parts = st.one_of(letters, st.builds(lambda n: unit * n, st.integers(0, 40)))
    documents = draw(st.lists(st.lists(parts, max_size=6).map("".join), min_size=1, max_size=3))

    def part(i: int, start: int, size: int) -> str:
        text = documents[i % len(documents)]
        return text[start % (len(text) + 1) :][:size]

    copied = st.builds(part, st.integers(0, 2), st.integers(0, 300), st.integers(0, 90))
    sample = st.lists(st.one_of(copied, parts), max_size=5).map("".join)
    return documents, draw(st.lists(sample, min_size=1, max_size=3))


@settings(max_examples=300, deadline=None)
@given(texts_and_samples(), st.integers(1, 90), st.integers(1, 90), st.integers(1, 40))
def test_copies_are_those_of_a_naive_search(
    texts: tuple[list[str], list[str]], block: int, size: int, first_look: int
) -> None:
    documents, samples = texts
    pieces = [p for text in documents for p in cut(text, *[size] * (len(text) // size))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "BLOCK", block)
        patch.setattr(copies, "FIRST_LOOK", first_look)
        patch.setattr(copies, "MAX_SEEN", 3)
        found = find_copies(samples, pieces)
    for sample, copied in zip(samples, found, strict=True):
        expected = naive(sample, documents)
        assert copied.passages == expected.passages
        assert copied.share == expected.share
        start, stop = copied.longest  # one of several of that length
        assert stop - start == expected.longest.stop - expected.longest.start
        assert any(sample[start:stop] in text for text in documents)


def test_a_hash_that_collides_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "FACTORS", [0] * 33)  # every window has the same hash
    text = random.Random(1).choices("abcdefgh ", k=300)
    sample = "".join([*text[100:150], "X", *text[20:45], "Y"])
    assert find_copies([sample], cut("".join(text))) == [naive(sample, ["".join(text)])]


@pytest.mark.parametrize("at", [0, 65_490, 131_000, 199_950])
def test_a_planted_run_is_found_across_blocks(at: int) -> None:
    letters = random.Random(at)
    text = "".join(letters.choices("abcdefghijklmnopqrstuvwxyz \n", k=200_000))
    sample = "§" * 7 + text[at : at + 50] + "§" * 43
    (found,) = find_copies([sample], cut(text, 65_536, 3, 65_536))
    assert found == Copies(Span(7, 57), (Span(7, 57),), 0.5)


def test_runs_end_at_29_and_passages_begin_at_30_characters() -> None:
    text = "".join(map(chr, range(500, 600)))
    samples = [text[3:32], text[3:33], text[3:33] + text[50:90]]
    found = find_copies(samples, cut(text))
    assert found[0] == Copies(Span(0, 29), (), 0.0)
    assert found[1] == Copies(Span(0, 30), (Span(0, 30),), 1.0)
    assert found[2] == Copies(Span(30, 70), (Span(0, 30), Span(30, 70)), 1.0)
    assert found[2].covered == (Span(0, 70),)


def test_a_run_does_not_go_from_one_document_into_the_next() -> None:
    documents = ["the end of one document, ", "and the beginning of another"]
    pieces = [Piece(text, True, True) for text in documents]
    (found,) = find_copies(["".join(documents)], pieces)
    assert found == naive("".join(documents), documents)
    assert not found.passages


def test_an_empty_sample_and_an_empty_text_have_no_copies() -> None:
    nothing = Copies(Span(0, 0), (), 0.0)
    assert find_copies(["", "abc"], []) == [nothing, nothing]
    assert find_copies(["", "xyz"], cut("abc")) == [nothing, nothing]
    assert find_copies([], cut("abc")) == []
