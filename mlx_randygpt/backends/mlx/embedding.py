"""Rows of a wide embedding whose gradient has the same bits each time.

The gradient of a row is the sum over all positions that have its id. Adding them at indices, as
autodiff does, a GPU adds in whichever order its threads arrive. Here they are sorted by id and each
run of one id is summed as a tree, in float32, so that only one sum is added to each row.

Legend: B batch, T time, N = B·T, C n_embd, V vocab.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx


def rows(table: mx.array, ids: mx.array) -> mx.array:
    """`table[ids]`, (B, T, C) of (V, C) float32, differentiable in the table."""

    @mx.custom_function  # type: ignore[untyped-decorator]
    def chosen(table: mx.array) -> mx.array:
        return table[ids]

    @chosen.vjp  # type: ignore[untyped-decorator]
    def again(table: mx.array, cotangent: mx.array, _: Any) -> mx.array:
        return gradient(ids.reshape(-1), cotangent.reshape(ids.size, -1), len(table))

    found: mx.array = chosen(table)
    return found


def gradient(ids: mx.array, x: mx.array, n_rows: int) -> mx.array:
    """For each row of a table (V, C) the sum of the x (N, C) at its id, (N,)."""
    order = mx.argsort(ids)
    ids, x = ids[order], x[order]
    return mx.zeros((n_rows, x.shape[1])).at[ids].add(sum_rows(x, ids))


def sum_rows(x: mx.array, ids: mx.array) -> mx.array:
    """Rows x (N, C) whose ids (N,) are sorted: in the last row of each id the sum of all of its
    rows, zero in the others. After log2 N steps each row holds the sum of those before it."""
    n, ahead = len(ids), 1
    while ahead < n:
        same = (ids[ahead:] == ids[:-ahead])[:, None]
        x = mx.concatenate([x[:ahead], x[ahead:] + mx.where(same, x[:-ahead], 0)])
        ahead *= 2
    ends = mx.concatenate([ids[1:] != ids[:-1], mx.array([True])])
    return mx.where(ends[:, None], x, 0)
