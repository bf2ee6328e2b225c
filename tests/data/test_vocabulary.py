"""A name of a tokenizer means one to learn or one that is there; anything else is one line."""

from pathlib import Path

import pytest

from mlx_randygpt.config import ConfigError
from mlx_randygpt.data import DataError, vocabulary
from mlx_randygpt.data.vocabulary import Vocabulary, choose_tokenizer
from mlx_randygpt.tokenizers.chars import CharTokenizer
from mlx_randygpt.tokenizers.subword import SubwordTokenizer


def test_characters_are_counted_in_all_of_the_text() -> None:
    assert Vocabulary("char").learn(["ab", "bc"], 4) == CharTokenizer("abc")
    assert Vocabulary("char", 1).learn(["ab", "bc"], 4) == CharTokenizer("b")


def test_subwords_of_a_long_text_are_learned_from_an_even_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(vocabulary, "MAX_LEARNING_BYTES", 100)
    texts = [f"word{i} " * 5 for i in range(10)]
    learned = Vocabulary("bpe", 300).learn(texts, 350)
    assert learned == SubwordTokenizer.train("bpe", texts[::4], 300)


def test_a_file_is_read_as_tokenizer_json(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    made = SubwordTokenizer.train("bpe", ["abc"], 260)
    (file := tmp_path / "tokenizer.json").write_text(made.content)
    read = choose_tokenizer(str(file), 0)
    assert isinstance(read, SubwordTokenizer)
    assert read.encode("abc cab").tolist() == made.encode("abc cab").tolist()
    file.write_text("{}")
    with pytest.raises(DataError, match=r"--tokenizer .*: not a tokenizer\.json \("):
        choose_tokenizer(str(file), 0)
    with pytest.raises(
        ConfigError, match="--vocab-size 9 cannot be combined with a tokenizer from"
    ):
        choose_tokenizer(str(file), 9)


def test_an_unknown_name_is_said() -> None:
    with pytest.raises(DataError, match="--tokenizer bpee is not char, bpe, wordpiece or a read"):
        choose_tokenizer("bpee", 0)
    with pytest.raises(ConfigError, match=r"vocab_size=513 is not in 1\.\.512"):
        choose_tokenizer("char", 513)
