"""The Python API in three calls: train on a text, load a run, and use its model.

    run, backend = new_run("my text.txt", preset="tiny", iters=300)
    for report in train(run, backend, "runs/first"):
        print(report)

    model = load("runs/first")  # a run folder or a checkpoint file
    print(model.generate("The "))
    logits = model.logits("The fog")  # (T, V)

Options have the names, defaults and rules of `mlxgpt train` and `mlxgpt sample`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_randygpt.analysis import insight
from mlx_randygpt.backends import choose_for_text, make_backend, make_scorer
from mlx_randygpt.backends.base import Backend, Scorer
from mlx_randygpt.checkpoint import load_checkpoint
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.data.corpus import check_length, default_prompt, load_corpus
from mlx_randygpt.data.files import TextSource
from mlx_randygpt.data.mixture import Drawing, training_windows, validation_windows
from mlx_randygpt.data.reading import Reading
from mlx_randygpt.data.vocabulary import AUTO
from mlx_randygpt.model import initial_state, merge_adapters
from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.sampling.generate import generate, shown_length
from mlx_randygpt.settings import resolve
from mlx_randygpt.state import Array, Params
from mlx_randygpt.tokenizers import Tokenizer, tokenizer_from_json
from mlx_randygpt.training.loop import Run
from mlx_randygpt.words import unify_newlines, unknown_line


def new_run(
    *paths: str | Path,
    text: str | None = None,
    tokenizer: str | Tokenizer = AUTO,
    vocab_size: int = 0,
    backend: str = "auto",
    **options: Any,
) -> tuple[Run, Backend]:
    """Prepare a new run on files, folders or a `text`, by the rules of `mlxgpt train`.

    `options` are those of `settings.resolve`: `preset`, `recipe`, `iters`, `lr`, and so on. Pass
    both results to `train`. Raises UserError for a text that cannot be read or an invalid option,
    and warns if the tokenizer drops characters of the text.
    """
    learned, corpus = load_corpus(*paths, text=text, tokenizer=tokenizer, vocab_size=vocab_size)
    if line := unknown_line(corpus.unknown):
        warnings.warn(line, stacklevel=2)
    model, train = resolve(learned.vocab_size, len(corpus.train), **options)
    check_length(corpus, model.block_size)
    if not train.prompt:
        train = replace(train, prompt=default_prompt(corpus, learned))
    state = initial_state(model, train.seed)
    sources, drawing = [TextSource(Path(name)) for name in corpus.names], Drawing(model.block_size)
    run = Run(
        model=model,
        train=train,
        tokenizer=learned,
        train_tokens=corpus.train,
        val_tokens=corpus.val,
        data=corpus.provenance(Reading()),
        windows=training_windows(corpus, learned, sources, drawing),
        val_windows=validation_windows(corpus, learned, drawing),
    )
    return run, make_backend(backend, model, train, state)


@dataclass(frozen=True)
class LoadedModel:
    """A trained model, ready to generate."""

    config: ModelConfig
    params: Params  # float32, by published name; adapters merged
    tokenizer: Tokenizer
    backend: Scorer

    def generate(self, prompt: str, **sampling: Any) -> str:
        """Return a continuation of `prompt`; `sampling` are fields of SampleConfig."""
        return "".join(self.stream(prompt, **sampling))

    def stream(self, prompt: str, **sampling: Any) -> Iterator[str]:
        """Yield a continuation of `prompt` piece by piece."""
        ids = self.tokenizer.encode(unify_newlines(prompt)).tolist() or [self.tokenizer.bos]
        config, shown = SampleConfig(**sampling), 0
        for [sample] in generate(self.backend, self.config, self.tokenizer, ids, config):
            text, done = sample.text, sample.finish_reason
            ready = len(text) if done else shown_length(text, config.stop)
            if ready > shown:
                yield text[shown:ready]
                shown = ready

    def logits(self, text: str) -> Array:
        """Return the logits after each token of `text`, float32 (T, V).

        With learned positions, `text` may have at most `block_size` tokens. Raises ValueError if it
        has more, or none.
        """
        cache = self.backend.new_cache(1)
        ids = self._encode(text)  # (1, T)
        return np.concatenate(
            [self.backend.logits(ids[:, t : t + 1], cache) for t in range(ids.shape[1])]
        )

    def next_tokens(self, text: str, n: int = 5) -> list[tuple[str, float]]:
        """Return the `n` likeliest tokens after `text` and their probabilities, likeliest first.

        Raises ValueError like `logits`.
        """
        [likely] = insight.candidates(self.logits(text)[-1:], n)
        return [(self.tokenizer.decode([token]), p) for token, p in likely]

    def attention(self, text: str) -> Array:
        """Return how much each token of `text` attends to each other, (L, H, T, T); rows sum to 1.

        `text` may have at most `block_size` tokens. Raises ValueError if it has more, or none.
        """
        ids, most = self._encode(text), self.config.block_size
        if ids.shape[1] > most:
            raise ValueError(f"text has {ids.shape[1]} tokens; at most {most} fit the context")
        return np.concatenate(insight.forward(self.params, self.config, ids)[1])

    def _encode(self, text: str) -> Array:
        """Return the tokens of `text`, (1, T)."""
        ids = self.tokenizer.encode(text)
        if not len(ids):
            raise ValueError(f"text={text!r} has no tokens; give at least one character")
        return ids[None]


def load(path: str | Path = "checkpoints", *, backend: str = "auto") -> LoadedModel:
    """Load a trained model from a checkpoint file or a run folder (its best, else its newest).

    Adapters are merged into their model. Raises CheckpointError if there is none.
    """
    saved = load_checkpoint(path, weights_only=True)
    params, config = merge_adapters(saved.state.params, saved.model)
    name, _ = choose_for_text(backend, config, 1)
    scorer = make_scorer(name, config, params, dtype=saved.train.dtype)
    tokenizer = tokenizer_from_json(saved.tokenizer)
    return LoadedModel(config=config, params=params, tokenizer=tokenizer, backend=scorer)
