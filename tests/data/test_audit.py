"""Planted copies, leaks and repeated lines are found, exactly as a slow search finds them."""

from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_randygpt.data import audit as module
from mlx_randygpt.data.audit import WINDOW, Audit, Lines, audit, sampling_bits
from mlx_randygpt.data.reading import Piece


def noise(n: int, seed: int) -> str:
    """Return n random letters, in which no passage occurs twice by chance."""
    return "".join(Random(seed).choices("abcdefghijklmnopqrstuvwxyz ", k=n))


def cut(text: str, size: int) -> Iterator[Piece]:
    for i in range(0, len(text), size):
        yield Piece(text[i : i + size], i == 0, i + size >= len(text))


def audited(*texts: str, size: int = 1000) -> Audit:
    """Audit texts of a file each, in pieces of `size` characters."""
    return audit(lambda: ((i, piece) for i, text in enumerate(texts) for piece in cut(text, size)))


def test_a_plain_text_has_nothing_to_report() -> None:
    found = audited(noise(9000, 1))
    assert (found.n_documents, found.n_characters, found.n_bytes) == (1, 9000, 9000)
    assert (found.n_copies, found.n_leaks, found.n_lines) == (0, 0, 0)
    assert found.repeated == found.leaked == 0
    assert found.scripts == {"Latin": 1}
    assert found.split.n_val == (901,)


def test_copies_are_found_and_their_files() -> None:
    a, b = noise(500, 1), noise(300, 2)
    found = audited(a, b, a, noise(400, 3), a, b)
    assert found.n_copies == 3
    assert found.copies == ((3, (0, 2, 4)), (2, (1, 5)))
    assert found.copied == (500 + 500 + 300) / (3 * 500 + 2 * 300 + 400)
    assert found.repeated == 0
    assert found.split.n_copies == 5
    assert found.leaks == ()


def test_a_copy_with_another_character_is_no_copy_but_repeats() -> None:
    a = noise(500, 1)
    found = audited(a, a[:250] + "#" + a[251:], noise(1000, 2))
    assert found.n_copies == 0
    # 451 windows each, of which 50 hold the other character
    assert found.repeated == pytest.approx((451 - 50) / (451 + 451 + 951))


@pytest.mark.parametrize("size", [60, 1000, 1 << 20])
@pytest.mark.parametrize("length", [WINDOW, 173])
def test_a_planted_leak_is_found_to_the_character(size: int, length: int) -> None:
    val = noise(1000, 2)
    train = noise(4000, 1) + "#" + val[300 : 300 + length] + "#" + noise(4000, 3)
    found = audited(train, val, size=size)
    assert found.split.n_val[0] == 0
    [leak] = found.leaks
    assert (leak.file, leak.document, leak.start, leak.length) == (1, 1, 300, length)
    assert leak.text == val[300 : 300 + min(60, length)]
    n_val = found.split.n_val[1] - 1  # without the token after the document
    assert found.leaked == pytest.approx(length / n_val)


def test_a_shorter_passage_is_no_leak() -> None:
    val = noise(1000, 2)
    found = audited(noise(4000, 1) + "#" + val[300 : 300 + WINDOW - 1] + "#" + noise(4000, 3), val)
    assert found.n_leaks == 0


def test_a_leak_at_the_end_of_one_document_and_the_start_of_the_next_is_two() -> None:
    one, two = noise(600, 2), noise(600, 4)
    train = noise(9000, 1) + one[-80:] + noise(900, 3) + two[:70]
    found = audited(train, one, two)
    assert [(leak.file, leak.start, leak.length) for leak in found.leaks] == [
        (1, 520, 80),
        (2, 0, 70),
    ]


def test_repeated_lines_are_boilerplate() -> None:
    footer = "All rights reserved. Do not copy."
    texts = [f"{noise(200, i)}\n{footer}\n{noise(100, i + 50)}" for i in range(12)]
    found = audited(*texts, size=37)
    assert found.lines == ((footer, 12),)


def test_rare_lines_are_dropped_and_frequent_ones_are_not() -> None:
    lines = Lines(most=100)
    for i in range(5000):
        lines.add([f"a line that occurs once: {i}", "the line that occurs always"])
    [(line, n)] = lines.frequent()
    assert line == "the line that occurs always"
    assert 4800 <= n <= 5000


def test_scripts_and_replacement_characters_are_counted() -> None:
    found = audited("abc Привет 日本 \ufffd\ufffd 12" * 10)
    assert found.n_replacements == 20
    assert found.scripts == {
        "Cyrillic": pytest.approx(6 / 11),
        "Latin": pytest.approx(3 / 11),
        "CJK": pytest.approx(2 / 11),
    }


def test_a_long_text_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WINDOWS", 1000)
    val = noise(20_000, 2)
    found = audited(noise(150_000, 1), val[5000:15_000], val)
    assert (found.sampled, found.sampled_repeats) == (32, 256)
    assert found.leaked == pytest.approx(10_000 / 18_000, abs=0.1)
    assert found.leaks[0].length == pytest.approx(10_000, abs=500)


@pytest.mark.parametrize(("n", "bits"), [(0, 0), (1 << 22, 0), ((1 << 22) + 1, 1), (10**9, 8)])
def test_the_windows_of_a_sample_fit_the_table(n: int, bits: int) -> None:
    assert sampling_bits(n) == bits


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=2, max_size=8),
    st.integers(20, 200),
)
def test_it_agrees_with_a_slow_search(documents: list[list[int]], size: int) -> None:
    blocks = [noise(45, seed) for seed in range(4)]  # two in a row hold a window
    texts = ["".join(blocks[i] for i in document) for document in documents]
    found = audited(*texts, size=size)
    firsts = [text for i, text in enumerate(texts) if text not in texts[:i]]
    windows = [t[i : i + WINDOW] for t in firsts for i in range(len(t) - WINDOW + 1)]
    assert found.n_copies == len(texts) - len(firsts)
    assert found.repeated == pytest.approx((len(windows) - len({*windows})) / max(1, len(windows)))
    if found.split.n_copies:
        return  # the order is another one
    lengths = [len(text) + 2 for text in texts]
    cut, n_val, covered, train = int(0.9 * sum(lengths)), 0, 0, set[str]()
    parts = []
    for i, text in enumerate(texts):
        at = min(max(cut - sum(lengths[:i]) - 1, 0), len(text))
        train |= {text[k : k + WINDOW] for k in range(at - WINDOW + 1)}
        parts += [text[at:]] if text not in texts[:i] else []
    for part in parts:
        n_val += len(part)
        hits = [k for k in range(len(part) - WINDOW + 1) if part[k : k + WINDOW] in train]
        covered += len({j for k in hits for j in range(k, k + WINDOW)})
    assert found.leaked == pytest.approx(covered / max(1, n_val))
