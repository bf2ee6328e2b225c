"""Beam search against all continuations there are."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest

from mlx_randygpt.backends import make_backend
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.sampling.beams import beam_search
from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.sampling.generate import generate, log_softmax
from mlx_randygpt.state import Params, TrainState
from mlx_randygpt.tokenizers.chars import CharTokenizer

ABC = CharTokenizer("abc")  # 3 <bos>, 4 <eos>, 5 <unk>
PROMPT, LENGTH = [0, 1], 4


@pytest.fixture(params=["classic", "modern"])
def model_of_three(
    request: pytest.FixtureRequest,
    tiny_model: Callable[..., ModelConfig],
    tiny_train: Callable[..., TrainConfig],
    lively: Callable[..., Params],
) -> tuple[Any, ModelConfig]:
    """A lively model of three letters with a context of five, and its settings."""
    model = tiny_model(request.param, vocab_size=ABC.vocab_size, block_size=5)
    state = TrainState(0, lively(model, seed=4), {})
    return make_backend("numpy", model, tiny_train(request.param), state), model


def logprob(backend: Any, ids: tuple[int, ...]) -> float:
    """log p of these ids after the prompt, each read afresh; the context is not passed."""
    total = 0.0
    for n, token in enumerate(ids):
        read = np.array([[*PROMPT, *ids[:n]]])
        logits = backend.logits(read, backend.new_cache(1)).astype(np.float64)
        logits[:, [ABC.bos, ABC.unk]] = -np.inf
        total += log_softmax(logits)[0, token]
    return total


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_enough_beams_find_the_best_of_all(
    model_of_three: tuple[Any, ModelConfig], length_penalty: float
) -> None:
    backend, model = model_of_three
    config = SampleConfig(max_tokens=LENGTH)
    found = beam_search(backend, model, ABC, PROMPT, config, 500, length_penalty)
    whole = list(product(range(3), repeat=LENGTH))
    ended = [(*ids, ABC.eos) for n in range(LENGTH) for ids in product(range(3), repeat=n)]
    scores = {ids: logprob(backend, ids) / len(ids) ** length_penalty for ids in whole + ended}
    assert tuple(found.ids) == max(scores, key=lambda ids: scores[ids])


def test_one_beam_is_greedy(model_of_three: tuple[Any, ModelConfig]) -> None:
    backend, model = model_of_three
    config = SampleConfig(max_tokens=12, temperature=0)
    *_, [greedy] = generate(backend, model, ABC, PROMPT, config)
    found = beam_search(backend, model, ABC, PROMPT, config, 1)
    assert (found.ids, found.finish_reason) == (greedy.ids, greedy.finish_reason)


def test_beams_stop_at_a_stop_text(model_of_three: tuple[Any, ModelConfig]) -> None:
    backend, model = model_of_three
    config = SampleConfig(max_tokens=30, stop=("a", "b", "c"))
    found = beam_search(backend, model, ABC, PROMPT, config, 3)
    assert (found.text, found.finish_reason) == ("", "stop")
