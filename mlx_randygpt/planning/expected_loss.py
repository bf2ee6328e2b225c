"""The validation loss that a run can be expected to reach: a formula fitted to runs.

docs/recipes.md has the runs, the errors of the fit and its range of validity.
"""

from __future__ import annotations

import bz2
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.data.corpus import Corpus
from mlx_randygpt.model import parameters
from mlx_randygpt.planning.ngrams import ORDER, ngram_loss
from mlx_randygpt.state import Tokens, plain_ids
from mlx_randygpt.tokenizers import Tokenizer

SAMPLE, N_PIECES = 200_000, 10  # tokens of the training text that are looked at, in pieces
TEST, N_TEST_PIECES = 32_000, 8  # tokens of the validation text
REFERENCE_LOSS = 1.843  # nats per byte of tiny Shakespeare that the n-gram model needs then
REFERENCE_BITS = 2.589  # per byte of these samples after compression
SHORTER_LOSS, SHORTER_BITS = 0.05, 0.085  # both grow by this power of how much shorter a text is
LEAST_SHARE = 0.65  # of the difficulty for n-grams: the least that compression may give
FLOOR = 0.5405  # nats per byte of tiny Shakespeare
SIZE, SIZE_POWER = 0.5611, 0.1  # what too few weights of the blocks cost
STEPS, STEPS_POWER = 2.5443, 0.4  # what too few steps cost
CONTEXT, CONTEXT_POWER = 1.6841, 0.3  # what a short context costs, in characters
REUSE = 15.0  # passes after which another one teaches nearly nothing
FEWEST, MOST = 8.0, 16.0  # log(weights x steps) where compression begins to count, and counts alone


@dataclass(frozen=True)
class TextFacts:
    """What the expected loss depends on besides the model and the run."""

    n_tokens: int  # for training
    bytes_per_token: float = 1.0
    characters_per_token: float = 1.0
    for_ngrams: float = 1.0  # how hard a byte is to predict; tiny Shakespeare is 1
    for_compression: float = 1.0


def text_facts(corpus: Corpus, tokenizer: Tokenizer) -> TextFacts:
    """Return the facts of a corpus; its difficulties are relative to tiny Shakespeare.

    One measures how well an n-gram model, counted on a sample of the training text, predicts the
    validation text; the other, how well that sample can be compressed. A sample that compresses far
    better than the model predicts repeats what the validation text does not contain.
    """
    train = spread(corpus.train, SAMPLE, N_PIECES)
    test = spread(corpus.val, TEST, N_TEST_PIECES)
    bytes_per_token = max(1e-9, float(tokenizer.token_bytes()[test].mean()))
    characters = tokenizer.decode(train) or " "
    content = characters.encode("utf-8", "replace")
    characters_per_token = bytes_per_token * len(characters) / len(content)
    shorter = SAMPLE / len(train)
    bits = 8 * len(bz2.compress(content)) / len(content)
    for_ngrams = for_compression = bits / (REFERENCE_BITS * shorter**SHORTER_BITS)
    if min(len(train), len(test)) > ORDER:
        loss = ngram_loss(train, test, tokenizer.vocab_size) / bytes_per_token
        for_ngrams = loss / (REFERENCE_LOSS * shorter**SHORTER_LOSS)
        for_compression = max(for_compression, LEAST_SHARE * for_ngrams)
    return TextFacts(
        len(corpus.train), bytes_per_token, characters_per_token, for_ngrams, for_compression
    )


def spread(tokens: Tokens, n: int, n_pieces: int) -> NDArray[np.int64]:
    """Return about n ids from evenly spread pieces of the tokens, or all if they are few."""
    if len(tokens) <= n:
        return plain_ids(np.asarray(tokens)).astype(np.int64)
    size = n // n_pieces
    starts = np.arange(n_pieces) * (len(tokens) - size) // (n_pieces - 1)
    pieces = tokens[starts[:, None] + np.arange(size)]  # a row is read at once from a file
    return plain_ids(pieces.reshape(-1)).astype(np.int64)


def terms(model: ModelConfig, train: TrainConfig, text: TextFacts) -> tuple[float, float, float]:
    """Return what lowers the loss: thousands of block weights, steps, characters of context.

    A step that reads text again counts less, after Muennighoff et al. 2023 (arXiv:2305.16264):
    n passes are worth 1 + R(1 - exp(-(n - 1) / R)) with R = REUSE.
    """
    weights = sum(weight.size for weight in parameters(model) if weight.is_block_matrix)
    passes = train.iters * train.sequences_per_step * model.block_size / text.n_tokens
    worth = 1 + REUSE * (1 - math.exp(-(passes - 1) / REUSE)) if passes > 1 else passes
    context = model.block_size * text.characters_per_token
    return weights / 1000, train.iters * worth / passes, context


def expected_loss(model: ModelConfig, train: TrainConfig, text: TextFacts) -> float:
    """Return the validation loss in nats per token at the end of a run.

    A small model after few steps finds a text about as hard as n-grams do. The larger it is and the
    longer it trains, the more it gains from distant repetitions, which compression measures.
    """
    weights, steps, context = terms(model, train, text)
    per_byte = (
        FLOOR
        + SIZE * weights**-SIZE_POWER
        + STEPS * steps**-STEPS_POWER
        + CONTEXT * context**-CONTEXT_POWER
    )
    share = min(1.0, max(0.0, (math.log(weights * steps) - FEWEST) / (MOST - FEWEST)))
    difficulty = text.for_ngrams ** (1 - share) * text.for_compression**share
    return float(difficulty * text.bytes_per_token * per_byte)
