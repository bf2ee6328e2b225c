"""The lookup in an embedding table, with a gradient that has the same bits each time.

The gradient of a row is the sum over all positions that have its id. Autodiff adds them at indices,
and a GPU adds in whichever order its threads arrive; in bfloat16, most of the terms of a frequent
id would be lost, too. Here a product with one-hot rows adds in float32 and in one order. For a
table that is too wide for that, positions are sorted by id and each run of one id is summed as a
tree, in float32, so that only one sum is added to each row.

Legend: B batch, T time, N = B·T, C n_embd, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

MAX_ONE_HOT_ROWS = 1024  # with more, the product would cost as much as the head


def embed(table: mx.array, ids: mx.array) -> mx.array:
    """Return `table[ids]`, (B, T, C) of (V, C), differentiable in the table."""

    def backward(table: mx.array, dx: mx.array, _: mx.array) -> mx.array:
        dx, n_rows = dx.reshape(ids.size, -1), len(table)  # (N, C)
        if n_rows > MAX_ONE_HOT_ROWS:
            return gradient(ids.reshape(-1), dx.astype(mx.float32), n_rows).astype(table.dtype)
        one_hot = ids.reshape(-1, 1) == mx.arange(n_rows)  # (N, V)
        return one_hot.astype(dx.dtype).T @ dx

    rows: mx.array = with_gradient(lambda table: table[ids], backward)(table)
    return rows


def with_gradient(function: Callable[..., Any], gradient: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with this gradient, a function of (arguments, cotangents, outputs)."""
    custom = mx.custom_function(function)
    custom.vjp(gradient)
    return custom  # type: ignore[no-any-return]


def gradient(ids: mx.array, x: mx.array, n_rows: int) -> mx.array:
    """Sum the rows of x (N, C) with the same id, (N,), for each row of a table; (V, C)."""
    order = mx.argsort(ids)
    ids, x = ids[order], x[order]
    return mx.zeros((n_rows, x.shape[1])).at[ids].add(sum_rows(x, ids))


def sum_rows(x: mx.array, ids: mx.array) -> mx.array:
    """Sum the rows of x (N, C) with the same id, (N,) sorted, into the last row of each id.

    The other rows become zero. After k of log2 N steps each row holds the sum of itself and those
    of the 2^k - 1 rows before it that have its id.
    """
    n, ahead = len(ids), 1
    while ahead < n:
        same = (ids[ahead:] == ids[:-ahead])[:, None]
        x = mx.concatenate([x[:ahead], x[ahead:] + mx.where(same, x[:-ahead], 0)])  # (N, C)
        ahead *= 2
    ends = mx.concatenate([ids[1:] != ids[:-1], mx.array([True])])  # (N,)
    return mx.where(ends[:, None], x, 0)
