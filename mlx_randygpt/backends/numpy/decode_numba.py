"""The forward pass of new tokens of any sequences, as one compiled function.

It reads a token of each of many streams, or prompts of different lengths: all tokens go through
the matrices together, and one by one through the rest, so that each follows those before it. What
a token gives has the same bits alone, among others, and on any number of threads (`tiles`). Needs
numba (the extra `fast`); without it `decode` computes the same up to rounding.

Legend: N tokens, C n_embd, H heads, D = C/H, V vocab, L layers, W = block_size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_randygpt.backends.numpy.ops import NORM_EPS
from mlx_randygpt.backends.numpy.tiles import LANES, compiled, multiply, narrow_tile, pack, padded
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.model import parameters, rope_rates
from mlx_randygpt.state import Array, Params

TOKENS = 96  # at a time: their activations stay in a core's L2 cache beside the weights


class PackedWeights:
    """A copy of the weights in the order in which `advance` reads them."""

    def __init__(self, config: ModelConfig, params: Params) -> None:
        matrices = [weight.name for weight in parameters(config) if weight.is_block_matrix]
        panels = [pack(params[name]) for name in (*matrices, "lm_head.weight")]
        self.wte = params["wte.weight"]
        self.wpe = params.get("wpe.weight", self.wte[:0])
        self.flat: Array = np.concatenate([panel.ravel() for panel in panels])
        self.starts: Array = np.cumsum([0, *(panel.size for panel in panels[:-1])])  # (4L + 1,)
        rates = rope_rates(config.head_size, config.rope_base)
        self.rates = rates if config.position == "rope" else rates[:0]  # (D/2,) float64; (0,)
        self.options = (config.qk_norm, config.token_shift, config.final_norm)

    def advance(
        self, tokens: Array, lengths: Array, cache: Any, rows: slice, logits: Array
    ) -> None:
        """Append tokens to the rows of a packed NumpyCache; write the logits (B, V) of the last.

        Of tokens (B, T) those below the lengths (B,) count.
        """
        b, t = tokens.shape
        used = np.arange(t) < lengths[:, None]
        outputs = np.full((b, t), -1)
        outputs[np.arange(b), lengths - 1] = np.arange(b)
        advance(
            (self.flat, self.starts, self.wte, self.wpe, self.rates),
            self.options,
            (cache.lengths, cache.k, cache.v, cache.last),
            (
                tokens[used].astype(np.int64),
                np.repeat(np.arange(rows.start, rows.start + b), lengths),
                outputs[used],
            ),
            logits,
        )


def pack_keys(keys: Array) -> Array:
    """Return keys (…, H, D, W) as (…, W / LANES, H, D, LANES), with room for whole blocks."""
    *rest, h, d, size = keys.shape
    blocks = np.zeros((*rest, h, d, -(-size // LANES), LANES), np.float32)
    blocks.reshape(*rest, h, d, -1)[..., :size] = keys
    return np.ascontiguousarray(np.moveaxis(blocks, -2, -4))


@compiled
def advance(
    weights: tuple[Array, ...],
    options: tuple[bool, ...],
    cache: tuple[Array, ...],
    new: tuple[Array, ...],
    logits: Array,
) -> None:
    """Append tokens to rows of a cache and write logits; the tokens of a row are in their order.

    `weights` and `options` are those of PackedWeights. `cache` has lengths (rows,), packed keys and
    values, and last (L, 2, rows, C/2). `new` has tokens (N,), their rows, and the row of logits
    (n, V) that each writes, or -1.
    """
    lengths, (_, _, wte, _, _) = cache[0], weights
    tokens, rows, outputs = new
    c, n = wte.shape[1], min(TOKENS, len(tokens))
    x, inputs = np.zeros((n, padded(c)), np.float32), np.empty((n, c), np.float32)
    qkv, h = np.empty((n, padded(3 * c)), np.float32), np.empty((n, padded(4 * c)), np.float32)
    positions = np.empty(n, np.int64)
    for first in range(0, len(tokens), TOKENS):
        part = slice(first, min(first + TOKENS, len(tokens)))
        for i, row in enumerate(rows[part]):
            positions[i] = lengths[row]
            lengths[row] += 1
        _embed(weights, tokens[part], positions, x)
        _blocks(weights, options, cache, rows[part], positions, (x, inputs, qkv, h))
        _head(weights, options[2], outputs[part], (x, inputs), logits)


@compiled
def _embed(weights: tuple[Array, ...], tokens: Array, positions: Array, x: Array) -> None:
    """Write the embeddings of the tokens to x (≥ N, ≥ C)."""
    _, _, wte, wpe, _ = weights
    for i, token in enumerate(tokens):
        for j in range(wte.shape[1]):
            x[i, j] = wte[token, j]
            if len(wpe):
                x[i, j] += wpe[positions[i], j]


@compiled
def _blocks(
    weights: tuple[Array, ...],
    options: tuple[bool, ...],
    cache: tuple[Array, ...],
    rows: Array,
    positions: Array,
    buffers: tuple[Array, ...],
) -> None:
    """Compute all layers over x (N, ≥ C), the first of the buffers, in place."""
    flat, starts, _, _, rates = weights
    qk_norm, shifted, _ = options
    _, keys, values, last = cache
    x, inputs, qkv, h = buffers
    (_, c), n, (_, n_rows, size, n_head, width) = inputs.shape, len(rows), values.shape
    d, slots = c // n_head, keys.shape[2] * LANES
    phases = _phases(positions[:n], rates)
    scores, powers = np.empty((n_head, slots), np.float32), np.empty(slots, np.int32)
    scratch = scores, powers, np.empty((n_head, width), np.float32)
    flat_keys, flat_values = keys.reshape(-1), values.reshape(-1)
    for layer in range(len(keys)):
        for i, row in enumerate(rows):
            _branch_input(x[i], last[layer, 0, row], shifted, inputs[i])
        multiply(inputs, flat, starts[4 * layer], (n, 3 * c, c), qkv, False)
        for i, row in enumerate(rows):
            place = (
                (layer * n_rows + row) * slots * c,
                (layer * n_rows + row) * size * n_head * width,
            )
            ring = flat_keys, flat_values
            _prepare(qkv[i], c, d, qk_norm, phases[i])
            _store(qkv[i], (n_head, d, width), positions[i] % size, ring, place)
            _attend(qkv, i, min(positions[i] + 1, size), ring, place, scratch, inputs[i])
        multiply(inputs, flat, starts[4 * layer + 1], (n, c, c), x, True)
        for i, row in enumerate(rows):
            _branch_input(x[i], last[layer, 1, row], shifted, inputs[i])
        multiply(inputs, flat, starts[4 * layer + 2], (n, 4 * c, c), h, False)
        for i in range(n):
            for j in range(4 * c):
                positive = max(h[i, j], np.float32(0))
                h[i, j] = positive * positive
        multiply(h, flat, starts[4 * layer + 3], (n, c, 4 * c), x, True)


@compiled
def _head(
    weights: tuple[Array, ...],
    normed: bool,
    outputs: Array,
    buffers: tuple[Array, ...],
    logits: Array,
) -> None:
    """Write the logits of the tokens that have a row of logits, from x (N, ≥ C)."""
    flat, starts, _, _, _ = weights
    x, inputs = buffers
    c, vocab = inputs.shape[1], logits.shape[1]
    n = 0
    for i, output in enumerate(outputs):
        if output >= 0:
            inputs[n] = x[i, :c]
            if normed:
                _norm(inputs[n])
            n += 1
    found = np.empty((n, padded(vocab)), np.float32)
    multiply(inputs, flat, starts[-1], (n, vocab, c), found, False)
    n = 0
    for output in outputs:
        if output >= 0:
            logits[output] = found[n, :vocab]
            n += 1


@compiled
def _norm(x: Array) -> None:
    """Compute x · (mean(x²) + eps)^-½ in place; (C,) or (D,)."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    inv = np.float32(1 / np.sqrt(total / len(x) + NORM_EPS))
    for i in range(len(x)):
        x[i] *= inv


