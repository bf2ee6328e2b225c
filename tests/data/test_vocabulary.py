"""A name of a tokenizer means one to learn or one that is there; anything else is one line."""

from pathlib import Path

import numpy as np
import pytest

from mlx_randygpt.config import ConfigError
from mlx_randygpt.data import DataError, vocabulary
from mlx_randygpt.data.vocabulary import AUTO, Choice, Vocabulary, choose_tokenizer, learn
from mlx_randygpt.tokenizers import Tokenizer
from mlx_randygpt.tokenizers.chars import CharTokenizer, count_characters
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


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_subwords_are_learned_from_the_training_part_alone(kind: str) -> None:
    pytest.importorskip("tokenizers")
    seen, held_out = "the cat sat é ", "zyxwvu zyxwvu "
    texts = [seen * 90, held_out * 10]  # the end of the second is the validation text
    learned = Vocabulary(kind, 700).learn(texts, sum(len(text.encode()) for text in texts))
    names = str(learned.to_json())
    assert "cat" in names
    assert "zyx" not in names


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
    with pytest.raises(
        DataError, match="--tokenizer bpee is not auto, char, bpe, wordpiece or a read"
    ):
        choose_tokenizer("bpee", 0)
    with pytest.raises(ConfigError, match=r"vocab_size=513 is not in 1\.\.512"):
        choose_tokenizer("char", 513)


HAN = "".join(chr(0x4E00 + i % 700) + "，" * (i % 9 == 0) for i in range(6000))
TEXTS = {
    "Chinese": HAN,
    "Japanese": HAN.replace("，", "のです。カタカナ"),
    "emoji": " ".join(f"good {chr(0x1F300 + i % 600)} day" for i in range(3000)),
    "Hindi": "यह एक परीक्षण है। " * 50,
    "Arabic": "هذا نص للاختبار. " * 50,
    "Russian": "Это проверка, Ёлка. " * 50,
    "German": "Größe, Übung, Maß. " * 50,
    "C": 'int main(void) { return puts("a\\n"); }\n' * 50,
    "DNA": "ACGTTGCAAT" * 500,
}


def learn_auto(*texts: str) -> tuple[Tokenizer, Choice]:
    tokenizer, choice = learn(Vocabulary(AUTO), lambda: texts, 0)
    assert choice is not None
    return tokenizer, choice


@pytest.mark.parametrize("language", TEXTS)
def test_by_default_no_character_of_a_language_is_lost(language: str) -> None:
    pytest.importorskip("tokenizers")
    text = TEXTS[language]
    tokenizer, choice = learn_auto(text[:1000], text[1000:])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    by_subwords = language in ("Chinese", "Japanese", "emoji")
    assert tokenizer.to_json()["type"] == ("bpe" if by_subwords else "char")
    assert (choice.n_chars, choice.n_bytes) == (len(set(text)), len(text.encode()))
    if not by_subwords:
        assert tokenizer == CharTokenizer.train(text)


@pytest.mark.parametrize(("n_lost", "kind"), [(1, "char"), (2, "char"), (3, "bpe")])
def test_characters_are_chosen_if_they_lose_at_most_a_thousandth(n_lost: int, kind: str) -> None:
    frequent = "".join(map(chr, range(0x100, 0x100 + 512)))
    rare = "".join(map(chr, range(0x4E00, 0x4E00 + n_lost)))
    text = (frequent * 4)[: 2000 - n_lost] + rare
    choice = Choice.by_counts(count_characters([text]))
    assert choice.lost == pytest.approx(n_lost / 2000)
    assert choice.vocabulary == (Vocabulary("char") if kind == "char" else Vocabulary("bpe", 512))


@pytest.mark.parametrize(("n_bytes", "size"), [*vocabulary.BPE_SIZES, (10**9, 4096)])
def test_the_size_of_a_bpe_follows_from_the_bytes_of_text(n_bytes: int, size: int) -> None:
    assert Choice(9999, 0.5, n_bytes).vocabulary == Vocabulary("bpe", size)


def test_the_line_of_the_choice_says_why() -> None:
    assert learn_auto("banana")[1].describe(CharTokenizer("abn")) == (
        "Tokenizer: characters; all 3 different ones of the text fit."
    )
    choice = Choice(n_chars=1808, lost=0.0312, n_bytes=100_000)
    assert choice.describe(CharTokenizer("ab")) == (
        "Tokenizer: byte-level BPE, 5 tokens for 100 kB of text; characters would lose 3.1 % "
        "(1,808 different ones, 512 fit)."
    )
    assert Choice(600, 0.00043, 9).describe(CharTokenizer("a")) == (
        "Tokenizer: characters; the 512 most frequent of 600 cover all but 0.043 % of the text."
    )


def test_a_size_alone_limits_characters_or_is_that_of_a_bpe() -> None:
    assert choose_tokenizer(AUTO, 0) == Vocabulary(AUTO)
    assert choose_tokenizer(AUTO, 512) == Vocabulary("char", 512)
    assert choose_tokenizer(AUTO, 600) == Vocabulary("bpe", 600)


def test_the_counts_of_many_texts_are_those_of_one() -> None:
    one, many = count_characters(["aé龍🐉\ud800"]), count_characters(["a", "é龍", "", "🐉\ud800"])
    np.testing.assert_array_equal(one, many)
    assert one.sum() == 5
