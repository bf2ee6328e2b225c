"""Matrix products for a few rows at a time, as machine code that numba inlines.

A tile is the product of 1 to 6 rows with a panel of columns. Its sums stay in vector registers, and
each is added up in the order of k, so a row has the same bits in a tile of any height: alone or
among others, on one thread or several. BLAS does not promise that, and is slower for few rows.

Needs numba (the extra `fast`). Legend: N rows, K values of each, M columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.extending import intrinsic

from mlx_randygpt.state import Array

FEATURES = binding.get_host_cpu_features()
IS_ARM = binding.get_process_triple().startswith(("aarch64", "arm64"))
LANES = 16 if FEATURES.get("avx512f") else 4 if IS_ARM else 8  # float32 values in a register
PANEL = LANES * (4 if FEATURES.get("avx512f") or IS_ARM else 2)  # columns; 32 registers, or 16
VECTOR = ir.VectorType(ir.FloatType(), LANES)


def pack(weight: Array) -> Array:
    """Return the panels (P, K, PANEL) of a float32 weight (M, K); the last is padded with zeros."""
    m, k = weight.shape
    panels = np.zeros((-(-m // PANEL), PANEL, k), np.float32)
    panels.reshape(-1, k)[:m] = weight
    return np.ascontiguousarray(panels.swapaxes(1, 2))


def _tile(n_rows: int, n_vectors: int) -> Any:
    """Return tile(x, x_at, w, w_at, pitch, k, out, out_at, adding): out = x · w, or out += x · w.

    It has n_rows rows and n_vectors · LANES columns. x (n_rows, K) begins at value x_at of a
    float32 matrix whose rows have no gaps, and out likewise; row i of w begins at value
    w_at + i · pitch of a vector. Slices would say the same, but numba counts references to them.
    """

    @intrinsic
    def tile(  # type: ignore[no-untyped-def]  # noqa: PLR0913
        typing, x, x_at, w, w_at, pitch, k, out, out_at, adding
    ):
        size = types.intp
        signature = types.void(x, size, w, size, size, size, out, size, types.boolean)

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            x, w, out = (
                context.make_array(signature.args[i])(context, builder, values[i])
                for i in (0, 2, 6)
            )
            _, x_at, _, w_at, pitch, k, _, out_at, adding = values
            inputs, targets = (
                [_row(builder, array, r, at) for r in range(n_rows)]
                for array, at in ((x, x_at), (out, out_at))
            )
            other = builder.gep(w.data, [w_at]), pitch
            sums = _sums(builder, inputs, n_vectors, other, k)
            for target, row in zip(targets, sums, strict=True):
                for c, total in enumerate(row):
                    at = _vector_at(builder, target, ir.Constant(k.type, c * LANES))
                    both = builder.fadd(builder.load(at, align=4), total)
                    builder.store(builder.select(adding, both, total), at, align=4)
            return context.get_dummy_value()

        return signature, generate

    return tile


def _row(builder: Any, array: Any, r: int, at: Any) -> Any:
    """Return a pointer to the value r rows below value `at` of a matrix."""
    stride = builder.extract_value(array.strides, 0)
    start = builder.bitcast(array.data, ir.IntType(8).as_pointer())
    row = builder.gep(start, [builder.mul(stride, ir.Constant(stride.type, r))])
    return builder.gep(builder.bitcast(row, ir.FloatType().as_pointer()), [at])


def _vector_at(builder: Any, pointer: Any, index: Any) -> Any:
    return builder.bitcast(builder.gep(pointer, [index]), VECTOR.as_pointer())


def _sums(
    builder: Any, inputs: list[Any], n_vectors: int, w: tuple[Any, Any], k: Any
) -> list[list[Any]]:
    """Build the loop over k ≥ 1; return the sums of each row, `n_vectors` vectors.

    `inputs` are pointers to the rows; `w` is the pointer to the other matrix and its pitch.
    """
    size = partial(ir.Constant, k.type)
    multiply_add = builder.module.declare_intrinsic(
        f"llvm.fmuladd.v{LANES}f32", (), ir.FunctionType(VECTOR, [VECTOR] * 3)
    )
    before, loop = builder.block, builder.append_basic_block("loop")
    after = builder.append_basic_block("after")
    builder.branch(loop)
    builder.position_at_end(loop)
    i = builder.phi(k.type)
    sums = [[builder.phi(VECTOR) for _ in range(n_vectors)] for _ in inputs]
    start = builder.mul(i, w[1])
    columns = [
        builder.load(_vector_at(builder, w[0], builder.add(start, size(c * LANES))), align=4)
        for c in range(n_vectors)
    ]
    following = builder.add(i, size(1))
    i.add_incoming(size(0), before)
    i.add_incoming(following, loop)
    totals = []
    for row, old in zip(inputs, sums, strict=True):
        value = _spread(builder, builder.load(builder.gep(row, [i])))
        new = [builder.call(multiply_add, (value, c, s)) for c, s in zip(columns, old, strict=True)]
        for s, total in zip(old, new, strict=True):
            s.add_incoming(ir.Constant(VECTOR, None), before)
            s.add_incoming(total, loop)
        totals.append(new)
    builder.cbranch(builder.icmp_signed("<", following, k), loop, after)
    builder.position_at_end(after)
    return totals


def _spread(builder: Any, value: Any) -> Any:
    """Return a vector with this value in every lane."""
    undefined = ir.Constant(VECTOR, ir.Undefined)
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
    first = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, zeros)


compiled: Callable[..., Any] = njit(nogil=True, cache=True, fastmath=True)
_one, _two, _four, _six = (_tile(n_rows, PANEL // LANES) for n_rows in (1, 2, 4, 6))
narrow_tile = _tile(1, 1)


@compiled
def padded(m: int) -> int:
    """Return the number of columns of the panels that hold M columns."""
    return (m + PANEL - 1) // PANEL * PANEL


@compiled
def multiply(
    x: Array, w: Array, w_at: int, shape: tuple[int, int, int], out: Array, adding: bool
) -> None:
    """Compute out = x wᵀ, or add that to out, for the `shape` (N, M, K).

    x is (≥ N, ≥ K) and out (≥ N, ≥ padded(M)). The panels of w (M, K) begin at value w_at.
    """
    n, m, k = shape
    ldx, ldo = x.shape[1], out.shape[1]
    for first in range(0, m, PANEL):
        at, r = w_at + first * k, 0
        while r + 6 <= n:
            _six(x, r * ldx, w, at, PANEL, k, out, r * ldo + first, adding)
            r += 6
        if r + 4 <= n:
            _four(x, r * ldx, w, at, PANEL, k, out, r * ldo + first, adding)
            r += 4
        if r + 2 <= n:
            _two(x, r * ldx, w, at, PANEL, k, out, r * ldo + first, adding)
            r += 2
        if r < n:
            _one(x, r * ldx, w, at, PANEL, k, out, r * ldo + first, adding)
