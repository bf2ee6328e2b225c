"""Beam search: find the continuation with the highest score by keeping several candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

import numpy as np

from mlx_randygpt.backends.base import Scorer
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.sampling.generate import Continuation, Generated, Streams, log_softmax
from mlx_randygpt.tokenizers import Tokenizer


def beam_search(  # noqa: PLR0913
    backend: Scorer,
    model: ModelConfig,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    config: SampleConfig,
    n_beams: int,
    length_penalty: float = 1.0,
    should_stop: Callable[[], bool] = lambda: False,
) -> Generated:
    """Return the continuation with the highest log-probability / length ** `length_penalty`.

    `n_beams` candidates are kept at a time. A length penalty of 1 compares means per token, 0
    compares sums, which favours short texts. Nothing is drawn at random: of the sampling settings
    only max_tokens and stop apply. The search ends when `n_beams` texts have ended.
    """
    streams, scores = Streams(backend, model, 1), np.zeros(1)
    beams, ended = [Continuation(tokenizer, prompt, config)], list[tuple[float, Generated]]()
    logits = streams.join([prompt]) if config.max_tokens else None
    while logits is not None and not should_stop():
        logits[:, beams[0].banned] = -np.inf
        total = scores[:, None] + log_softmax(logits.astype(np.float64))  # (K, V)
        best = np.argsort(-total, axis=None, kind="stable")[: 2 * n_beams]
        rows, growing, kept = [], list[Continuation](), list[float]()
        for rank, (row, token) in enumerate(zip(*np.unravel_index(best, total.shape), strict=True)):
            beam, score = _extend(beams[row], int(token), tokenizer), float(total[row, token])
            if beam.sample.finish_reason:
                if rank >= n_beams:
                    continue  # an end counts only if it is among the best
                ended.append((score / len(beam.sample.ids) ** length_penalty, beam.sample))
            elif len(growing) < n_beams:
                rows.append(int(row))
                growing.append(beam)
                kept.append(score)
        beams, scores = growing, np.array(kept)
        if len(ended) >= n_beams or not beams:
            break
        streams.select(rows)
        logits = streams.append([beam.sample.ids[-1] for beam in beams])
    for score, beam in zip(scores, beams, strict=True) if len(ended) < n_beams else ():
        beam.sample.finish_reason = "length"
        ended.append((score / max(1, len(beam.sample.ids)) ** length_penalty, beam.sample))
    return max(ended, key=lambda pair: pair[0])[1]


def _extend(beam: Continuation, token: int, tokenizer: Tokenizer) -> Continuation:
    """Return a copy of a beam with one more token."""
    longer = copy(beam)
    longer.sample = Generated(list(beam.sample.ids))
    longer.grow(token, tokenizer.decode([*beam.sample.ids, token]))
    return longer
