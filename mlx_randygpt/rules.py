"""What a run decides from its sizes and its text where the user has not.

Pure functions of settings; the runs that earned each constant are in docs/recipes.md.
"""

from __future__ import annotations

import math

from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.lora import trained_count
from mlx_randygpt.state import parameter_count

MEMORY_PASSES = 0.5  # of the text, over which Muon's weights forget
MOST_FORGOTTEN = 0.05  # of a weight in one step at the full rate
MUON_RATE = 0.02  # the full rate; at a lower --lr weights are written and forgotten more slowly
DROPOUT_FROM = 100.0  # passes × parameters per training token
DROPOUT = 0.1
FINE_RATE = 1e-3  # AdamW's on a trained model, up to a width of FINE_WIDTH
ADAPTER_RATE = 1e-2  # the same on adapters
FINE_WIDTH = 128


# Parameters, and bytes of text: the least that helps, what is better, and what it takes in.
TEXT_SIZES = (
    (0.11e6, 10e3, 50e3, 500e3),
    (1.2e6, 100e3, 500e3, 2e6),
    (4.8e6, 500e3, 2e6, 10e6),
    (38e6, 1e6, 5e6, 50e6),
)


def warmup_steps(longest: int, iters: int) -> int:
    """Steps of warmup: the recipe's, but at most a tenth of the run."""
    return min(longest, iters // 10)


def passes(model: ModelConfig, train: TrainConfig, n_tokens: int) -> float:
    """How often the run reads each of its `n_tokens` training tokens."""
    return train.iters / _steps_per_pass(model, train, n_tokens)


def weight_decay(model: ModelConfig, train: TrainConfig, n_tokens: int) -> float:
    """Muon's decoupled decay, per unit of rate: what a step wrote fades by 1/e in MEMORY_PASSES
    of the text (after Wang & Aitchison 2024, arXiv:2405.13698), so that the shorter the text,
    the less of it is learned by heart. AdamW keeps the recipe's; 0 tokens are not known yet."""
    if train.optimizer != "muon" or n_tokens == 0:
        return train.weight_decay
    per_step = 1 / (MEMORY_PASSES * _steps_per_pass(model, train, n_tokens))
    return float(f"{min(per_step, MOST_FORGOTTEN) / MUON_RATE:.2g}")


def fine_tuning_rate(model: ModelConfig) -> float:
    """AdamW's rate on a trained model; a wider one takes less (after Yang et al. 2022,
    arXiv:2203.03466). Muon keeps the recipe's."""
    rate = ADAPTER_RATE if model.lora_rank else FINE_RATE
    return float(f"{rate * min(1.0, FINE_WIDTH / model.n_embd):.2g}")


def dropout(model: ModelConfig, train: TrainConfig, n_tokens: int) -> float:
    """Dropout for a text of `n_tokens` training tokens, which may not be known yet (0): none
    until a model reads a text that is short for its size very often."""
    if n_tokens == 0:
        return 0.0
    strain = passes(model, train, n_tokens) * trained_count(model) / n_tokens
    return DROPOUT if strain > DROPOUT_FROM else 0.0


def text_advice(model: ModelConfig, n_bytes: int) -> str:
    """One line where a text is too short or too long for the model, by the table of the project's
    forerunners; else ""."""
    n = parameter_count(model)
    _, least, better, most = min(TEXT_SIZES, key=lambda row: abs(math.log(row[0] / n)))
    if n_bytes < least:
        return (
            f"Short text: {_bytes(n_bytes)} for {n:,} parameters, which ask for {_bytes(least)} at "
            f"least and better {_bytes(better)}; more text or a smaller --preset learns better."
        )
    if n_bytes > most:
        return (
            f"Long text: {_bytes(n_bytes)} for {n:,} parameters, which take in about "
            f"{_bytes(most)}; a larger --preset makes more of it."
        )
    return ""


def _bytes(n: float) -> str:
    return f"{n / 1e6:,.3g} MB" if n >= 1e6 else f"{n / 1e3:,.3g} kB"


def _steps_per_pass(model: ModelConfig, train: TrainConfig, n_tokens: int) -> float:
    return n_tokens / (train.sequences_per_step * model.block_size)
