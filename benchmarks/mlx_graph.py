"""The graph that MLX would run on Metal, found on any machine: traced, exported and fused.

MLX exports a function's operations before it runs them, but no operation with a gradient of its
own, none of Metal's fused ones (norm, rotation, cross-entropy), and no fused elementwise kernels.
The first two are replaced while a function is traced; `fuse` repeats what `mx.compile` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_randygpt.backends.mlx import kernels, selftest


@dataclass(frozen=True)
class Call:
    """One call of a function that has a gradient of its own."""

    arguments: tuple[mx.array, ...]
    outputs: Any  # an array or several
    gradient: Callable[..., Any]


class CustomFunctions:
    """Stands in for what makes and reads custom gradients in MLX, whose graph it cannot export.

    Gradients are taken piece by piece: from each call back to the outputs of the calls before it by
    MLX, through the call by its own gradient. The pieces repeat the forward pass, which the export
    merges, since the repeated operations have the same inputs.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.given: list[Any] = []  # outputs of the calls to come, in a repeated pass
        self.is_inside = False  # another custom function, whose gradient counts
        self.mlx_vjp = mx.vjp

    def custom_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function; each call is recorded, and in a repeated pass has given outputs."""

        def call(*arguments: mx.array) -> Any:
            if self.given:
                outputs = self.given.pop(0)
            else:
                was_inside, self.is_inside = self.is_inside, True
                outputs = function(*arguments)
                self.is_inside = was_inside
                # as in MLX's own graph: the call keeps its arguments, and stops fusion
                is_one = isinstance(outputs, mx.array)
                outputs = mx.depends(outputs, list(arguments))
                outputs = outputs if is_one else tuple(outputs)
            if not self.is_inside:
                self.calls.append(Call(arguments, outputs, call.gradient))  # type: ignore[attr-defined]
            return outputs

        def vjp(gradient: Callable[..., Any]) -> None:
            call.gradient = gradient  # type: ignore[attr-defined]

        call.vjp = vjp  # type: ignore[attr-defined]
        return call

    def vjp(
        self, function: Callable[..., Any], primals: list[mx.array], cotangents: list[mx.array]
    ) -> tuple[list[mx.array], list[mx.array]]:
        """Return what `mx.vjp` returns."""
        outputs, calls = self._pass(function, [], *primals)
        given = [call.outputs for call in calls]
        later = list(cotangents)  # of the outputs, then of the arguments of the calls seen so far
        for index in reversed(range(len(calls))):
            call = calls[index]
            is_one = isinstance(call.outputs, mx.array)

            def after(*y: mx.array, i: int = index, is_one: bool = is_one) -> list[mx.array]:
                """Return outputs and arguments of later calls as they follow from this one's y."""
                replaced = [*given[:i], y[0] if is_one else y, *given[i + 1 :]]
                again, calls_again = self._pass(function, replaced, *primals)
                return [*separate(again), *arguments(calls_again[i + 1 :])]

            own = [call.outputs] if is_one else list(call.outputs)
            _, dy = self.mlx_vjp(after, own, later)
            first = call.arguments[0] if len(call.arguments) == 1 else call.arguments
            dx = call.gradient(first, dy[0] if is_one else dy, call.outputs)
            dx = [dx] if isinstance(dx, mx.array) else list(dx)
            later = [*cotangents, *dx, *later[len(cotangents) :]]

        def from_primals(*x: mx.array) -> list[mx.array]:
            again, calls_again = self._pass(function, given, *x)
            return [*separate(again), *arguments(calls_again)]

        return outputs, self.mlx_vjp(from_primals, list(primals), later)[1]

    def value_and_grad(self, loss: Callable[..., mx.array]) -> Callable[..., Any]:
        """Return what `mx.value_and_grad` returns for a loss of a flat dict and other arrays."""

        def run(weights: dict[str, mx.array], *rest: Any) -> tuple[mx.array, Any]:
            def of_values(*values: mx.array) -> mx.array:
                return loss(dict(zip(weights, values, strict=True)), *rest)

            (value,), grads = self.vjp(of_values, list(weights.values()), [mx.array(1.0)])
            return value, dict(zip(weights, grads, strict=True))

        return run

    def _pass(
        self, function: Callable[..., Any], given: list[Any], *inputs: mx.array
    ) -> tuple[list[mx.array], list[Call]]:
        kept = self.calls, self.given, self.is_inside
        self.calls, self.given, self.is_inside = [], list(given), False
        outputs = function(*inputs)
        calls = self.calls
        self.calls, self.given, self.is_inside = kept
        return [outputs] if isinstance(outputs, mx.array) else list(outputs), calls


def arguments(calls: Sequence[Call]) -> list[mx.array]:
    """Return the arguments of all calls."""
    return separate([array for call in calls for array in call.arguments])


def separate(arrays: Sequence[mx.array]) -> list[mx.array]:
    """Make each an array of its own, for of two that are the same `mx.vjp` forgets one."""
    return [mx.depends(array, mx.array(0)) for array in arrays]


