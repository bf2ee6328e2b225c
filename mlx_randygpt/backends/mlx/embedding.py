"""The lookup in a wide embedding table, with a gradient that has the same bits each time.

The gradient of a row is the sum over all positions that have its id. Autodiff adds them at indices,
and a GPU adds in whichever order its threads arrive. Here they are sorted by id and each run of one
id is summed as a tree, in float32, so that only one sum is added to each row.

Legend: B batch, T time, N = B·T, C n_embd, V vocab.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx


def gather_rows(table: mx.array, ids: mx.array) -> mx.array:
    """Return `table[ids]`, (B, T, C) of (V, C) float32, differentiable in the table."""

    @mx.custom_function  # type: ignore[untyped-decorator]
    def gather(table: mx.array) -> mx.array:
        return table[ids]

    @gather.vjp  # type: ignore[untyped-decorator]
    def backward(table: mx.array, cotangent: mx.array, _: Any) -> mx.array:
        return gradient(ids.reshape(-1), cotangent.reshape(ids.size, -1), len(table))

    rows: mx.array = gather(table)
    return rows


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
