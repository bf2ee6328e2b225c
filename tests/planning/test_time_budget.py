"""Which run fits into a time, with steps that cost what their products cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlx_randygpt.config import ConfigError, ModelConfig, TrainConfig
from mlx_randygpt.data.corpus import encode_corpus
from mlx_randygpt.data.token_file import OpenFile, TokenFile
from mlx_randygpt.model import flops_per_token, parameter_count
from mlx_randygpt.planning.expected_loss import TextFacts, expected_loss, spread, text_facts
from mlx_randygpt.planning.time_budget import LEAST_STEPS, TimedRun, choose_run, describe
from mlx_randygpt.settings import resolve_new
from mlx_randygpt.tokenizers.chars import CharTokenizer

LONG = TextFacts(n_tokens=10**9)
SPEED = 100e9  # FLOP/s


def measure(model: ModelConfig, train: TrainConfig, seconds: float) -> float:
    return flops_per_token(model) * model.block_size * train.batch_size / SPEED


def chosen(seconds: float, text: TextFacts = LONG, **options: object) -> TimedRun:
    return choose_run(options, seconds, 68, text, measure)


def test_more_time_gives_larger_models_and_less_loss() -> None:
    runs = [chosen(seconds) for seconds in (2, 10, 60, 600, 3600, 36000)]
    sizes = [parameter_count(run.model) for run in runs]
    losses = [run.loss for run in runs]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) >= 3
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("seconds", [1, 60, 6000])
def test_the_steps_fill_the_time(seconds: float) -> None:
    run = chosen(seconds)
    assert run.is_full
    assert seconds - run.step_seconds <= run.seconds <= seconds


def test_no_other_preset_is_expected_to_be_better() -> None:
    best = chosen(300)
    others = [chosen(300, preset=name) for name in ("tiny", "small4", "small", "medium")]
    assert best.loss <= min(run.loss for run in others)


def test_a_large_preset_is_not_even_measured() -> None:
    seen = []

    def spy(model: ModelConfig, train: TrainConfig, seconds: float) -> float:
        seen.append(train.preset)
        return measure(model, train, seconds)

    choose_run({}, 20, 68, LONG, spy)
    assert "large" not in seen
    for preset in seen[1:]:
        model, train = resolve_new({"preset": preset}, 68)
        assert 20 / measure(model, train, 1) >= LEAST_STEPS


def test_what_is_given_stays() -> None:
    by_preset = chosen(300, preset="tiny")
    assert by_preset.train.preset == "tiny"
    by_sizes = chosen(300, n_layer=3, n_embd=96, n_head=3)
    assert (by_sizes.model.n_layer, by_sizes.model.n_embd) == (3, 96)
    by_steps = chosen(300, iters=400)
    assert by_steps.train.iters == 400
    assert by_steps.seconds <= 300
    assert by_steps.train.preset != "mini"


def test_steps_that_take_longer_than_the_time_get_the_smallest_preset() -> None:
    run = chosen(1, iters=100_000)
    assert (run.train.preset, run.train.iters) == ("mini", 100_000)


def test_nothing_left_to_decide_is_an_error() -> None:
    with pytest.raises(ConfigError, match="both are given"):
        chosen(300, iters=400, preset="tiny")


def test_a_short_text_ends_the_run_before_the_time() -> None:
    run = chosen(3600, TextFacts(n_tokens=20_000))
    assert not run.is_full
    assert run.seconds < 3600
    assert "ends after about" in describe(run, 3600)


def test_the_line_names_preset_steps_and_loss() -> None:
    model, train = resolve_new({"preset": "tiny", "iters": 1234}, 68)
    line = describe(TimedRun(model, train, 0.05, 1.623, is_full=True), 600)
    assert "preset tiny, about 1,234 steps" in line
    assert "expected validation loss 1.62" in line
    assert "10" in line


def test_expected_loss_falls_with_size_steps_context_and_text() -> None:
    model, train = resolve_new({"preset": "tiny", "iters": 1000}, 68)
    base = expected_loss(model, train, LONG)
    larger, _ = resolve_new({"preset": "small", "block_size": 32}, 68)
    longer, _ = resolve_new({"preset": "tiny", "block_size": 128}, 68)
    more = resolve_new({"preset": "tiny", "iters": 4000}, 68)[1]
    assert expected_loss(larger, train, LONG) < base
    assert expected_loss(longer, train, LONG) < base
    assert expected_loss(model, more, LONG) < base
    assert expected_loss(model, train, TextFacts(n_tokens=20_000)) > base
    twice_as_hard = TextFacts(10**9, for_ngrams=2, for_compression=2)
    assert expected_loss(model, train, twice_as_hard) == pytest.approx(2 * base)


def test_compression_counts_more_the_more_weights_learn_for_more_steps() -> None:
    repetitive = TextFacts(n_tokens=10**9, for_compression=0.5)

    def gain(preset: str, iters: int) -> float:
        model, train = resolve_new({"preset": preset, "iters": iters}, 68)
        return expected_loss(model, train, repetitive) / expected_loss(model, train, LONG)

    runs = [("mini", 1), ("tiny", 300), ("small", 300), ("small", 3000), ("large", 100_000)]
    gains = [gain(preset, iters) for preset, iters in runs]
    assert gains == sorted(gains, reverse=True)
    assert (gains[0], gains[-1]) == (1, pytest.approx(0.5))


def test_text_that_repeats_itself_is_easier(text: str) -> None:
    facts = []
    for content in (text, "to be or not to be " * (len(text) // 19)):
        tokenizer = CharTokenizer.train(content)
        facts.append(text_facts(encode_corpus({"a": content}, tokenizer), tokenizer))
    assert facts[1].for_ngrams < 0.5 * facts[0].for_ngrams
    assert facts[1].for_compression < 0.5 * facts[0].for_compression
    assert all(0.99 < each.bytes_per_token <= 1.01 for each in facts)


def test_a_repetitive_training_text_makes_a_different_validation_text_little_easier(
    text: str,
) -> None:
    content = "to be or not to be " * (9 * len(text) // 19) + text
    tokenizer = CharTokenizer.train(content)
    facts = text_facts(encode_corpus({"a": content}, tokenizer), tokenizer)
    assert facts.for_compression > 0.6 * facts.for_ngrams > 0.6


def test_a_context_is_as_long_in_two_alphabets(text: str) -> None:
    greek = "".join(chr(ord("α") + ord(c) - ord("a")) if c.islower() else c for c in text)
    facts = []
    for content in (text, greek):
        tokenizer = CharTokenizer.train(content)
        facts.append(text_facts(encode_corpus({"a": content}, tokenizer), tokenizer))
    assert facts[1].bytes_per_token > 1.5 * facts[0].bytes_per_token
    assert facts[1].characters_per_token == pytest.approx(facts[0].characters_per_token, rel=0.05)


@pytest.mark.parametrize("length", [2, 5, 6])
def test_a_text_of_a_few_tokens_has_some_difficulty(length: int) -> None:
    tokenizer = CharTokenizer("ab")
    corpus = encode_corpus({"a": "ab" * length}, tokenizer)
    facts = text_facts(corpus, tokenizer)
    assert 0 < facts.for_ngrams < 100
    assert 0 < facts.for_compression < 100


def test_a_long_text_is_counted_in_pieces_of_all_of_it() -> None:
    tokens = np.arange(1_000_000)
    pieces = spread(tokens, 1000, 10)
    assert len(pieces) == 1000
    assert pieces[:100].tolist() == list(range(100))
    assert pieces[-100:].tolist() == list(range(999_900, 1_000_000))
    assert (np.diff(pieces)[99::100] == 111_001).all()
    read_only = np.array([3, ~4, 5], np.int32)
    assert spread(read_only, 9, 3).tolist() == [3, 4, 5]


def test_pieces_of_a_long_text_are_all_that_is_read_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = tmp_path / "tokens", list[int]()
    path.write_bytes(np.arange(50_000, dtype=np.uint16).tobytes())
    file = OpenFile(path)
    monkeypatch.setattr(OpenFile, "read", lambda self, start, n: read.append(n) or bytes(n))
    assert len(spread(TokenFile(file, np.dtype(np.uint16), 50_000), 1000, 10)) == 1000
    assert sum(read) == 2 * 1000
