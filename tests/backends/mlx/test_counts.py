"""The calls of one NumPy step and the kernels of one MLX step, compared with committed tables.

More of them make it slower. After an intended change, `python benchmarks/roofline.py --counts` and
`python benchmarks/counts_mlx.py --write` rewrite the tables.
"""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_randygpt.check import distance
from mlx_randygpt.config import TrainConfig
from mlx_randygpt.state import Params, TrainState

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
Build = Callable[..., Any]


@pytest.fixture
def roofline(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("roofline")


def test_a_step_calls_what_the_table_says(roofline) -> None:  # type: ignore[no-untyped-def]
    assert roofline.counts() == json.loads((BENCHMARKS / "counts.json").read_text())


def test_the_products_of_a_step_are_those_of_the_model(roofline) -> None:  # type: ignore[no-untyped-def]
    """Six FLOP for each weight and token: three products per matrix, none for the embedding."""
    model = roofline.sized("small", "modern")
    step = roofline.stepper(model, 4)
    flop = sum(values[1] for values in roofline.recorded(step).values())
    weights = 12 * model.n_layer * model.n_embd**2 + model.vocab_size * model.n_embd
    assert flop == 6 * weights * 4 * model.block_size


@pytest.fixture
def counts_mlx(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return the counting benchmark on MLX's CPU device, which can trace every operation."""
    mx = pytest.importorskip("mlx.core", exc_type=ImportError)
    monkeypatch.syspath_prepend(BENCHMARKS)
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield importlib.import_module("counts_mlx")
    mx.set_default_device(device)


def test_an_mlx_step_takes_the_kernels_that_the_table_lists(counts_mlx: Any) -> None:
    found = counts_mlx.counts()
    assert found == json.loads((BENCHMARKS / "counts_mlx.json").read_text())
    # by autodiff and one weight after another it was 1,050
    assert found["modern"]["kernels"] <= 470
    assert found["modern with kernels"]["kernels"] <= 300
    assert "copy for Kernel" not in found["modern with kernels"]


@pytest.mark.parametrize("recipe", ["classic", "modern", "portable", "gpt2"])
def test_traced_gradients_are_mlx_s_own(
    counts_mlx: Any, recipe: str, tiny_model: Build, lively: Build
) -> None:
    import numpy as np

    from mlx_randygpt.backends.mlx.backend import MLXBackend
    from mlx_randygpt.state import Batch

    model = tiny_model(recipe)
    batch = Batch.of(np.arange(34).reshape(2, 17) % 29)

    def outcome() -> tuple[float, Params]:
        state = TrainState(0, lively(model), {})
        return MLXBackend(model, TrainConfig(), state).loss_and_grads(batch)

    loss, grads = outcome()
    with counts_mlx.mlx_graph.exportable():
        traced_loss, traced_grads = outcome()
    assert traced_loss == loss
    for name, grad in grads.items():  # the same bits, but gpt2's head adds to its embedding
        assert distance(traced_grads[name], grad) < 1e-6


@pytest.mark.parametrize("recipe", ["modern", "portable"])
def test_operations_are_fused_as_mlx_fuses_them(
    counts_mlx: Any, recipe: str, tiny_model: Build, tmp_path: Path
) -> None:
    """A graph that is compiled can be drawn, but not exported with shapes."""
    import mlx.core as mx

    model, train = tiny_model(recipe), counts_mlx.settings("mini", recipe, 2)[1]
    step, arrays = counts_mlx.step_of(model, train)
    mx.export_to_dot(str(tmp_path / "step.dot"), *mx.compile(step)(*arrays))
    names = re.findall(r'label ="(\w+)', (tmp_path / "step.dot").read_text())
    renamed = {"CustomTransforms": "Depends", "Sum": "Reduce"}
    drawn = Counter(renamed.get(name, name).replace("Rsqrt", "Sqrt") for name in names)
    with counts_mlx.mlx_graph.exportable():
        graph = counts_mlx.mlx_graph.Graph(*counts_mlx.step_of(model, train))
    graph.fuse()
    fused = Counter(
        "".join([n.name, *n.arguments]) if n.name == "Compiled" else n.name for n in graph.nodes
    )
    assert fused == drawn
