"""Training on conversations: masked gradients, exact resumption, weights, and fine-tuning."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mlx_randygpt.backends import make_backend, mlx_device
from mlx_randygpt.backends.ranks.group import share
from mlx_randygpt.check import cross_check, finite_differences
from mlx_randygpt.checkpoint import BEST, NEWEST, Checkpoint, load_checkpoint
from mlx_randygpt.cli import group
from mlx_randygpt.cli.training import text as cli_text
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.data.corpus import Loader
from mlx_randygpt.model import add_tokens, parameters
from mlx_randygpt.state import IGNORED, Batch, Params, TrainState, rng
from mlx_randygpt.tokenizers import tokenizer_from_json

Model = Callable[..., ModelConfig]
Lively = Callable[[ModelConfig], Params]
BACKENDS = ["numpy", *(["mlx"] if mlx_device()[0] else [])]


def masked_batch(model: ModelConfig) -> Batch:
    """Five windows that end early, of which 40 % of the tokens are only read."""
    random = rng(1, "check")
    ids = random.integers(0, model.vocab_size, 400)
    tokens = np.where(random.random(400) < 0.4, ~ids, ids).astype(np.int32)
    starts = np.array([0, 40, 90, 200, 390])
    return Batch(tokens, starts, model.block_size, ends=starts + np.array([17, 9, 3, 14, 10]))


@pytest.mark.parametrize("recipe", ["classic", "modern", "portable", "gpt2", "lora"])
def test_gradients_of_a_masked_batch_are_right(
    recipe: str, tiny_model: Model, lively: Lively
) -> None:
    model = tiny_model(recipe)
    batch, params = masked_batch(model), lively(model)
    assert 0 < batch.n_targets() < 60
    findings = list(finite_differences(model, params, 1, batch))
    if "mlx" in BACKENDS:
        findings += cross_check(model, params, 1, "mlx", batch=batch)
    assert [finding for finding in findings if not finding.holds] == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_past_the_end_of_a_window_has_no_effect(
    backend: str, tiny_model: Model, tiny_train: Callable[..., Any], lively: Lively
) -> None:
    model = tiny_model("modern")
    batch = masked_batch(model)
    engine = make_backend(backend, model, tiny_train("modern"), TrainState(0, lively(model), {}))
    tokens = np.asarray(batch.tokens).copy()
    for start, end in zip(batch.starts, batch.ends, strict=True):  # type: ignore[arg-type]
        tokens[end : start + model.block_size + 1] = 1
    other = Batch(tokens, batch.starts, batch.block_size, ends=batch.ends)
    assert not np.array_equal(other.x(), batch.x())
    (loss, grads), (again, changed) = map(engine.loss_and_grads, (batch, other))
    assert loss == again
    for name in grads:
        np.testing.assert_allclose(changed[name], grads[name], rtol=1e-5, atol=1e-7)


def test_ranks_share_a_masked_batch(tiny_model: Model) -> None:
    batch = masked_batch(tiny_model("modern"))
    for size in (2, 3, 7):
        parts = [share(batch, rank, size) for rank in range(size)]
        targets = np.concatenate([part.y().ravel() for part in parts])
        assert targets[targets != IGNORED].tolist() == batch.y()[batch.y() != IGNORED].tolist()
        assert sum(part.n_targets() for part in parts) == batch.n_targets()


def test_new_tokens_leave_the_old_ones_as_they_are(tiny_model: Model, lively: Lively) -> None:
    for recipe in ("modern", "gpt2"):
        model = tiny_model(recipe)
        params = lively(model)
        grown, larger = add_tokens(params, model, model.vocab_size + 4, 1)
        assert {n: a.shape for n, a in grown.items()} == {
            p.name: p.shape for p in parameters(larger)
        }
        for name, rows in params.items():
            assert np.array_equal(grown[name][: len(rows)], rows)
        new = grown["wte.weight"][-4:]
        assert 0.5 < new.std() / params["wte.weight"].std() < 1.5
        assert add_tokens(params, model, model.vocab_size, 1) == (params, model)


# The command, from files to checkpoints

SMALL = "--n-layer=1 --n-head=2 --n-embd=16 --block-size=16 --batch-size=8 --plain"
SMALL += " --backend=numpy --eval-every=2 --sample-every=0 --threads=1"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with talks.jsonl, notes.txt and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXGPT_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"Say {i}!", "completion": f"It is {i}."} for i in range(60)]
    Path("talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("notes.txt").write_text("The cat sat on the mat. " * 60)
    return tmp_path


def done(words: str) -> str:
    result = CliRunner().invoke(group, shlex.split(words))
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(words: str) -> str:
    result = CliRunner().invoke(group, shlex.split(words))
    assert result.exit_code == 1, result.output
    return result.stderr


def ended(out: str) -> Checkpoint:
    return load_checkpoint(Path(out) / NEWEST)


KINDS = [
    "--data=talks.jsonl",
    "--data=talks.jsonl --pack",
    "--data=notes.txt --data=talks.jsonl:0.3",
    "--data=talks.jsonl --tokenizer=bpe --vocab-size=300 --dropout=0.1",
    "--data=talks.jsonl --recipe=portable",
]


@pytest.mark.parametrize(
    ("kind", "cached"), [*((kind, False) for kind in KINDS), (KINDS[0], True), (KINDS[2], True)]
)
def test_resume_is_bit_exact(
    kind: str, cached: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cached:
        monkeypatch.setattr(cli_text, "Loader", partial(Loader, small=0))
    done(f"train {SMALL} --iters=3 --schedule=constant --out=stopped {kind}")
    done(f"train {SMALL} --iters=6 --schedule=constant --out=whole {kind}")
    done("train --plain --backend=numpy --iters=6 --resume --out=stopped")
    whole, resumed = ended("whole"), ended("stopped")
    for name, weight in whole.state.params.items():
        assert np.array_equal(resumed.state.params[name], weight), name
    assert (resumed.data, resumed.progress.val_loss) == (whole.data, whole.progress.val_loss)
    assert whole.data["dialogue"] is True
    facts = json.loads(done(f"info --json whole/{NEWEST}"))
    assert facts["dialogue"] is True
    score = json.loads(done(f"eval --checkpoint=whole/{NEWEST} --json --backend=numpy"))
    assert score["loss"] == pytest.approx(facts["val_loss"], rel=1e-6)
    if "bpe" not in kind:
        assert score["tokens"] == 6 * len("It is 54.") + 6  # of six answers, and their ends


@pytest.mark.slow
def test_resume_is_bit_exact_on_mlx(folder: Path) -> None:
    pytest.importorskip("mlx.core", exc_type=ImportError)
    on_mlx = SMALL.replace("--backend=numpy", "--backend=mlx")
    assert on_mlx != SMALL
    for kind in KINDS[:2]:
        done(f"train {on_mlx} --iters=3 --schedule=constant --overwrite --out=stopped {kind}")
        done(f"train {on_mlx} --iters=6 --schedule=constant --overwrite --out=whole {kind}")
        done("train --plain --backend=mlx --iters=6 --resume --out=stopped")
        whole, resumed = ended("whole"), ended("stopped")
        for name, weight in whole.state.params.items():
            assert np.array_equal(resumed.state.params[name], weight), (kind, name)


def test_the_config_of_a_run_makes_the_same_run_again(folder: Path) -> None:
    data = "--data=notes.txt --data=talks.jsonl:0.3 --tokenizer=bpe --vocab-size=290"
    done(f"train {SMALL} --iters=3 --out=first {data}")
    done("train --config=first/config.toml --out=second --plain")
    first, second = ended("first"), ended("second")
    assert first.data["paths"] == [f"{folder}/notes.txt", f"{folder}/talks.jsonl:0.3"]
    assert (second.data, second.tokenizer) == (first.data, first.tokenizer)
    for name, weight in first.state.params.items():
        assert np.array_equal(second.state.params[name], weight), name


def test_a_sample_answers_a_question_of_the_validation_text(folder: Path) -> None:
    out = done(f"train {SMALL} --iters=1 --out=run --data=talks.jsonl")
    assert "sample 1\n    Say 54!\n" in out
    row = json.loads((folder / "run" / "samples.jsonl").read_text())
    assert row["prompt"] == "Say 54!\n"


def test_a_model_of_texts_learns_dialogue_from_its_own_weights(folder: Path) -> None:
    done(f"train {SMALL} --iters=2 --out=base --data=notes.txt")
    small = SMALL.replace("--n-layer=1 --n-head=2 --n-embd=16 --block-size=16 ", "")
    words = f"--init-from=base/{BEST} --data=talks.jsonl"
    out = done(f"train {small} --iters=2 --out=tuned {words}")
    assert "their rows begin at random values." in out
    base, tuned = ended("base"), ended("tuned")
    assert tuned.model.vocab_size == base.model.vocab_size + 4
    assert tokenizer_from_json(tuned.tokenizer).decode([0, 1]) == tokenizer_from_json(
        base.tokenizer
    ).decode([0, 1])
    adapters = f"train {small} --iters=2 --lora-rank=2 --data=talks.jsonl"
    assert "at random values" not in done(f"{adapters} --out=adapted --init-from=tuned/{BEST}")
    assert ended("adapted").model.vocab_size == tuned.model.vocab_size
    assert "adapters do not change" in done(f"{adapters} --out=poor --init-from=base/{BEST}")


def test_a_line_says_how_many_conversations_are_cut(folder: Path) -> None:
    short = SMALL.replace("--block-size=16", "--block-size=8")
    out = done(f"train {short} --iters=1 --out=run --data=talks.jsonl")
    assert "54 of 54 conversations are longer than a context of 8 tokens and are cut ahead" in out


def test_a_model_of_texts_is_not_evaluated_on_conversations(folder: Path) -> None:
    done(f"train {SMALL} --iters=1 --out=base --data=notes.txt")
    line = refused(f"eval --backend=numpy --checkpoint=base/{NEWEST} --data=talks.jsonl")
    assert "has no text under 'text'; it has prompt, completion" not in line
    assert line.endswith(
        "Error: the text has conversations, but the vocabulary of this model has no tokens for "
        "them; mlxgpt train --init-from teaches it dialogue, and --as-text reads them as plain "
        "text\n"
    )


def test_a_run_that_an_older_version_began_reads_texts(folder: Path) -> None:
    saved = {"encoding": "utf-8", "text_field": "text", "paths": []}
    assert cli_text.reading({}, saved).as_text
    assert not cli_text.reading({}, saved | {"as_text": False}).as_text
    assert not cli_text.reading({}).as_text
    assert cli_text.reading({"as_text": True}, {}).as_text


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_learns_to_answer(backend: str, folder: Path) -> None:
    words = "--n-layer=2 --n-head=2 --n-embd=32 --block-size=24 --batch-size=16 --plain"
    words += f" --backend={backend} --eval-every=0 --sample-every=0 --threads=1 --iters=60"
    out = done(f"train {words} --out=run --data=talks.jsonl")
    assert "Say 54!\n    It is " in out.split("sample 60")[1]
    assert ended("run").progress.best_loss < 0.8  # measured: 0.19 and 0.20
