"""What one compiled MLX step launches on Metal: kernels by kind, and the copies among them by name.

    python benchmarks/counts_mlx.py [--preset small] [--batch-size 64] [--dtype float32] [--write]

Nothing runs. The step is traced as in training and fused as `mx.compile` does (mlx_graph.py), and
the layout of each array is followed through MLX's Metal back end (0.32; its sources are named
below), which decides what is copied and which operation takes several kernels. Each recipe is
counted with MLX's operations alone, and with this program's kernels ("Kernel"). `--write` writes
counts_mlx.json, which a test holds.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_graph
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_randygpt.backends.mlx.backend import MLXBackend
from mlx_randygpt.backends.mlx.optimizer import rates
from mlx_randygpt.config import DTYPES, ModelConfig, TrainConfig
from mlx_randygpt.model import initial_state
from mlx_randygpt.recipes import PRESETS, RECIPES
from mlx_randygpt.state import Batch

COUNTS = Path(__file__).parent / "counts_mlx.json"
VOCAB = 67
SMALL_REDUCTION = 4 * 1024  # values; more take a second pass
SPLIT_TILES, TILE = 1024, 16  # products of few tiles and many terms are split (metal/matmul.cpp)
RESHAPES = {"Flatten", "Reshape", "Unflatten"}
SEVERAL = {"Scatter": 2, "ScatterAxis": 2, "SliceUpdate": 2}  # a copy, then the change


@dataclass(frozen=True)
class Layout:
    """Where the values of an array lie in its buffer."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    n_values: int  # of the buffer that are in use

    @staticmethod
    def rows(shape: Sequence[int]) -> Layout:
        """Return the layout of a new array."""
        strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
        return Layout(tuple(shape), strides, prod(shape))

    @property
    def by_rows(self) -> bool:
        """Whether values follow each other in the order of the last axis, without holes."""
        return self._follows(range(len(self.shape) - 1, -1, -1))

    @property
    def by_columns(self) -> bool:
        """Whether they do in the order of the first axis."""
        return self._follows(range(len(self.shape)))

    def _follows(self, axes: Sequence[int]) -> bool:
        expected = 1
        for axis in axes:
            if self.shape[axis] != 1 and self.strides[axis] != expected:
                return False
            expected *= self.shape[axis]
        return True

    @property
    def dense(self) -> bool:
        """Whether the buffer has no holes between its values."""
        used = prod(n for n, stride in zip(self.shape, self.strides, strict=True) if stride > 0)
        return used == self.n_values

    def collapsed(self) -> tuple[list[int], list[int]]:
        """Return shape and strides with neighbouring axes merged where they can be."""
        shape, strides = [self.shape[0]], [self.strides[0]]
        for n, stride in zip(self.shape[1:], self.strides[1:], strict=True):
            if n == 1:
                continue
            if stride * n == strides[-1]:
                shape[-1], strides[-1] = shape[-1] * n, stride
            else:
                shape.append(n)
                strides.append(stride)
        return shape, strides


