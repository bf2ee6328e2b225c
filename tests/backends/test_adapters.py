"""Adapters: what they change and what they leave alone, in both backends and in commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mlx_randygpt import config
from mlx_randygpt.backends import make_backend, require_features
from mlx_randygpt.backends.base import Backend
from mlx_randygpt.backends.ranks.group import RankError
from mlx_randygpt.check import distance, finite_differences
from mlx_randygpt.checkpoint import NEWEST, load_checkpoint
from mlx_randygpt.cli import group
from mlx_randygpt.config import ConfigError, ModelConfig, TrainConfig
from mlx_randygpt.data.windows import sample_batch
from mlx_randygpt.model import (
    adapter_shapes,
    add_adapters,
    initial_params,
    merge_adapters,
    parameter_shapes,
    trained_count,
)
from mlx_randygpt.state import Batch, Params, TrainState, rng
from mlx_randygpt.training.loop import Run, train

Model = Callable[..., ModelConfig]
Lively = Callable[[ModelConfig], Params]
TRAIN = TrainConfig(optimizer="adamw", threads=2)
each_arch = pytest.mark.parametrize("arch", ["modern", "gpt2"])


@pytest.fixture(params=["numpy", "mlx"])
def name(request: pytest.FixtureRequest) -> str:
    """Each backend in turn."""
    if request.param == "mlx":
        pytest.importorskip("mlx.core", exc_type=ImportError)
    return str(request.param)


@pytest.fixture
def adapted(tiny_model: Model) -> ModelConfig:
    return tiny_model("modern", lora_rank=3, lora_alpha=6.0)


def backend(name: str, model: ModelConfig, params: Params, **changes: Any) -> Backend:
    return make_backend(name, model, replace(TRAIN, **changes), TrainState(0, params, {}))


def batch(seed: int = 0, rows: int = 4) -> Batch:
    return Batch.of(rng(seed, "check").integers(0, 29, (rows, 17)))


# which weights there are


def test_adapters_stand_behind_all_other_weights(tiny_model: Model) -> None:
    plain, model = tiny_model("modern"), tiny_model("modern", lora_rank=3, lora_targets="c_proj")
    names = list(parameter_shapes(model))
    assert names[: len(parameter_shapes(plain))] == list(parameter_shapes(plain))
    assert adapter_shapes(model) == {
        "h.0.attn.c_proj.lora_a": (3, 32), "h.0.attn.c_proj.lora_b": (32, 3),
        "h.0.mlp.c_proj.lora_a": (3, 128), "h.0.mlp.c_proj.lora_b": (32, 3),
        "h.1.attn.c_proj.lora_a": (3, 32), "h.1.attn.c_proj.lora_b": (32, 3),
        "h.1.mlp.c_proj.lora_a": (3, 128), "h.1.mlp.c_proj.lora_b": (32, 3),
    }  # fmt: skip
    assert trained_count(model) == 2 * 3 * (64 + 160)


def test_only_matrices_of_blocks_are_targets(tiny_model: Model) -> None:
    kinds = {n.split(".", 2)[2] for n in adapter_shapes(tiny_model("gpt2", lora_rank=1))}
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert kinds == {f"{layer}.lora_{x}" for layer in layers for x in "ab"}
    assert adapter_shapes(tiny_model("gpt2")) == {}
    some = tiny_model("gpt2", lora_rank=1, lora_targets="c_attn,c_fc")
    two = {n.split(".")[3] for n in adapter_shapes(some)}
    assert two == {"c_attn", "c_fc"}


@pytest.mark.parametrize(
    "wrong",
    [{"lora_rank": -1}, {"lora_rank": 33}, {"lora_alpha": 0.0}, {"lora_targets": "c_attn,wte"}],
)
def test_settings_that_do_not_fit_are_refused(wrong: dict[str, Any], tiny_model: Model) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        tiny_model("modern", **{"lora_rank": 2, **wrong})


# what they compute


@each_arch
def test_at_first_nothing_is_changed(
    arch: str, name: str, tiny_model: Model, lively: Lively
) -> None:
    plain = tiny_model(arch)
    model = replace(plain, lora_rank=4)
    params = add_adapters(model, lively(plain), seed=5)
    both = backend(name, plain, lively(plain)), backend(name, model, params)
    assert both[0].loss(batch()) == both[1].loss(batch())
    firsts = [weight.std() for n, weight in params.items() if n.endswith("lora_a")]
    assert np.allclose(firsts, 32**-0.5, rtol=0.3)


@each_arch
def test_adapters_are_a_change_of_the_weights(
    arch: str, name: str, tiny_model: Model, lively: Lively
) -> None:
    model = tiny_model(arch, lora_rank=3, lora_alpha=6.0)
    params = lively(model)
    whole, plain = merge_adapters(params, model)
    assert plain == tiny_model(arch)
    a, b = (params[f"h.1.mlp.c_fc.lora_{x}"].astype(np.float64) for x in "ab")
    expected = params["h.1.mlp.c_fc.weight"] + 2.0 * np.einsum("or,ri->oi", b, a)
    assert distance(whole["h.1.mlp.c_fc.weight"], expected) < 1e-7
    apart, merged = backend(name, model, params), backend("numpy", plain, whole)
    assert apart.loss(batch()) == pytest.approx(merged.loss(batch()), rel=1e-6)
    ids = rng(2, "check").integers(0, 29, (2, 7))
    caches = apart.new_cache(2), merged.new_cache(2)
    for part in (ids, ids[:, :1]):
        logits = apart.logits(part, caches[0]), merged.logits(part, caches[1])
        assert distance(*logits) < 1e-5  # measured: 6e-7


def test_merging_without_adapters_is_the_same_model(tiny_model: Model, lively: Lively) -> None:
    model = tiny_model("modern")
    params = lively(model)
    assert merge_adapters(params, model) == (params, model)
    assert add_adapters(model, params, 1) is params


@each_arch
@pytest.mark.parametrize("targets", ["all", "c_attn"])
def test_gradients_are_finite_differences(
    arch: str, targets: str, tiny_model: Model, lively: Lively
) -> None:
    model = tiny_model(arch, lora_rank=3, lora_targets=targets)
    found = list(finite_differences(model, lively(model), seed=1))
    assert {f.tensor for f in found} == set(adapter_shapes(model))
    assert max(f.error for f in found) < 5e-6  # measured: 6e-9


@each_arch
def test_both_backends_train_alike(arch: str, tiny_model: Model, lively: Lively) -> None:
    pytest.importorskip("mlx.core", exc_type=ImportError)
    model = tiny_model(arch, lora_rank=3)
    numpy, mlx = (
        backend(n, model, lively(model), weight_decay=0.1, grad_clip=0.5) for n in ("numpy", "mlx")
    )
    ours, theirs = (engine.loss_and_grads(batch())[1] for engine in (numpy, mlx))
    assert ours.keys() == theirs.keys() == adapter_shapes(model).keys()
    assert max(distance(theirs[n], ours[n]) for n in ours) < 1e-5  # measured: 4e-6
    tokens = rng(1, "check").integers(0, 29, 2000)
    for step in range(30):
        norms = [
            engine.train_step([sample_batch(tokens, 8, 16, 1, step)], 1e-3 * (step + 1) / 30)
            for engine in (numpy, mlx)
        ]
    assert norms[0].grad_norm == pytest.approx(norms[1].grad_norm, rel=1e-5)
    a, b = (engine.state().params for engine in (numpy, mlx))
    assert list(a) == list(b) == list(parameter_shapes(model))
    assert max(distance(b[n], a[n]) for n in a) < 1e-5  # measured: 4e-7


# what is trained and what is saved


def test_mlx_goes_on_with_the_frozen_weights_that_its_steps_hold(
    adapted: ModelConfig, lively: Lively
) -> None:
    """A compiled step has them inside it; new arrays would be a second copy on the device."""
    pytest.importorskip("mlx.core", exc_type=ImportError)
    engine: Any = backend("mlx", adapted, lively(adapted))
    held, state = dict(engine._trained.frozen), engine.state()
    engine.restore(state)
    assert all(engine._trained.frozen[name] is held[name] for name in held)
    other = replace(state, params=state.params | {n: state.params[n] + 1 for n in held})
    with pytest.raises(AssertionError, match="frozen weights must not change"):
        engine.restore(other)


def test_only_adapters_move_and_have_moments(
    name: str, adapted: ModelConfig, lively: Lively
) -> None:
    params = lively(adapted)
    engine = backend(name, adapted, params)
    for _ in range(3):
        engine.train_step([batch(), batch(1)], 1e-2)
    state = engine.state()
    moved = {n for n, weight in state.params.items() if not np.array_equal(weight, params[n])}
    assert moved == set(adapter_shapes(adapted))
    assert {k: m.keys() for k, m in state.moments.items()} == {"m": moved, "v": moved}


def test_a_loss_that_is_not_finite_moves_nothing(
    name: str, adapted: ModelConfig, lively: Lively
) -> None:
    params = {**lively(adapted), "wte.weight": np.full((29, 32), np.nan, np.float32)}
    engine = backend(name, adapted, params)
    with np.errstate(all="ignore"):
        result = engine.train_step([batch()], 1e-2)
    assert not np.isfinite(result.grad_norm)
    for weight, shape in adapter_shapes(adapted).items():
        assert shape == params[weight].shape
        assert np.array_equal(engine.state().params[weight], params[weight])


def test_going_back_to_a_state_is_exact(name: str, adapted: ModelConfig, lively: Lively) -> None:
    engine = backend(name, adapted, lively(adapted))
    engine.train_step([batch()], 1e-2)
    kept, losses = engine.state(), []
    for _ in range(2):
        engine.restore(kept)
        engine.train_step([batch(1)], 1e-2)
        losses.append(engine.loss(batch(2)))
    assert losses[0] == losses[1] != engine.loss(batch(1))


def test_resume_is_bit_exact(
    name: str, make_run: Callable[..., tuple[Run, Backend]], tmp_path: Path
) -> None:
    given: dict[str, Any] = {"model": {"dropout": 0.2}, "iters": 8, "weight_decay": 0.1}
    run, begun = make_run("lora", name, **given)
    list(train(run, begun, tmp_path, should_stop=lambda: begun.step >= 3))
    saved = load_checkpoint(tmp_path / NEWEST)
    assert (saved.state.step, saved.model.lora_rank) == (3, 4)
    ends = []
    for state in (None, saved.state):
        _, engine = make_run("lora", name, state=state, **given)
        list(train(run, engine, None))
        ends.append(engine.state())
    for ours, theirs in zip(*([e.params, *e.moments.values()] for e in ends), strict=True):
        assert all(np.array_equal(ours[n], theirs[n]) for n in ours)


def test_a_backend_without_adapters_or_ranks_refuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config.BACKENDS, "third", ("builtins", "object"))
    with pytest.raises(ConfigError, match="backend third has no --lora-rank; mlx and numpy do"):
        require_features("third", adapters=True)
    with pytest.raises(RankError, match="--backend third trains on one rank; mlx and numpy on"):
        require_features("third", ranks=True)
    require_features("third")
    require_features("numpy", adapters=True, ranks=True)


# the command line


def call(*words: object) -> Result:
    return CliRunner().invoke(group, [str(word) for word in words])


@pytest.fixture(scope="module")
def trained(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a base model and adapters that were trained from it."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "text.txt").write_text(text)
    words = ["train", "--data", folder / "text.txt", "--backend", "numpy", "--plain"]
    words += ["--batch-size", 4, "--prompt", "The", "--threads", 2]
    result = call(*words, "--out", folder / "base", "--preset", "mini", "--iters", 3)
    assert result.exit_code == 0, result.output
    words += ["--init-from", folder / "base" / NEWEST, "--out", folder / "fine"]
    result = call(*words, "--iters", 6, "--lora-rank", 2, "--lora-targets", "c_attn,c_fc")
    assert result.exit_code == 0, result.output
    assert "576 trained of " in result.stdout
    return folder


def test_info_tells_the_rank_and_what_is_trained(trained: Path) -> None:
    path = trained / "fine" / NEWEST
    found = json.loads(call("info", path, "--json").stdout)
    assert found["trained_parameters"] == 576
    assert found["model"]["lora_targets"] == "c_attn,c_fc"
    [line] = [line for line in call("info", path).stdout.splitlines() if "Adapters" in line]
    assert line.split(maxsplit=1)[1] == "rank 2, alpha 16, on c_attn,c_fc: 576 trained parameters"


def test_the_frozen_weights_are_those_of_the_base(trained: Path) -> None:
    base, fine = (load_checkpoint(trained / run / NEWEST) for run in ("base", "fine"))
    for weight, array in base.state.params.items():
        assert np.array_equal(array, fine.state.params[weight])
    assert fine.train.optimizer == "adamw"
    assert fine.train.weight_decay == 0


def test_commands_see_the_merged_model(trained: Path) -> None:
    saved = load_checkpoint(trained / "fine" / NEWEST)
    result = call("eval", "--checkpoint", trained / "fine" / NEWEST, "--backend", "numpy", "--json")
    assert json.loads(result.stdout)["loss"] == pytest.approx(saved.progress.val_loss, rel=1e-6)
    result = call("sample", "--checkpoint", trained / "fine" / NEWEST, "--max-tokens", 5)
    assert result.exit_code == 0, result.output


def test_adapters_of_adapters_begin_from_the_merged_model(trained: Path) -> None:
    fine = trained / "fine" / NEWEST
    words = ["--init-from", fine, "--data", trained / "text.txt", "--out", trained / "again"]
    result = call("train", *words, "--iters", 1, "--lora-rank", 1, "--plain", "--backend", "numpy")
    assert result.exit_code == 0, result.output
    saved = load_checkpoint(fine)
    whole, _ = merge_adapters(saved.state.params, saved.model)
    again = load_checkpoint(trained / "again" / NEWEST)
    assert again.model.lora_rank == 1
    assert again.model.lora_targets == "all"
    assert all(np.array_equal(again.state.params[n], weight) for n, weight in whole.items())


def test_a_run_goes_on_with_its_own_rank(trained: Path) -> None:
    words = ["train", "--resume", "--out", trained / "fine", "--plain", "--iters", 7]
    wrong = call(*words, "--lora-rank", 3)
    assert wrong.exit_code == 1
    assert wrong.stderr.startswith("Error: Checkpoint lora_rank 2 != lora_rank 3; omit the option")
    right = call(*words, "--config", trained / "fine" / "config.toml")
    assert right.exit_code == 0, right.output


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--lora-rank", 2], 2, "give it with --init-from"),
        (["--lora-alpha", 2.0], 2, "need --lora-rank"),
        (["--lora-rank", 2, "--optimizer", "muon"], 1, "adapters are trained by adamw"),
        (["--lora-rank", 99], 1, "lora_rank=99 is too large; it must be at most 32"),
    ],
)
def test_options_that_do_not_fit_are_one_line(
    words: list[Any], code: int, said: str, trained: Path
) -> None:
    origin = [] if code == 2 else ["--init-from", trained / "base" / NEWEST]
    result = call(
        "train", *words, *origin, "--data", trained / "text.txt", "--out", trained / "none"
    )
    assert result.exit_code == code
    assert said in result.stderr.splitlines()[-1]


def test_first_weights_do_not_depend_on_adapters(tiny_model: Model) -> None:
    plain, model = tiny_model("modern"), tiny_model("modern", lora_rank=3)
    one, other = initial_params(plain, 1), initial_params(model, 1)
    assert all(np.array_equal(one[n], other[n]) for n in one)
    assert not any(other[n].any() for n in other if n.endswith("lora_b"))