# An operation of Metal is traced as a scan, which nothing else uses, by its kind and direction.
SCANS = {"cumsum": 2, "cumprod": 3, "cummax": 0, "cummin": 1}
FUSED = {
    "RMSNorm": ("cumsum", False),
    "RMSNormVJP": ("cumsum", True),
    "RoPE": ("cumprod", False),
    "CrossEntropy": ("cummax", False),
    "CrossEntropyVJP": ("cummax", True),
    "Kernel": ("cummin", False),  # of this program's own
}


def fused(name: str, like: mx.array, *inputs: mx.array) -> mx.array:
    """Return an array like this one that stands for the output of a fused operation."""
    scan, reverse = FUSED[name]
    return getattr(mx, scan)(mx.depends([like], list(inputs))[0], axis=-1, reverse=reverse)


def with_gradient(function: Callable[..., Any], gradient: Callable[..., Any]) -> Callable[..., Any]:
    function = mx.custom_function(function)
    function.vjp(gradient)
    return function


def rms_norm(x: mx.array, weight: None, eps: float) -> mx.array:
    """Trace `mx.fast.rms_norm` as Metal runs it."""
    assert weight is None
    return with_gradient(
        lambda x: fused("RMSNorm", x), lambda x, dy, _: fused("RMSNormVJP", x, dy)
    )(x)


def rope(x: mx.array, dims: int, **_: Any) -> mx.array:
    """Trace `mx.fast.rope`; its gradient is the same kernel."""
    assert dims == x.shape[-1]
    return with_gradient(lambda x: fused("RoPE", x), lambda _, dy, __: fused("RoPE", dy))(x)


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Trace `mx.fast.cross_entropy`."""
    return with_gradient(
        lambda z: fused("CrossEntropy", z[..., 0], z, targets),
        lambda z, dy, _: fused("CrossEntropyVJP", z, targets, dy),
    )(logits)


@contextmanager
def exportable() -> Iterator[None]:
    """Let functions with gradients of their own be exported; their model is built inside, too."""
    functions = CustomFunctions()
    with replaced(
        mx,
        custom_function=functions.custom_function,
        value_and_grad=functions.value_and_grad,
        vjp=functions.vjp,
        arange=lru_cache(mx.arange),  # operations without inputs are not merged
    ):
        yield


def kernel(_: kernels.Kernel) -> Callable[..., list[mx.array]]:
    """Return what traces the launch of one of this program's kernels."""

    def launch(
        *, inputs: Sequence[mx.array], output_shapes: Sequence[tuple[int, ...]], **_: Any
    ) -> list[mx.array]:
        first = fused("Kernel", blank(output_shapes[0]), *inputs)
        return [first, *(mx.depends([blank(shape)], [first])[0] for shape in output_shapes[1:])]

    return launch


@lru_cache
def blank(shape: tuple[int, ...]) -> mx.array:
    """Return the same array for a shape; a constant is no operation."""
    return mx.array(np.zeros(shape, np.float32))


@contextmanager
def own_kernels() -> Iterator[None]:
    """Let models use all of this program's kernels that suit them; their model is built inside."""

    def passed(sizes: selftest.Sizes) -> tuple[selftest.Verdict, ...]:
        return tuple(selftest.Verdict(name) for name in selftest.suitable(sizes))

    selftest.chosen.cache_clear()
    with (
        replaced(kernels, build=kernel),
        replaced(selftest, verdicts=passed, unavailable=lambda: ""),
    ):
        yield
    selftest.chosen.cache_clear()


@contextmanager
def for_metal() -> Iterator[None]:
    """The same, with the fused operations that Metal has."""
    with exportable(), replaced(mx.fast, rms_norm=rms_norm, rope=rope, cross_entropy=cross_entropy):
        yield