class Metal:
    """The kernels that a graph takes on Metal, counted by kind."""

    def __init__(self, graph: mlx_graph.Graph) -> None:
        self.graph = graph
        self.layouts: dict[str, Layout] = {}
        self.kernels: Counter[str] = Counter()
        for node in graph.nodes:
            self._run(node)

    def layout(self, name: str) -> Layout:
        """Return the layout of an array; inputs and constants lie by rows."""
        return self.layouts.get(name) or Layout.rows(self.graph.shapes[name])

    def _run(self, node: mlx_graph.Node) -> None:
        inputs = [self.layout(name) for name in node.inputs]
        outputs = [self.graph.shapes[name] for name in node.outputs]
        found = [Layout.rows(shape) for shape in outputs]
        if node.name in VIEW:
            found = VIEW[node.name](node, inputs, outputs)
        elif node.name in RESHAPES:
            view = reshaped(inputs[0], outputs[0])
            if view is None:
                self.kernels[f"copy for {node.name}"] += 1
            found = [view or found[0]]
        elif node.name == "Concatenate":
            self.kernels["copy for Concatenate"] += len(inputs)
        elif node.name == "Reduce":
            self.kernels["Reduce"] += reduction_kernels(inputs[0], node.arguments[1])
        elif node.name == "Kernel":
            read = self.graph.maker[node.inputs[0]].inputs[1:]
            self.kernels["copy for Kernel"] += sum(not self.layout(name).by_rows for name in read)
            self.kernels["Kernel"] += 1
        elif node.name in ("Matmul", "AddMM"):
            self._product(node.name, inputs, outputs[0])
        else:
            self.kernels[node.name] += SEVERAL.get(node.name, 1)
            found = self._elementwise(node, inputs, found)
        self.layouts |= dict(zip(node.outputs, found, strict=True))

    def _elementwise(
        self, node: mlx_graph.Node, inputs: list[Layout], found: list[Layout]
    ) -> list[Layout]:
        """Return the layouts of the outputs; count the copies of inputs that do not fit."""
        arrays = [x for x in inputs if prod(x.shape) > 1 or x.n_values > 1]
        if node.name in ("RMSNorm", "Softmax"):
            x = inputs[0]
            spaced = node.name == "RMSNorm" and len(x.shape) > 1 and x.shape[-2] > 1
            spaced = spaced and x.strides[-2] not in (0, x.shape[-1])
            if not x.dense or x.strides[-1] != 1 or spaced:
                self.kernels[f"copy for {node.name}"] += 1
                return found
            return [x]
        if node.name == "RMSNormVJP":
            self.kernels["copy for RMSNormVJP"] += sum(not x.by_rows for x in inputs)
            return found
        if node.name == "RoPE":
            self.kernels["copy for RoPE"] += not rotates_in_place(inputs[0])
            return found
        same = [x for x in arrays if x.shape == found[0].shape]
        is_same = len(same) == len(arrays) > 0 and node.name in mlx_graph.FUSABLE | {"Compiled"}
        if is_same and all(x.by_columns for x in same):
            return [Layout(x.shape, same[0].strides, x.n_values) for x in found]
        if is_same and len(same) == 1 and same[0].dense:
            return [Layout(x.shape, same[0].strides, same[0].n_values) for x in found]
        return found

    def _product(self, name: str, inputs: list[Layout], shape: tuple[int, ...]) -> None:
        """Count a product, the sum of its parts if it is split, and copies of its factors."""
        self.kernels[name] += 1
        (*batch, m, n), k = shape, inputs[0].shape[-1]
        for x in inputs[:2]:
            self.kernels[f"copy for {name}"] += 1 not in x.strides[-2:]
        if m == n == prod(batch) == 1:  # a dot product: parts, their sum, its copy
            self.kernels["second pass of a dot product"] += 2
            return
        tiles = -(-m // TILE) * -(-n // TILE)
        is_one = prod(batch) == 1
        if is_one and min(m, n) > 1 and tiles <= SPLIT_TILES and k // TILE >= 8 and k >= max(m, n):
            self.kernels["sum of a split product"] += 1


def reshaped(x: Layout, shape: tuple[int, ...]) -> Layout | None:
    """Return the layout under another shape, or None if the values must be copied."""
    if x.by_rows or not x.shape:
        return Layout(
            shape, Layout.rows(shape).strides if x.shape else (0,) * len(shape), x.n_values
        )
    left, strides = x.collapsed()
    found, axis = list[int](), 0
    for n in shape:
        if axis < len(left) and left[axis] % n == 0:
            left[axis] //= n
            found.append(left[axis] * strides[axis])
            axis += left[axis] == 1
        elif n == 1:
            found.append(found[-1])
        else:
            return None
    return Layout(shape, tuple(found), x.n_values)


def reduction_kernels(x: Layout, axes: Sequence[int]) -> int:
    """Return 2 for a reduction that Metal does in two passes (metal/reduce.cpp), else 1."""
    n_outputs = prod(n for axis, n in enumerate(x.shape) if axis not in axes)
    n_terms = prod(x.shape) // max(1, n_outputs)
    if len(axes) == len(x.shape):
        return 1 + (n_terms > SMALL_REDUCTION)
    if any(x.strides[axis] == 1 for axis in axes):  # along rows
        return 1
    return 1 + (n_terms > 256 and n_outputs < 32 * 1024)


def rotates_in_place(x: Layout) -> bool:
    """Whether the rotation reads this layout as it is (metal/rope.cpp)."""
    if x.by_rows or len(x.shape) < 4:
        return True
    _, n, t, d = x.shape
    return x.strides == (t * n * d, d, n * d, 1)


def broadcast(node: mlx_graph.Node, inputs: list[Layout], outputs: list[Any]) -> list[Layout]:
    x, shape = inputs[0], outputs[0]
    new = len(shape) - len(x.shape)
    strides = [
        0 if axis < new or x.shape[axis - new] != n else x.strides[axis - new]
        for axis, n in enumerate(shape)
    ]
    return [Layout(shape, tuple(strides), x.n_values)]


def sliced(node: mlx_graph.Node, inputs: list[Layout], outputs: list[Any]) -> list[Layout]:
    x, (_, _, steps) = inputs[0], node.arguments
    strides = tuple(stride * step for stride, step in zip(x.strides, steps, strict=True))
    last = sum(stride * (n - 1) for stride, n in zip(strides, outputs[0], strict=True))
    return [Layout(outputs[0], strides, last + 1)]


def split(node: mlx_graph.Node, inputs: list[Layout], outputs: list[Any]) -> list[Layout]:
    return [Layout(shape, inputs[0].strides, prod(shape)) for shape in outputs]


def transposed(node: mlx_graph.Node, inputs: list[Layout], outputs: list[Any]) -> list[Layout]:
    x, (axes,) = inputs[0], node.arguments
    return [Layout(outputs[0], tuple(x.strides[axis] for axis in axes), x.n_values)]


def expanded(node: mlx_graph.Node, inputs: list[Layout], outputs: list[Any]) -> list[Layout]:
    strides = list(inputs[0].strides)
    for axis in node.arguments[0]:
        strides.insert(axis, 1)
    return [Layout(outputs[0], tuple(strides), inputs[0].n_values)]


def squeezed(node: mlx_graph.Node, inputs: list[Layout], outputs: list[Any]) -> list[Layout]:
    kept = [s for axis, s in enumerate(inputs[0].strides) if axis not in node.arguments[0]]
    return [Layout(outputs[0], tuple(kept), inputs[0].n_values)]


def unchanged(node: mlx_graph.Node, inputs: list[Layout], outputs: list[Any]) -> list[Layout]:
    return inputs[: len(outputs)]


VIEW: dict[str, Callable[..., list[Layout]]] = {
    "Broadcast": broadcast,
    "Depends": unchanged,
    "ExpandDims": expanded,
    "Slice": sliced,
    "Split": split,
    "Squeeze": squeezed,
    "StopGradient": unchanged,
    "Transpose": transposed,
}


def step_of(
    model: ModelConfig, train: TrainConfig
) -> tuple[Callable[..., list[mx.array]], Sequence[mx.array]]:
    """Return one step of one pass, as a GPU takes it, as a function of arrays, and these."""
    backend = MLXBackend(model, train, initial_state(model, 1))
    backend._forward.on_gpu = True
    tokens = np.zeros((train.batch_size, model.block_size + 1), np.int32)
    (one_pass,) = backend._passes([Batch.of(tokens)])
    *windows, keys = backend._inputs(one_pass)
    state = backend._weights, backend._moments, rates(train, 0, train.lr), *windows
    names, arrays = zip(*tree_flatten(state), strict=True)

    def step(*arrays: mx.array) -> list[mx.array]:
        inputs = tree_unflatten(list(zip(names, arrays, strict=True)))
        return [array for _, array in tree_flatten(backend._whole_step(*inputs, keys))]

    return step, arrays


def settings(
    preset: str, recipe: str, batch_size: int, dtype: str = "float32"
) -> tuple[ModelConfig, TrainConfig]:
    """Return a preset's model and the settings of its training."""
    size = PRESETS[preset]
    model = ModelConfig(
        vocab_size=VOCAB,
        block_size=size.block_size,
        n_layer=size.n_layer,
        n_head=size.n_head,
        n_embd=size.n_embd,
        **RECIPES[recipe]["model"],
    )
    given = {"recipe": recipe, "batch_size": batch_size, "dtype": dtype}
    return model, TrainConfig(**{**RECIPES[recipe]["train"], **given})


def counts(preset: str = "small", batch_size: int = 64, dtype: str = "float32") -> dict[str, Any]:
    """Return the kernels of one step by recipe and kind, and their sums."""
    found = {}
    for recipe, own in product(sorted(RECIPES), (False, True)):
        with mlx_graph.for_metal(), mlx_graph.own_kernels() if own else nullcontext():
            graph = mlx_graph.Graph(*step_of(*settings(preset, recipe, batch_size, dtype)))
        graph.fuse()
        kinds = Metal(graph).kernels
        name = f"{recipe} with kernels" if own else recipe
        found[name] = {"kernels": sum(kinds.values()), **{k: n for k, n in kinds.items() if n}}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--write", action="store_true", help="write counts_mlx.json")
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    if options.write:
        COUNTS.write_text(as_text(counts()))
    else:
        print(as_text(counts(options.preset, options.batch_size, options.dtype)), end="")


def as_text(found: dict[str, Any]) -> str:
    """Return the counts as they stand in counts_mlx.json."""
    return json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main()
