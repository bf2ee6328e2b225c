"""The MLX path uses nothing that Metal lacks: the operations of a step and of decoding, recorded.

MLX lists the operations of a graph before it runs, so this needs no Metal. On Metal the fused
operations (norm, rotation, attention) replace the operations that they consist of here.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", exc_type=ImportError)

import mlx.core as mx

import mlx_randygpt
from mlx_randygpt.backends import make_backend
from mlx_randygpt.backends.mlx.backend import MLXBackend
from mlx_randygpt.backends.mlx.embedding import gradient
from mlx_randygpt.backends.mlx.optimizer import rates
from mlx_randygpt.check import SUBJECTS
from mlx_randygpt.config import DTYPES, ModelConfig, TrainConfig
from mlx_randygpt.model import initial_params
from mlx_randygpt.state import Batch, TrainState

MODELS = [subject for subject in SUBJECTS if subject != "lora"]  # products of those weights
BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
FILES = sorted((Path(mlx_randygpt.__file__).parent / "backends" / "mlx").glob("[!_]*.py"))
# MLX's Metal back end throws for float64 and for these (mlx/backend/metal/primitives.cpp).
FORBIDDEN = {"float64", "complex64", "double", "linalg", "cpu", "qr", "svd", "inv", "cholesky"}
FORBIDDEN |= {"eig", "eigh", "lu", "solve", "pinv"}
TYPES = {mx.bool_, mx.uint8, mx.uint16, mx.uint32, mx.int32, mx.int64, mx.float32}
TYPES |= {mx.bfloat16, mx.float16}
# Every operation that training and decoding use. Add one only if Metal has a kernel for it.
HAVE_KERNELS = {
    # unary, binary and ternary .metal files: one thread an element
    "Abs", "Add", "AsType", "Cos", "Cosh", "Divide", "Equal", "Erf", "Exp", "Greater",
    "GreaterEqual", "Less", "LessEqual", "LogicalNot", "LogicalOr", "Maximum", "Minimum",
    "Multiply", "Negative", "NotEqual", "Remainder", "Rsqrt", "Select", "Sin", "Sqrt", "Square",
    "Subtract", "Tanh",
    # kernels of their own; a scatter adds with atomics, see `lacking`
    "AddMM", "Arange", "ArgSort", "Gather", "GatherAxis", "LogSumExp", "Matmul", "RandomBits",
    "Reduce", "Scatter", "ScatterAxis", "Softmax",
    # copies and views, without arithmetic
    "Broadcast", "Concatenate", "Depends", "ExpandDims", "Flatten", "Full", "Reshape", "Slice",
    "SliceUpdate", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten",
}  # fmt: skip


Record = Callable[[Callable[..., Any], list[mx.array]], "Recorded"]


@pytest.fixture(autouse=True)
def record(monkeypatch: pytest.MonkeyPatch) -> Iterator[Record]:
    """(run, arrays) -> what `run` does with them, on the CPU, where all operations are seen."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    graph = importlib.import_module("mlx_graph")
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    with graph.exportable():
        yield lambda run, arrays: Recorded(graph.operations(run, arrays))
    mx.set_default_device(device)


class Recorded:
    """The names of these operations and the types of their values."""

    def __init__(self, operations: list[dict[str, Any]]) -> None:
        ends = [end for part in operations for end in (*part["inputs"], *part["outputs"])]
        self.operations = {part["name"] for part in operations}
        self.types = {dtype for _, _, dtype in ends}
        scatters = [part for part in operations if part["name"].startswith("Scatter")]
        self.scattered = {dtype for part in scatters for _, _, dtype in part["outputs"]}

    def lacking(self) -> set[Any]:
        """Return the operations and types that Metal lacks; it cannot scatter-add eight bytes."""
        wide = {dtype for dtype in self.scattered if dtype.size == 8}
        return (self.operations - HAVE_KERNELS) | (self.types - TYPES) | wide


