"""The benchmark of languages on tiny texts: both learners are scored on the same characters."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_randygpt.cli.training import text
from mlx_randygpt.data.reading import Reading
from mlx_randygpt.data.vocabulary import AUTO, Vocabulary
from mlx_randygpt.state import Array
from mlx_randygpt.training.evaluation import evaluate

pytest.importorskip("tokenizers")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CHINESE = "".join(chr(0x4E00 + i * 7919 % 1200) + "，\n" * (i % 9 == 0) for i in range(4000))
RUSSIAN = "Это проверка, Ёлка. " * 200


@pytest.fixture
def languages(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("languages")
    monkeypatch.setattr(module, "GIVEN", {"preset": "tiny", "n_layer": 1, "threads": 1})
    return module


class Uniform:
    """Take every token of the table for equally likely."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.n_trained = 0

    def step(self, i: int, tokens: Array) -> None:
        self.n_trained = len(tokens)

    def loss(self, tokens: Array) -> float:
        return math.log(self.vocab_size)


def write(folder: Path, content: str) -> Path:
    file = folder / "text.txt"
    file.write_text(content, encoding="utf-8")
    return file


@pytest.mark.parametrize(("content", "kind"), [(CHINESE, "bpe"), (RUSSIAN, "char")])
def test_nanogpt_reads_all_characters_and_is_scored_on_the_same_text(
    languages: Any, tmp_path: Path, content: str, kind: str
) -> None:
    file = write(tmp_path, content)
    tokenizer, corpus = text.load([file], Reading(), Vocabulary(AUTO))
    tokens = languages.characters(file, tokenizer, corpus)
    assert tokenizer.to_json()["type"] == kind
    assert tokens.tokenizer.symbols == tuple(sorted(set(content)))
    decode = tokens.tokenizer.decode
    assert decode(tokens.train) + decode(tokens.val) == content
    assert abs(len(tokens.val) - len(tokenizer.decode(corpus.val))) <= 1  # of a cut character


def test_bits_per_byte_are_those_of_an_evaluation(languages: Any, tmp_path: Path) -> None:
    tokenizer, corpus = text.load([write(tmp_path, CHINESE)], Reading(), Vocabulary(AUTO))
    given = {**languages.GIVEN, "recipe": "modern", "iters": 1}
    learner = languages.learning.Ours(given, tokenizer, corpus, "numpy")
    tokens = languages.Tokens("bpe", tokenizer, corpus.train, corpus.val, 0)
    size = learner.model.block_size
    score = evaluate(learner.backend, corpus.val, size, 64, tokenizer.token_bytes())
    assert score is not None
    measured = tokens.bits_per_byte(learner.loss(corpus.val))
    assert measured == pytest.approx(score.bits_per_byte, rel=1e-12)


def test_one_command_makes_a_row_for_each_text_and_learner(
    languages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    make = languages.learning.make

    def made(options: Any, who: str, *rest: Any) -> Any:
        return make(options, who, *rest) if who == "modern" else Uniform(rest[-2].vocab_size)

    monkeypatch.setattr(languages.learning, "make", made)
    monkeypatch.setattr(languages, "hold_to_one_thread", lambda: None)
    texts = {"zh": CHINESE, "ru": RUSSIAN}
    for name, content in texts.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    report = tmp_path / "report.json"
    command = ["languages.py", "--steps", "2", "--json", str(report), "--data"]
    monkeypatch.setattr(sys, "argv", command + [f"{name}={tmp_path / name}" for name in texts])
    languages.main()
    rows = json.loads(report.read_text())
    assert [(row["text"], row["who"], row["tokens_of"]) for row in rows] == [
        ("zh", "modern", "bpe"), ("zh", "nanogpt-bpe", "bpe"), ("zh", "nanogpt", "all"),
        ("ru", "modern", "char"), ("ru", "nanogpt", "all"),
    ]  # fmt: skip
    assert all(row["lost"] == 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)
    last = rows[-1]
    uniform = math.log2(len(set(RUSSIAN))) / last["bytes_per_token"]
    assert last["bits_per_byte"] == pytest.approx(uniform)
