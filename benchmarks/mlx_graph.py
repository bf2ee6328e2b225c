"""The graph of a function of MLX arrays, custom gradients included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class Call:
    """One call of a function that has a gradient of its own."""

    arguments: tuple[mx.array, ...]
    outputs: Any  # an array or several
    gradient: Callable[..., Any]


class CustomFunctions:
    """Stands in for `mx.custom_function` and `mx.value_and_grad`, whose graph MLX cannot export.

    Gradients are taken piece by piece: from each call back to the outputs of the calls before it by
    MLX, through the call by its own gradient. The pieces repeat the forward pass, which the export
    merges, since the repeated operations have the same inputs.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.given: list[Any] = []  # outputs of the calls to come, in a repeated pass

    def custom_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function; each call is recorded, and in a repeated pass has given outputs."""

        def call(*arguments: mx.array) -> Any:
            outputs = self.given.pop(0) if self.given else function(*arguments)
            self.calls.append(Call(arguments, outputs, call.gradient))  # type: ignore[attr-defined]
            return outputs

        def vjp(gradient: Callable[..., Any]) -> None:
            call.gradient = gradient  # type: ignore[attr-defined]

        call.vjp = vjp  # type: ignore[attr-defined]
        return call

    def value_and_grad(self, loss: Callable[..., mx.array]) -> Callable[..., Any]:
        """Return what `mx.value_and_grad` returns: loss and gradients of the first argument."""

        def run(weights: dict[str, mx.array], *rest: Any) -> tuple[mx.array, Any]:
            value, calls = self._pass(loss, [], weights, *rest)
            cotangents: list[mx.array] = []  # of the arguments of the calls seen, in their order

            def after(index: int, *replaced: mx.array) -> list[mx.array]:
                """Return loss and arguments of the calls after this one, as they follow from it."""
                given = [call.outputs for call in calls]
                is_one = isinstance(given[index], mx.array)
                given[index] = replaced[0] if is_one else replaced
                again, calls_again = self._pass(loss, given, weights, *rest)
                return [again, *arguments(calls_again[index + 1 :])]

            def from_weights(*values: mx.array) -> list[mx.array]:
                named = dict(zip(weights, values, strict=True))
                again, calls_again = self._pass(loss, [c.outputs for c in calls], named, *rest)
                return [again, *arguments(calls_again)]

            one = mx.array(1.0, value.dtype)
            for index in reversed(range(len(calls))):
                call = calls[index]
                is_one = isinstance(call.outputs, mx.array)
                outputs = [call.outputs] if is_one else list(call.outputs)
                _, dy = mx.vjp(lambda *y, i=index: after(i, *y), outputs, [one, *cotangents])
                primals = call.arguments[0] if len(call.arguments) == 1 else call.arguments
                dx = call.gradient(primals, dy[0] if is_one else dy, call.outputs)
                cotangents = [*([dx] if isinstance(dx, mx.array) else dx), *cotangents]
            _, grads = mx.vjp(from_weights, list(weights.values()), [one, *cotangents])
            return value, dict(zip(weights, grads, strict=True))

        return run

    def _pass(self, loss: Any, given: list[Any], *inputs: Any) -> tuple[mx.array, list[Call]]:
        self.calls, self.given = [], list(given)
        return loss(*inputs), self.calls


def arguments(calls: Sequence[Call]) -> list[mx.array]:
    """Return the arguments of all calls as arrays of their own: `mx.vjp` would take the gradient of
    only one of two outputs that are the same array."""
    return [mx.depends(array, mx.array(0)) for call in calls for array in call.arguments]


@contextmanager
def exportable() -> Iterator[None]:
    """Let functions with gradients of their own be exported; their model is built inside, too."""
    functions = CustomFunctions()
    replaced = {
        "custom_function": functions.custom_function,
        "value_and_grad": functions.value_and_grad,
        "arange": lru_cache(mx.arange),  # operations without inputs are not merged
    }
    kept = {name: getattr(mx, name) for name in replaced}
    try:
        for name, function in replaced.items():
            setattr(mx, name, function)
        yield
    finally:
        for name, function in kept.items():
            setattr(mx, name, function)


def operations(run: Callable[..., Any], arrays: Sequence[mx.array]) -> list[dict[str, Any]]:
    """Return the operations of `run` on these arrays: names, inputs, outputs, arguments."""
    parts: list[dict[str, Any]] = []
    mx.export_function(parts.append, run, *arrays)
    return [part for part in parts if part["type"] == "primitive"]