@contextmanager
def replaced(module: Any, **functions: Any) -> Iterator[None]:
    """Replace functions of a module."""
    kept = {name: getattr(module, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(module, name, function)
        yield
    finally:
        for name, function in kept.items():
            setattr(module, name, function)


def operations(run: Callable[..., Any], arrays: Sequence[mx.array]) -> list[dict[str, Any]]:
    """Return the operations of `run` on these arrays: names, inputs, outputs, arguments."""
    return [part for part in _exported(run, arrays) if part["type"] == "primitive"]


def _exported(run: Callable[..., Any], arrays: Sequence[mx.array]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    mx.export_function(parts.append, run, *arrays)
    return parts


@dataclass(eq=False)
class Node:
    """One operation; arrays are called by their names."""

    name: str
    inputs: list[str]
    outputs: list[str]
    arguments: list[Any]


class Graph:
    """Operations in an order in which they can run, and the arrays between them."""

    def __init__(self, run: Callable[..., Any], arrays: Sequence[mx.array]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, mx.Dtype] = {}
        self.nodes: list[Node] = []
        self.outputs: set[str] = set()
        for part in _exported(run, arrays):
            if part["type"] == "outputs":
                self.outputs = {name for name, _, _ in part["outputs"]}
            if part["type"] == "constants":
                self._add([(name, array.shape, array.dtype) for name, array in part["constants"]])
            if part["type"] == "primitive":
                self._add([*part["inputs"], *part["outputs"]])
                ends = ([name for name, _, _ in part[end]] for end in ("inputs", "outputs"))
                self.nodes.append(Node(_name(part), *ends, part["arguments"]))
        self._read()

    def _add(self, arrays: Sequence[tuple[str, tuple[int, ...], mx.Dtype]]) -> None:
        for name, shape, dtype in arrays:
            self.shapes[name], self.dtypes[name] = tuple(shape), dtype

    def _read(self) -> None:
        """Find out which operation makes each array and which read it."""
        self.maker = {name: node for node in self.nodes for name in node.outputs}
        self.readers: dict[str, list[Node]] = {name: [] for name in self.shapes}
        for node in self.nodes:
            for name in node.inputs:
                self.readers[name].append(node)

    def fuse(self) -> None:
        """Fuse elementwise operations as `mx.compile` does (mlx/compile.cpp)."""
        left, done = [], set[str]()
        for node in reversed(self.nodes):
            if node.outputs[0] in done:
                continue
            inside = self._fusable_with(node) if node.name != "Broadcast" else {}
            if len(inside) > 1:
                done |= inside.keys()
                node = self._fused(node, inside)
            left.append(node)
        self.nodes = left[::-1]

    def _fusable_with(self, last: Node) -> dict[str, Node]:
        """Return the operations that one kernel can compute with this one, by their outputs."""
        inside: dict[str, Node] = {}
        read: set[str] = set()
        shape = self.shapes[last.outputs[0]]

        def visit(name: str, depth: int) -> None:
            if name in inside:
                return
            node = self.maker.get(name)
            other_output = name in self.outputs and self.shapes[name] != shape
            if depth >= MAX_DEPTH or not node or node.name not in FUSABLE or other_output:
                read.add(name)
                return
            if depth and any(reader.outputs[0] not in inside for reader in self.readers[name]):
                if node.name == "Broadcast" and len(read) < MAX_ARRAYS:
                    visit(self._split(node, inside), depth)
                else:
                    read.add(name)
                return
            if name in self.outputs:
                read.add(name)
            else:
                read.discard(name)
            if len(read) >= MAX_ARRAYS:
                return
            inside[name] = node
            for source in list(node.inputs):
                visit(source, depth + 1)

        visit(last.outputs[0], 0)
        return inside

    def _split(self, node: Node, inside: dict[str, Node]) -> str:
        """Copy a broadcast for its readers inside; return the copy's name."""
        (old,) = node.outputs
        new = f"{old}'{len(self.shapes)}"
        self.shapes[new], self.dtypes[new] = self.shapes[old], self.dtypes[old]
        copy = Node(node.name, node.inputs, [new], node.arguments)
        self.maker[new] = copy
        ours = [reader for reader in self.readers[old] if reader.outputs[0] in inside]
        self.readers[new] = ours
        self.readers[old] = [reader for reader in self.readers[old] if reader not in ours]
        for reader in ours:
            reader.inputs = [new if name == old else name for name in reader.inputs]
        return new

    def _fused(self, last: Node, inside: dict[str, Node]) -> Node:
        """Return one operation in the place of all of these."""
        order: list[Node] = []
        sources: list[str] = []

        def visit(name: str) -> None:
            if name not in inside:
                if name not in sources:
                    sources.append(name)
            elif inside[name] not in order:
                for source in inside[name].inputs:
                    visit(source)
                order.append(inside[name])

        visit(last.outputs[0])
        outputs = [node.outputs[0] for node in order if node.outputs[0] in self.outputs]
        if last.outputs[0] not in outputs:
            outputs.append(last.outputs[0])
        whole = Node("Compiled", sources, outputs, [node.name for node in order])
        for name in outputs:
            self.maker[name] = whole
        for name in sources:
            kept = [reader for reader in self.readers[name] if reader not in order]
            self.readers[name] = [*kept, whole]
        return whole


MAX_DEPTH, MAX_ARRAYS = 11, 24  # of a fused kernel
FUSABLE = {
    "Abs", "AsType", "Cos", "Cosh", "Erf", "Exp", "LogicalNot", "Negative", "Remainder", "Sigmoid",
    "Sin", "Square", "Sqrt", "Tanh", "Add", "Divide", "Equal", "Greater", "GreaterEqual", "Less",
    "LessEqual", "LogicalAnd", "LogicalOr", "Maximum", "Minimum", "Multiply", "NotEqual", "Power",
    "Subtract", "Select", "Broadcast",
}  # fmt: skip


def _name(part: dict[str, Any]) -> str:
    """Return the name of an operation; of a scan, what it stands for."""
    if part["name"] != "Scan":
        return str(part["name"])
    kind, _, reverse, _ = part["arguments"]
    (name,) = (n for n, (scan, back) in FUSED.items() if (SCANS[scan], back) == (kind, reverse))
    return name