@compiled
def _branch_input(x: Array, last: Array, shifted: bool, out: Array) -> None:
    """Write the norm of x (≥ C,) to `out`; with token shift, half of it is the previous token's.

    `last` (C/2,) holds that half, and is updated.
    """
    out[:] = x[: len(out)]
    _norm(out)
    if shifted:
        for i in range(len(last)):
            out[i], last[i] = last[i], out[i]


@compiled
def _phases(positions: Array, rates: Array) -> Array:
    """Return cosines and sines of the angles of the positions, (N, 2, D/2)."""
    phases = np.empty((len(positions), 2, len(rates)), np.float32)
    for i, position in enumerate(positions):
        for j, rate in enumerate(rates):
            phases[i, 0, j], phases[i, 1, j] = np.cos(position * rate), np.sin(position * rate)
    return phases


@compiled
def _prepare(qkv: Array, c: int, d: int, qk_norm: bool, phases: Array) -> None:
    """Norm and rotate the queries and keys of qkv (≥ 3C,), and divide the queries by √D."""
    for at in range(0, 2 * c, d):
        x = qkv[at : at + d]
        if qk_norm:
            _norm(x)
        _rotate(x, phases)
    for i in range(c):
        qkv[i] *= np.float32(d**-0.5)


@compiled
def _store(
    qkv: Array,
    sizes: tuple[int, int, int],
    slot: int,
    ring: tuple[Array, Array],
    place: tuple[int, int],
) -> None:
    """Copy the key and the value in qkv (≥ 3C,) to the slot `place` of their ring buffer."""
    (keys, values), (n_head, d, width) = ring, sizes
    c = n_head * d
    key_at = place[0] + slot // LANES * c * LANES + slot % LANES
    value_at = place[1] + slot * n_head * width
    for i in range(c):
        keys[key_at + i * LANES] = qkv[c + i]
    for h in range(n_head):
        for i in range(d):
            values[value_at + h * width + i] = qkv[2 * c + h * d + i]