def backend(recipe: str, tiny_model: Any, tiny_train: Any, **train: Any) -> MLXBackend:
    model, settings = tiny_model(recipe, dropout=0.1), tiny_train(recipe, **train)
    built = make_backend("mlx", model, settings, TrainState(0, initial_params(model, 1), {}))
    assert isinstance(built, MLXBackend)
    return built


@pytest.mark.parametrize("recipe", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_step_uses_what_metal_has(
    recipe: str,
    dtype: str,
    optimizer: str,
    record: Record,
    tiny_model: Callable[..., ModelConfig],
    tiny_train: Callable[..., TrainConfig],
) -> None:
    b = backend(recipe, tiny_model, tiny_train, dtype=dtype, optimizer=optimizer)
    (one_pass,) = b._passes([Batch.of(np.zeros((2, 17), np.int64))])
    inputs, now = b._inputs(one_pass), rates(b._train, 0, 1e-3)

    def step(*weights: mx.array) -> list[mx.array]:
        old = dict(zip(b._weights, weights, strict=True))
        loss, new, moments, norm = b._whole_step(old, b._moments, now, *inputs)
        return [loss, norm, *new.values(), *(m for kind in moments.values() for m in kind.values())]

    recorded = record(step, list(b._weights.values()))
    assert {"Matmul", "ScatterAxis", "RandomBits"} < recorded.operations
    assert recorded.types & {mx.float16, mx.bfloat16} == {getattr(mx, dtype)} - {mx.float32}
    assert recorded.lacking() == set()


def test_the_gradient_of_a_wide_embedding_uses_what_metal_has(record: Record) -> None:
    recorded = record(lambda x, ids: [gradient(ids, x, 9)], [mx.ones((8, 4)), mx.arange(8)])
    assert {"ArgSort", "Scatter"} < recorded.operations
    assert recorded.lacking() == set()


@pytest.mark.parametrize("recipe", MODELS)
@pytest.mark.parametrize("lengths", [[5, 5], [5, 3]])
def test_decoding_uses_what_metal_has(
    recipe: str,
    lengths: list[int],
    record: Record,
    tiny_model: Callable[..., ModelConfig],
    tiny_train: Callable[..., TrainConfig],
) -> None:
    b = backend(recipe, tiny_model, tiny_train)
    names, empty = list(b._named), b.new_cache(2).layers
    ids, none = mx.zeros((2, 4), mx.int32), mx.zeros(2, mx.int32)

    def read(*weights: mx.array) -> list[mx.array]:
        whole = dict(zip(names, weights, strict=True))
        prompt, layers = b._forward.advance(whole, ids, none, empty)
        token, layers = b._forward.advance(whole, ids[:, :1], mx.array(lengths), layers)
        return [prompt, token, *(array for layer in layers for array in layer)]

    recorded = record(read, list(b._named.values()))
    assert {"Matmul", "Softmax", "ScatterAxis"} < recorded.operations
    assert recorded.lacking() == set()


def test_the_recorder_sees_what_metal_lacks(record: Record) -> None:
    def wrong(x: mx.array) -> list[mx.array]:
        many = mx.zeros(4, mx.int64).at[mx.array([1, 1])].add(mx.array([1, 2], mx.int64))
        return [mx.linalg.qr(x)[0], x.astype(mx.float64), many]

    assert record(wrong, [mx.ones((2, 2))]).lacking() == {"QRF", mx.float64, mx.int64}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_source_uses_nothing_that_metal_lacks(file: Path) -> None:
    """Only MLX's names count; NumPy, on the host, can use any type."""
    attributes = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Attribute)]
    names = {n.attr for n in attributes if ast.unparse(n.value).split(".")[0] in ("mx", "nn")}
    assert names
    on_cpu = {"cpu"} if file.name == "selftest.py" else set()  # where it computes what is right
    assert not names & (FORBIDDEN - on_cpu)
