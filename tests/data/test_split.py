"""The last tenth is for validation, and no copy of a document in it is in the training text."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_randygpt.data.corpus import Corpus, Loader
from mlx_randygpt.data.split import copies_together, tail_split
from mlx_randygpt.data.vocabulary import Vocabulary


def write(folder: Path, **texts: str) -> list[Path]:
    files = [folder / f"{name}.txt" for name in texts]
    for file, text in zip(files, texts.values(), strict=True):
        file.write_text(text)
    return files


def load(files: list[Path], folder: Path, small: int = 1 << 24, copies: bool = True) -> Corpus:
    loader = Loader(folder=folder / "cache", small=small, keeps_copies=copies)
    return loader.load(files, Vocabulary())[1]


def test_three_equal_files_are_cut_at_the_same_place(tmp_path: Path) -> None:
    text = "".join(chr(97 + i * i % 26) for i in range(98))
    corpus = load(write(tmp_path, a=text, b=text, c=text), tmp_path)
    assert len(corpus.train) == 270
    assert len(corpus.val) == 30
    for i in range(3):
        assert np.array_equal(corpus.train[90 * i : 90 * i + 90], corpus.train[:90])
        assert np.array_equal(corpus.val[10 * i : 10 * i + 10], corpus.val[:10])
    line = "the last 10 % of a.txt, the last 10 % of b.txt and the last 10 % of c.txt"
    assert corpus.validation == line


def test_a_copy_at_the_end_goes_to_training(tmp_path: Path) -> None:
    files = write(tmp_path, a="abcdefgh" * 10, b="ij" * 60, c="abcdefgh" * 10)
    corpus = load(files, tmp_path)
    assert len(corpus.train) + len(corpus.val) == len(corpus.tokens) == 286
    assert corpus.validation == "the last 17.2 % of b.txt"
    assert corpus.split is not None
    assert corpus.split.n_copies == 2


@pytest.mark.parametrize("texts", [{"a": "ab" * 50}, {"a": "ab" * 50, "b": "xy" * 50}])
@pytest.mark.parametrize("small", [0, 1 << 24])
def test_without_copies_it_is_the_last_tenth(
    tmp_path: Path, texts: dict[str, str], small: int
) -> None:
    files = write(tmp_path, **texts)
    corpus, plain = load(files, tmp_path, small), load(files, tmp_path, copies=False)
    assert np.array_equal(corpus.tokens, plain.tokens)
    assert len(corpus.train) == int(0.9 * len(corpus.tokens))
    assert corpus.validation == plain.validation


def test_copies_on_one_side_move_nothing(tmp_path: Path) -> None:
    files = write(tmp_path, a="ab" * 9, b="ab" * 9, c="xyz" * 100)
    assert np.array_equal(load(files, tmp_path).tokens, load(files, tmp_path, copies=False).tokens)


@pytest.mark.parametrize("copies", [True, False])
def test_the_cache_has_the_split_of_the_text_in_memory(tmp_path: Path, copies: bool) -> None:
    files = write(tmp_path, a="abcd" * 30, b="ef" * 50, c="gh" * 40, d="abcd" * 30)
    short = load(files, tmp_path, copies=copies)
    for _ in range(2):  # written, read
        long = load(files, tmp_path, 0, copies)
        assert np.array_equal(long.train, short.train)
        assert np.array_equal(long.val, short.val)
        assert np.array_equal(long.starts, short.starts)
        assert long.validation == short.validation
    other = load(files, tmp_path, 0, not copies)
    assert not np.array_equal(other.train, short.train)


def test_a_lost_file_of_the_cache_is_written_again(tmp_path: Path) -> None:
    files = write(tmp_path, a="abcd" * 30, b="ef" * 50, d="abcd" * 30)
    tokens = np.asarray(load(files, tmp_path, 0).tokens)
    for file in (tmp_path / "cache").glob("*.tokens"):
        content = file.read_bytes()
        file.unlink()
        assert np.array_equal(load(files, tmp_path, 0).tokens, tokens)
        assert file.read_bytes() == content


def test_the_line_names_whole_files_and_parts() -> None:
    split = tail_split([0, 80, 95, 97, 98, 99], 100)
    assert split.n_train == 90
    names = [f"d/{letter}.txt" for letter in "abcdef"]
    assert split.describe(names) == (
        "the last 33.3 % of b.txt, all of c.txt, all of d.txt and 2 more files, in whole or in part"
    )
    assert tail_split([0, 95], 100).describe(["x/a", "y/a"]) == (
        "the last 5.26 % of x/a and all of y/a"
    )


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=2, max_size=30))
def test_no_training_token_of_a_document_is_for_validation_in_a_copy(
    documents: list[tuple[int, int]],
) -> None:
    # a document of kind k has 3 + 5·k tokens: (kind, position)
    texts = [[(kind, other, i) for i in range(3 + 5 * kind)] for kind, other in documents]
    tokens = [token for text in texts for token in text]
    starts = np.cumsum([0, *map(len, texts[:-1])])
    digests = np.array([5 * kind + other for kind, other in documents], np.uint64)
    parts = copies_together(digests, starts, len(tokens))
    cut, order = int(0.9 * len(tokens)), np.arange(len(tokens))
    if parts is not None:
        cut, order = parts.n_train, np.concatenate([*parts.blocks(order)])
        assert np.array_equal(np.sort(order), np.arange(len(tokens)))
    train = {tokens[i] for i in order[:cut]}
    plain = {tokens[i] for i in range(int(0.9 * len(tokens)))}
    rest = {tokens[i] for i in range(int(0.9 * len(tokens)), len(tokens))}
    assert (parts is None) or not train & {tokens[i] for i in order[cut:]}
    kinds = {token[:2] for token in plain} & {token[:2] for token in rest}
    leaks = [kind for kind in kinds if documents.count(kind) > 1]
    assert bool(leaks) == (parts is not None)