@compiled
def _attend(
    qkv: Array,
    i: int,
    seen: int,
    ring: tuple[Array, Array],
    place: tuple[int, int],
    scratch: tuple[Array, ...],
    y: Array,
) -> None:
    """Compute the attention of row i of qkv (N, ≥ 3C) over the first `seen` slots, to y (C,).

    A block of LANES slots at a time comes from memory, with the keys or values of all heads.
    """
    keys, values = ring  # of each row (W / LANES, H, D, LANES) and (W, H, D padded to LANES)
    scores, powers, sums = scratch  # (H, ≥ W), (≥ W,), (H, D padded)
    (n_head, width), slots = sums.shape, scores.shape[1]
    d, at = len(y) // n_head, i * qkv.shape[1]
    for first in range(0, seen, LANES):
        for h in range(n_head):
            key_at = place[0] + (first * n_head + h * LANES) * d
            narrow_tile(qkv, at + h * d, keys, key_at, LANES, d, scores, h * slots + first, False)
    for h in range(n_head):
        inverse = np.float32(1) / _exponentials(scores[h], seen, powers)
        for j in range(seen):
            scores[h, j] *= inverse
    for first in range(0, seen, LANES):
        n = min(LANES, seen - first)
        for h in range(n_head):
            for part in range(0, width, LANES):
                value_at = place[1] + (first * n_head + h) * width + part
                narrow_tile(
                    scores,
                    h * slots + first,
                    values,
                    value_at,
                    n_head * width,
                    n,
                    sums,
                    h * width + part,
                    first > 0,
                )
    for h in range(n_head):
        for j in range(d):
            y[h * d + j] = sums[h, j]


@compiled
def _exponentials(scores: Array, n: int, powers: Array) -> np.float32:
    """Replace the first n scores by e^(score − the largest); return their sum.

    e^x = 2^w e^r with |r| ≤ ln 2 / 2; a polynomial of degree 6 gives e^r to a unit in the last
    place, and w goes into the exponent's bits. So the loops become vector instructions, which calls
    of exp would not.
    """
    largest = scores[0]
    for j in range(1, n):
        largest = max(largest, scores[j])
    for j in range(n):
        x = max(scores[j] - largest, np.float32(-87))  # 1e-38: below it, all is nothing
        whole = np.floor(x * np.float32(1.442695041) + np.float32(0.5))
        r = x - whole * np.float32(0.6931471806)
        p = np.float32(1 / 720)
        for factor in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
            p = p * r + np.float32(factor)
        scores[j], powers[j] = p, (np.int32(whole) + np.int32(127)) << np.int32(23)
    scale, total = powers.view(np.float32), np.float32(0)
    for j in range(n):
        scores[j] *= scale[j]
        total += scores[j]
    return total


@compiled
def _rotate(x: Array, phases: Array) -> None:
    """Rotate each pair of x (D,) by its angle; phases (2, D/2) holds cosines and sines."""
    for j in range(phases.shape[1]):
        a, b = x[2 * j], x[2 * j + 1]
        x[2 * j] = a * phases[0, j] - b * phases[1, j]
        x[2 * j + 1] = a * phases[1, j] + b * phases[0, j]
