"""Token files of nanoGPT and llm.c: told apart by their first bytes, held to a vocabulary."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_randygpt.data import DataError
from mlx_randygpt.data.corpus import Corpus, Loader
from mlx_randygpt.data.vocabulary import Vocabulary
from mlx_randygpt.tokenizers.chars import CharTokenizer

LETTERS = CharTokenizer("abcdefgh")  # ids 0 to 7; 8 <bos>, 9 <eos>, 10 <unk>
IDS = np.array([8, 0, 1, 2, 9, 8, 3, 4, 5, 6, 7, 9] * 4)


def nanogpt(path: Path, ids: Any) -> Path:
    np.asarray(ids, np.uint16).tofile(path)
    return path


def llm_c(
    path: Path, ids: Any, magic: int = 20240520, version: int = 1, dtype: Any = "<u2"
) -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + np.asarray(ids, dtype).tobytes())
    return path


def load(*files: Path, small: int = 1 << 20, folder: Path = Path()) -> Corpus:
    return Loader(small=small, folder=folder).load(files, LETTERS)[1]


def test_nanogpts_file_is_bare_ids(tmp_path: Path) -> None:
    corpus = load(nanogpt(tmp_path / "train.bin", IDS))
    np.testing.assert_equal(np.asarray(corpus.tokens), IDS)
    assert len(corpus.train) == int(0.9 * len(IDS))
    assert corpus.starts.tolist() == [0, 5, 12, 17, 24, 29, 36, 41]


def test_llm_cs_header_is_left_out(tmp_path: Path) -> None:
    for case in (("a.bin", 20240520, 1, "<u2"), ("b.bin", 20240801, 7, "<u4")):
        name, *layout = case
        corpus = load(llm_c(tmp_path / name, IDS, *layout))
        np.testing.assert_equal(np.asarray(corpus.tokens), IDS)


@pytest.mark.parametrize("small", [0, 1 << 20])
def test_validation_is_the_file_that_says_so(tmp_path: Path, small: int) -> None:
    val = nanogpt(tmp_path / "val.bin", [7] * 20)
    train = nanogpt(tmp_path / "train.bin", IDS)
    corpus = load(val, train, small=small, folder=tmp_path / "cache")
    assert (np.asarray(corpus.val) == 7).all()
    assert (len(corpus.train), len(corpus.val)) == (len(IDS), 20)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="token id 11, which is not in a vocabulary of 11; give"):
        load(nanogpt(tmp_path / "train.bin", [1, 11]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a token file: 0 bytes, but each id takes two"),
        (b"abc", "is not a token file: 3 bytes"),
        (
            np.array([20240520, 1, 9], "<i4").tobytes(),
            "cut off or damaged: its header promises 9 tok",
        ),
        (
            np.array([20240520, 2, 9], "<i4").tobytes(),
            "has version 2 of llm.c's format; only 1 is supp",
        ),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (file := tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(file)


def test_a_tokenizer_must_be_given_and_text_left_out(tmp_path: Path) -> None:
    file, text = nanogpt(tmp_path / "train.bin", IDS), tmp_path / "a.txt"
    text.write_text("abc")
    with pytest.raises(DataError, match="holds token ids; give the tokenizer that made them"):
        Loader().load([file], Vocabulary())
    with pytest.raises(
        DataError, match=r"a\.txt is text and .*train\.bin is tokens; give only one"
    ):
        load(text, file)
    with pytest.raises(DataError, match=r"val\.bin is a validation file; give the training file"):
        load(nanogpt(tmp_path / "val.bin", IDS))
