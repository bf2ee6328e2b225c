"""What the tests share: strict numerics, a small text, tiny models and runs of them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

os.environ["MLX_ENABLE_TF32"] = "0"  # before mlx is imported: TF32 drops 13 bits of a factor
if os.environ.get("MLXGPT_TEST_DEVICE") == "cpu":  # else the device that MLX takes by itself
    with contextlib.suppress(ImportError):
        import mlx.core as mx

        mx.set_default_device(mx.cpu)

import numpy as np
import pytest

from mlx_randygpt.backends import make_backend
from mlx_randygpt.backends.base import Backend
from mlx_randygpt.check import VARIANTS, recipe_of
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.data.corpus import encode_corpus
from mlx_randygpt.model import Role, initial_params, parameters
from mlx_randygpt.recipes import RECIPES
from mlx_randygpt.state import Params, TrainState, rng
from mlx_randygpt.tokenizers.chars import CharTokenizer
from mlx_randygpt.training.loop import Run

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
np.seterr(over="raise", invalid="raise", divide="raise")  # a backend's threads do as this one

WORDS = """the old red ship and a small grey bird over hill under moon king queen says runs sleeps
jumps quick zebra five boxes vexed wind"""


@pytest.fixture(scope="session")
def text() -> str:
    """About 4,000 characters of sentences, the same each time."""
    random = Random(7)
    lines = (random.choices(WORDS.split(), k=random.randint(4, 9)) for _ in range(120))
    return "".join(f"{' '.join(line).capitalize()}.\n" for line in lines)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., ModelConfig]:
    """(recipe, gpt2 or lora, **changes) -> two layers of width 32 that read 16 tokens."""

    def build(recipe: str, **changes: Any) -> ModelConfig:
        sizes: dict[str, Any] = {
            "vocab_size": 29,
            "block_size": 16,
            "n_layer": 2,
            "n_head": 4,
            "n_embd": 32,
            "rope_base": 500.0,  # not the default, so that whatever forgets it fails
        }
        switches = RECIPES[recipe_of(recipe)]["model"] | VARIANTS.get(recipe, {})
        return ModelConfig(**{**sizes, **switches, **changes})

    return build


@pytest.fixture(scope="session")
def tiny_train() -> Callable[..., TrainConfig]:
    """(recipe, **changes) -> the recipe's settings for a short run on two threads."""

    def build(recipe: str, **changes: Any) -> TrainConfig:
        recipe = recipe_of(recipe)
        short = {"recipe": recipe, "iters": 20, "batch_size": 8, "threads": 2, "warmup": 5}
        quiet = {"eval_every": 0, "sample_every": 0, "save_every": "1000000", "prompt": "The"}
        return TrainConfig(**{**RECIPES[recipe]["train"], **short, **quiet, **changes})

    return build


@pytest.fixture(scope="session")
def lively() -> Callable[..., Params]:
    """(model, seed=1) -> weights far from their first values, normal with deviation 0.15, so that
    no error hides in zeros or small activations. Gains lie around 1; the last ones around -1, for
    a head that is the embedding would repeat what it reads."""

    def build(model: ModelConfig, seed: int = 1) -> Params:
        random = rng(seed, "check")
        weights = {
            weight.name: random.standard_normal(weight.shape, np.float32) * np.float32(0.15)
            for weight in parameters(model)
        }
        gains = [weight.name for weight in parameters(model) if weight.role is Role.GAIN]
        for name in gains:
            weights[name] += -1 if name == gains[-1] else 1
        return weights

    return build


@pytest.fixture
def make_run(
    text: str, tiny_model: Callable[..., ModelConfig], tiny_train: Callable[..., TrainConfig]
) -> Callable[..., tuple[Run, Backend]]:
    """(recipe, backend="numpy", *, model={}, state=None, on=text, **train) -> a run on the text
    and the backend that holds its weights, fresh or from `state`."""

    def build(
        recipe: str,
        backend: str = "numpy",
        *,
        model: dict[str, Any] | None = None,
        state: TrainState | None = None,
        on: str = text,
        **train: Any,
    ) -> tuple[Run, Backend]:
        tokenizer = CharTokenizer.train(on)
        corpus = encode_corpus({"text": on}, tokenizer)
        settings = tiny_train(recipe, **train)
        shape = tiny_model(recipe, vocab_size=tokenizer.vocab_size, **(model or {}))
        first = state or TrainState(0, initial_params(shape, settings.seed), {})
        data = {"paths": [], "characters": len(on), "sha256": corpus.sha256}
        run = Run(shape, settings, tokenizer, corpus.train, corpus.val, data)
        return run, make_backend(backend, shape, settings, first)

    return build


@pytest.fixture
def dialogue_run(
    text: str,
    tiny_model: Callable[..., ModelConfig],
    tiny_train: Callable[..., TrainConfig],
    lively: Callable[..., Params],
) -> Callable[..., tuple[Run, Backend]]:
    """(**model changes) -> a run of a lively model with the tokens of dialogue, and its backend."""

    def build(**changes: Any) -> tuple[Run, Backend]:
        tokenizer = CharTokenizer.train(text + "<|end|>").with_dialogue()
        corpus, train = encode_corpus({"text": text}, tokenizer), tiny_train("portable")
        model = tiny_model("portable", vocab_size=tokenizer.vocab_size, block_size=64, **changes)
        state = TrainState(3, lively(model), {})
        data = {"paths": [], "characters": len(text), "sha256": corpus.sha256}
        run = Run(model, train, tokenizer, corpus.train, corpus.val, data)
        return run, make_backend("numpy", model, train, state)

    return build


@pytest.fixture(scope="session")
def built_docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the docs as `mkdocs build --strict` writes them."""
    build = pytest.importorskip("mkdocs.commands.build").build
    load_config = pytest.importorskip("mkdocs.config").load_config
    folder = tmp_path_factory.mktemp("site")
    config = Path(__file__).parents[1] / "mkdocs.yml"
    build(load_config(str(config), site_dir=str(folder), strict=True))
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium under playwright."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
