"""The Python API: train, load, generate and look inside, with the rules of the command line."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest

import mlx_randygpt as gpt
from mlx_randygpt.config import ConfigError

TEXT = "the quick brown fox jumps over the lazy dog. " * 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder of three steps."""
    out = tmp_path_factory.mktemp("run")
    run, backend = gpt.new_run(text=TEXT, backend="numpy", preset="mini", iters=3)
    first, *_ = gpt.train(run, backend, out)
    assert isinstance(first, gpt.EvalLog)
    return out


@pytest.mark.parametrize("name", sorted(set(gpt.__all__) - {"__version__"}))
def test_every_public_name_exists(name: str) -> None:
    assert not inspect.ismodule(getattr(gpt, name))


def test_options_follow_the_rules_of_the_command_line() -> None:
    run, _ = gpt.new_run(text=TEXT, backend="numpy", preset="mini", iters=50)
    assert (run.model, run.train.warmup) == (
        gpt.resolve(31, len(run.train_tokens), preset="mini", iters=50)[0],
        1,
    )
    with pytest.raises(ConfigError, match="n_layers is not an option"):
        gpt.new_run(text=TEXT, n_layers=2)


@pytest.mark.parametrize("convert", [str, Path, lambda p: str(p / "checkpoint.safetensors")])
def test_a_folder_a_file_or_a_string_is_loaded(convert: object, folder: Path) -> None:
    model = gpt.load(convert(folder), backend="numpy")  # type: ignore[operator]
    assert model.generate("the ", max_tokens=5, seed=1) == model.generate(
        "the ", max_tokens=5, seed=1
    )


def test_a_stop_text_of_several_tokens_is_cut_whole(folder: Path) -> None:
    model = gpt.load(folder, backend="numpy")
    whole = model.generate("the ", max_tokens=30, seed=1)
    stop = whole[10:14]
    expected = whole[: whole.index(stop)]
    assert model.generate("the ", max_tokens=30, seed=1, stop=(stop,)) == expected


def test_logits_are_those_of_the_checkpoint(folder: Path) -> None:
    model = gpt.load(folder, backend="numpy")
    logits, maps = model.logits("the fox"), model.attention("the fox")
    assert logits.shape == (7, model.config.vocab_size)
    assert maps.shape == (1, 4, 7, 7)
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)
    p = np.exp(logits[-1] - logits[-1].max())
    assert model.next_tokens("the fox", 1)[0][1] == pytest.approx((p / p.sum()).max(), rel=1e-5)


MANY = "".join(chr(0x4E00 + i * i % 1999) for i in range(6000))


def test_a_text_of_no_token_or_of_too_many_is_refused(folder: Path) -> None:
    model = gpt.load(folder, backend="numpy")
    for look in (model.logits, model.next_tokens, model.attention):
        with pytest.raises(ValueError, match=r"text='' has no tokens"):
            look("")
    size = model.config.block_size
    assert model.attention("a" * size).shape[-1] == size
    with pytest.raises(ValueError, match=f"{size + 1} tokens; at most {size} fit"):
        model.attention("a" * (size + 1))


def test_a_run_on_a_text_of_many_characters_loses_none() -> None:
    pytest.importorskip("tokenizers")
    run, _ = gpt.new_run(text=MANY, backend="numpy", preset="mini")
    assert run.tokenizer.to_json()["type"] == "bpe"
    assert run.tokenizer.unknown(MANY) == {}
    _, corpus = gpt.load_corpus(text=MANY)
    assert corpus.choice is not None
    assert corpus.choice.n_chars == len(set(MANY))


def test_characters_that_are_dropped_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="characters are not in the vocabulary and were dropped"):
        gpt.new_run(text=MANY, tokenizer="char", backend="numpy", preset="mini")
