"""The validation loss that a run can be expected to reach: a formula fitted to runs.

docs/recipes.md has the runs, the errors of the fit and its range of validity.
"""

from __future__ import annotations

import bz2
import math
from dataclasses import dataclass

import numpy as np

from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.data.corpus import Corpus
from mlx_randygpt.model import parameters
from mlx_randygpt.tokenizers import Tokenizer

SAMPLE_BYTES = 100_000  # of a text, compressed to see how surprising it is
REFERENCE_BITS = 2.62  # per byte of as much of tiny Shakespeare
SHORTER = 0.125  # a shorter sample compresses worse by this power of its length
FLOOR = 0.5961  # nats per byte of tiny Shakespeare
SIZE, SIZE_POWER = 0.4798, 0.1  # what too few weights of the blocks cost
STEPS, STEPS_POWER = 2.5303, 0.4  # what too few steps cost
CONTEXT, CONTEXT_POWER = 1.6933, 0.3  # what a short context costs, in bytes
REUSE = 15.0  # passes after which another one teaches nearly nothing


@dataclass(frozen=True)
class TextFacts:
    """What the expected loss depends on besides the model and the run."""

    n_tokens: int  # for training
    bytes_per_token: float = 1.0
    difficulty: float = 1.0  # of a byte; tiny Shakespeare is 1


def text_facts(corpus: Corpus, tokenizer: Tokenizer) -> TextFacts:
    """Return the facts of a corpus; its difficulty comes from how well its beginning compresses."""
    sample = np.asarray(corpus.train[:SAMPLE_BYTES])
    content = tokenizer.decode(sample).encode("utf-8", "replace")
    content, whole = content[:SAMPLE_BYTES], len(content)
    bits = 8 * len(bz2.compress(content)) / max(1, len(content))
    usual = REFERENCE_BITS * (SAMPLE_BYTES / max(1, len(content))) ** SHORTER
    return TextFacts(
        n_tokens=len(corpus.train),
        bytes_per_token=whole / max(1, len(sample)),
        difficulty=bits / usual,
    )


def terms(model: ModelConfig, train: TrainConfig, text: TextFacts) -> tuple[float, float, float]:
    """Return what lowers the loss: thousands of weights in the blocks, steps, context in bytes.

    A step that reads text again counts less, after Muennighoff et al. 2023 (arXiv:2305.16264):
    n passes are worth 1 + R(1 - exp(-(n - 1) / R)) with R = REUSE.
    """
    weights = sum(weight.size for weight in parameters(model) if weight.is_block_matrix)
    passes = train.iters * train.sequences_per_step * model.block_size / text.n_tokens
    worth = 1 + REUSE * (1 - math.exp(-(passes - 1) / REUSE)) if passes > 1 else passes
    context = model.block_size * text.bytes_per_token
    return weights / 1000, train.iters * worth / passes, context


def expected_loss(model: ModelConfig, train: TrainConfig, text: TextFacts) -> float:
    """Return the validation loss in nats per token at the end of a run."""
    weights, steps, context = terms(model, train, text)
    per_byte = (
        FLOOR
        + SIZE * weights**-SIZE_POWER
        + STEPS * steps**-STEPS_POWER
        + CONTEXT * context**-CONTEXT_POWER
    )
    return float(text.difficulty * text.bytes_per_token * per_byte)
