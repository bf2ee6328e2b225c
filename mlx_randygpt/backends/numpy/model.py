"""The model in NumPy: one chunk of sequences forward and backward through preallocated arrays.

A `Chunk` owns the activations and one gradient vector, and one thread at a time uses it; it reads
the weights and never writes them. Both architectures run here. The formulas are in `ops`, and
those of GPT-2 alone in `gpt2`.

Legend: B sequences of the chunk, T time, C n_embd, H heads, D = C/H, F = 4C, V vocab, N = B·T.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from math import prod

import numpy as np

from mlx_randygpt.backends.numpy import gpt2, ops
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.model import parameter_shapes, rope_rates
from mlx_randygpt.state import Array, Params

LOGITS = 1 << 24  # numbers: 64 MB
ATTENTION = 1 << 17  # probabilities computed at a time: half of a core's L2
Randoms = list[np.random.Generator]  # one for each sequence
Shape = tuple[int, ...]


def flat_views(config: ModelConfig, dtype: type) -> tuple[Array, Params]:
    """Return one zeroed vector for all weights, and a view of it per name."""
    shapes = parameter_shapes(config)
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
    flat: Array = np.zeros(int(ends[-1]), dtype)
    pieces = np.split(flat, ends[:-1])
    return flat, {name: p.reshape(shapes[name]) for name, p in zip(shapes, pieces, strict=True)}


def copy_to_float32(groups: list[Params]) -> list[Params]:
    """Copy all arrays into one float32 vector and return views of it in the same groups.

    Large memory pages cost a fraction of many small ones.
    """
    arrays = [array for group in groups for array in group.values()]
    flat = np.concatenate([a.reshape(-1) for a in arrays], dtype=np.float32, casting="same_kind")
    pieces = iter(np.split(flat, np.cumsum([a.size for a in arrays])[:-1]))
    return [{name: next(pieces).reshape(a.shape) for name, a in g.items()} for g in groups]


def head_weight(w: Params) -> Array:
    """Return the weight of the output head, (V, C): `lm_head`, or GPT-2's tied token embedding."""
    return w.get("lm_head.weight", w["wte.weight"])


def chunk_shapes(
    config: ModelConfig, rows: int, block_size: int, recompute: bool
) -> dict[str, Shape]:
    """Return the shape of each array that a `Chunk` allocates, by name.

    Names of what is kept for the backward pass of layer i begin with "h.i."; all layers share
    those of layer 0 if the chunk recomputes activations. Phases count as pairs of real numbers.
    """
    t, c, h = block_size, config.n_embd, config.n_head
    n, drop = rows * t, rows * t if config.dropout else 0
    group_size = max(1, min(rows, ATTENTION // (h * t * t)))  # sequences, in the attention
    keeps_norm = config.token_shift or config.is_gpt2  # the branch's input is not the norm itself

    def branch_input(name: str, keeps_norm: bool) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {f"{name}.norm": (n, c), f"{name}.inv_rms": (n,)}
        return shapes | ({f"{name}.out": (n, c)} if keeps_norm else {})

    layer = {
        **branch_input("attn_in", keeps_norm),
        "qkv": (n, 3 * c),
        "qk_inv_rms": (n, 2 * h),
        "probs": (rows, h, t, t),
        "y": (n, c),
        **branch_input("mlp_in", keeps_norm),
        "relu": (n, 4 * c),
        "attn_mask": (drop, c),
        "mlp_mask": (drop, c),
    }
    n_kept = 1 if recompute else config.n_layer
    n_inputs = config.n_layer - 1 if recompute else 0
    return {
        **{f"h.{i}.{name}": shape for i in range(n_kept) for name, shape in layer.items()},
        **{f"h.{i}.x": (n, c) for i in range(n_inputs)},
        **dict.fromkeys(("x", "dx", "branch", "scratch"), (n, c)),
        **branch_input("final", config.is_gpt2),
        "logits": (max(1, min(n, LOGITS // config.vocab_size)), config.vocab_size),
        "ds": (group_size, h, t, t),
        "transposed": (group_size, h, config.head_size, t),
        "wide": (n, 4 * c),
        "dqkv": (n, 3 * c),
        "dropped": (drop, c),
        "phases": (2, t, 2 * h, config.head_size // 2, 2),
        "spare": (max(prod(shape) for shape in parameter_shapes(config).values()),),
    }


@dataclass
class BranchInput:
    """The input of a branch or of the head, and the norm it is made from."""

    norm: Array  # (N, C)
    inv_rms: Array  # (N,)
    out: Array  # (N, C): the norm itself, shifted, or with gain and bias

    def first(self, n: int) -> tuple[Array, Array, Array]:
        """Return the first n rows of norm, inv_rms and out."""
        return self.norm[:n], self.inv_rms[:n], self.out[:n]


@dataclass
class Activations:
    """The arrays that one layer's forward pass leaves to its backward pass."""

    attn_in: BranchInput
    qkv: Array  # (N, 3C), queries and keys normed and rotated
    qk_inv_rms: Array  # (N, 2H)
    probs: Array  # (B, H, Tk, Tq); of longer contexts only blocks with keys ≤ query are written
    y: Array  # (N, C), the heads' outputs
    mlp_in: BranchInput
    relu: Array  # (N, F): max(h, 0); with GELU h itself
    attn_mask: Array  # (N, C), dropout after the attention; empty without dropout
    mlp_mask: Array  # (N, C), dropout after the MLP


class Chunk:
    """Scratch memory of up to `rows` sequences of `block_size` tokens, in the type of `flat_grads`.

    Gradients are added to `grads`, views of the vector `flat_grads`; a chunk that only runs
    forward needs neither. With `recompute` each layer but the last repeats its forward pass in
    the backward pass, and all layers share one `Activations`.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        block_size: int,
        flat_grads: Array,
        grads: Params,
        *,
        recompute: bool = False,
    ) -> None:
        self.config, self.rows, self.block_size = config, rows, block_size
        self.flat_grads, self.grads, self.accumulating = flat_grads, grads, False
        dtype, n_layer = flat_grads.dtype, config.n_layer
        shapes = chunk_shapes(config, rows, block_size, recompute)
        arrays: Params = {name: np.empty(shape, dtype) for name, shape in shapes.items()}

        def branch_input(name: str) -> BranchInput:
            norm = arrays[f"{name}.norm"]
            return BranchInput(norm, arrays[f"{name}.inv_rms"], arrays.get(f"{name}.out", norm))

        def layer(name: str) -> Activations:
            kept = ("qkv", "qk_inv_rms", "probs", "y", "relu", "attn_mask", "mlp_mask")
            return Activations(
                attn_in=branch_input(f"{name}.attn_in"),
                mlp_in=branch_input(f"{name}.mlp_in"),
                **{field: arrays[f"{name}.{field}"] for field in kept},
            )

        first = layer("h.0")
        self.layers = [first, *(first if recompute else layer(f"h.{i}") for i in range(1, n_layer))]
        self.inputs = [arrays[f"h.{i}.x"] for i in range(n_layer - 1)] if recompute else []
        self.draws: list[Randoms | None] = [None] * len(self.inputs)
        self.keeps = True  # whether the forward pass leaves each layer's activations
        self.x, self.dx, self.branch = arrays["x"], arrays["dx"], arrays["branch"]
        self.scratch, self.wide, self.spare = arrays["scratch"], arrays["wide"], arrays["spare"]
        self.final, self.logits = branch_input("final"), arrays["logits"]
        self.ds, self.transposed = arrays["ds"], arrays["transposed"]
        self.dqkv, self.dropped = arrays["dqkv"], arrays["dropped"]
        positions, n_rotated = np.arange(block_size), 2 * config.n_head
        rates = rope_rates(config.head_size, config.rope_base)
        phases = ops.rope_phases(positions, rates, n_rotated, dtype.type)
        pairs = arrays["phases"].view(phases.dtype)[..., 0]  # (2, T, 2H, ⌊D/2⌋)
        pairs[0], pairs[1] = phases, phases.conj()
        self.phases, self.back_phases = pairs  # of queries and keys; of their gradients
        self.head_name = "wte.weight" if config.is_gpt2 else "lm_head.weight"

    def forward(
        self, w: Params, tokens: Array, random: Randoms | None, *, keep: bool = True
    ) -> Array:
        """Return the input of the head for tokens (B, T), (N, C); with `random`, apply dropout.

        If no backward pass follows, `keep=False` lets all layers use one layer's arrays, which then
        stay in a core's cache.
        """
        self.keeps = keep
        b, t = tokens.shape
        x = np.take(w["wte.weight"], tokens.reshape(-1), axis=0, out=self.x[: b * t], mode="clip")
        if self.config.position == "learned":
            x.reshape(b, t, -1)[...] += w["wpe.weight"][:t]
        for i in range(self.config.n_layer):
            self._layer(w, i, x, t, random)
        return self._norm(w, "ln_f", x, self.final, None) if self.config.final_norm else x

    def head(self, w: Params, final: Array, targets: Array, scale: float | None) -> float:
        """Return the summed cross-entropy of final (N, C) against targets (N,).

        With `scale` also compute the gradients of scale times that sum: the head's are added to
        `grads`, and final's written to dx. A large vocabulary is processed in blocks of positions,
        so that the logits are never all in memory.
        """
        weight, loss = w[self.head_name], 0.0
        for start in range(0, len(final), len(self.logits)):
            part = slice(start, start + len(self.logits))
            inputs, block_targets = final[part], targets[part]
            logits = np.matmul(inputs, weight.T, out=self.logits[: len(inputs)])
            loss += ops.cross_entropy(logits, block_targets)
            if scale is not None:
                ops.cross_entropy_backward(logits, block_targets, scale)
                self._weight_grad(self.head_name, logits, inputs, more=start > 0)
                np.matmul(logits, weight, out=self.dx[: len(final)][part])
        return loss

    def backward(self, w: Params, tokens: Array, dropped: bool) -> None:
        """Add the gradients of the last forward pass to `grads`; `head` has written dx before."""
        b, t = tokens.shape
        dx = self.dx[: b * t]
        if self.config.final_norm:
            self._norm_backward(w, "ln_f", dx, self.final, None)
        for i in reversed(range(self.config.n_layer)):
            self._layer_backward(w, i, dx, t, dropped)
        if not self.accumulating and self.head_name != "wte.weight":  # else the head has begun it
            self.grads["wte.weight"][...] = 0
        ops.embedding_backward(dx, tokens.reshape(-1), self.grads["wte.weight"])
        if self.config.position == "learned":
            dwpe = self.grads["wpe.weight"]
            if not self.accumulating:
                dwpe[...] = 0
            dwpe[:t] += dx.reshape(b, t, -1).sum(axis=0)
        self.accumulating = True

    # Layers and branches

    def _layer(self, w: Params, i: int, x: Array, t: int, random: Randoms | None) -> None:
        act = self._kept(i)
        if self.keeps and i < len(self.inputs):  # nothing comes between the last layer's two passes
            self.inputs[i][: len(x)], self.draws[i] = x, deepcopy(random)
        x += self._drop(self._attention(w, i, x, t), act.attn_mask, random)
        x += self._drop(self._mlp(w, i, x, t), act.mlp_mask, random)

    def _kept(self, i: int) -> Activations:
        return self.layers[i if self.keeps else 0]

    def _layer_backward(self, w: Params, i: int, dx: Array, t: int, dropped: bool) -> None:
        if i < len(self.inputs):
            self._recompute(w, i, len(dx), t)
        act = self.layers[i]
        dx += self._mlp_backward(w, i, self._undrop(dx, act.mlp_mask, dropped), t)
        dx += self._attention_backward(w, i, self._undrop(dx, act.attn_mask, dropped), t)

    def _recompute(self, w: Params, i: int, n: int, t: int) -> None:
        """Repeat the forward pass of layer i except its last product, whose result is not read."""
        act, x, random = self.layers[i], self.inputs[i][:n], self.draws[i]
        x += self._drop(self._attention(w, i, x, t), act.attn_mask, random)
        inputs = self._norm(w, f"h.{i}.ln_2", x, act.mlp_in, t)
        self._activate(self._linear(w, f"h.{i}.mlp.c_fc", inputs, act.relu[:n]), self.wide[:n])
        self._drop(self.branch[:n], act.mlp_mask, random)

    def _attention(self, w: Params, i: int, x: Array, t: int) -> Array:
        act, config, n, b = self._kept(i), self.config, len(x), len(x) // t
        qkv, y = act.qkv[:n], act.y[:n]
        inputs = self._norm(w, f"h.{i}.ln_1", x, act.attn_in, t)
        self._linear(w, f"h.{i}.attn.c_attn", inputs, qkv)  # (N, 3C)
        if config.qk_norm:
            qk = self._per_head(qkv)
            ops.rms_norm(qk, qk, act.qk_inv_rms[:n])
        if config.position == "rope":
            ops.rotate(qkv.reshape(b, t, -1)[:, :, : 2 * config.n_embd], self.phases[:t])
        ops.attention(
            qkv.reshape(b, t, -1),
            self.transposed[..., :t],
            act.probs[:b, :, :t, :t],
            y.reshape(b, t, -1),
            qk_norm=config.qk_norm,
        )
        return self._linear(w, f"h.{i}.attn.c_proj", y, self.branch[:n])  # (N, C)

    def _attention_backward(self, w: Params, i: int, dbranch: Array, t: int) -> Array:
        act, config, n, b = self.layers[i], self.config, len(dbranch), len(dbranch) // t
        qkv, dqkv, y = act.qkv[:n], self.dqkv[:n], act.y[:n]
        dy = self._linear_backward(w, f"h.{i}.attn.c_proj", dbranch, y, self.scratch[:n])  # (N, C)
        ops.attention_backward(
            dy.reshape(b, t, -1),
            y.reshape(b, t, -1),
            qkv.reshape(b, t, -1),
            act.probs[:b, :, :t, :t],
            self.transposed[..., :t],
            self.ds[..., :t, :t],
            dqkv.reshape(b, t, -1),
        )
        if config.qk_norm:  # before rotating back: a rotation keeps lengths (docs/numerics.md)
            qk, dqk = self._per_head(qkv), self._per_head(dqkv)
            ops.rms_norm_backward(dqk, qk, act.qk_inv_rms[:n], self._per_head(self.wide[:n]))
        if config.position == "rope":
            rotated = dqkv.reshape(b, t, -1)[:, :, : 2 * config.n_embd]
            ops.rotate(rotated, self.back_phases[:t])
        inputs, dx = act.attn_in.out[:n], self.branch[:n]  # (N, C)
        self._linear_backward(w, f"h.{i}.attn.c_attn", dqkv, inputs, dx)
        return self._norm_backward(w, f"h.{i}.ln_1", dx, act.attn_in, t)

    def _mlp(self, w: Params, i: int, x: Array, t: int) -> Array:
        act, n = self._kept(i), len(x)
        h, a = act.relu[:n], self.wide[:n]
        inputs = self._norm(w, f"h.{i}.ln_2", x, act.mlp_in, t)
        self._linear(w, f"h.{i}.mlp.c_fc", inputs, h)  # (N, F)
        self._activate(h, a)
        return self._linear(w, f"h.{i}.mlp.c_proj", a, self.branch[:n])  # (N, C)

    def _mlp_backward(self, w: Params, i: int, dbranch: Array, t: int) -> Array:
        act, n = self.layers[i], len(dbranch)
        a = wide = self.wide[:n]  # (N, F)
        self._activate(act.relu[:n], a, again=True)  # cheaper than keeping it
        dh = self._linear_backward(w, f"h.{i}.mlp.c_proj", dbranch, a, wide)
        self._activate_backward(dh, act.relu[:n])
        inputs, dx = act.mlp_in.out[:n], self.branch[:n]  # (N, C)
        self._linear_backward(w, f"h.{i}.mlp.c_fc", dh, inputs, dx)
        return self._norm_backward(w, f"h.{i}.ln_2", dx, act.mlp_in, t)

    # The operations in which the architectures differ: activation, bias, norm

    def _activate(self, h: Array, out: Array, again: bool = False) -> None:
        """Write the activation of h (N, F) to `out`; `again` if h has been through this before."""
        match self.config.activation:
            case "gelu":
                gpt2.gelu(h, out)
            case "gelu_tanh":
                gpt2.gelu_tanh(h, out)
            case _:
                (ops.relu_squared_again if again else ops.relu_squared)(h, out)

    def _activate_backward(self, da: Array, h: Array) -> None:
        """Turn the gradient da (N, F) into that of h, in place."""
        match self.config.activation:
            case "gelu":
                gpt2.gelu_backward(da, h)
            case "gelu_tanh":
                gpt2.gelu_tanh_backward(da, h)
            case _:
                ops.relu_squared_backward(da, h)

    def _linear(self, w: Params, name: str, inputs: Array, out: Array) -> Array:
        """Compute inputs · Wᵀ, plus the bias if the model has biases."""
        np.matmul(inputs, w[f"{name}.weight"].T, out=out)
        if self.config.bias:
            out += w[f"{name}.bias"]
        return out

    def _linear_backward(
        self, w: Params, name: str, dout: Array, inputs: Array, out: Array
    ) -> Array:
        """Compute dinputs = dout · W; dW is added to `grads` before `out` is written."""
        if self.config.bias:
            self._vector_grad(f"{name}.bias", dout)
        self._weight_grad(f"{name}.weight", dout, inputs)
        return np.matmul(dout, w[f"{name}.weight"], out=out)

    def _norm(self, w: Params, name: str, x: Array, inputs: BranchInput, t: int | None) -> Array:
        """Return the input of a branch, or without t that of the head, from the residual stream x.

        GPT-2's is a LayerNorm with weights under this name, the other's an RMSNorm, shifted in
        time if the model has the token shift.
        """
        norm, inv_rms, out = inputs.first(len(x))
        if self.config.is_gpt2:
            gpt2.layer_norm(x, norm, inv_rms)
            np.multiply(norm, w[f"{name}.weight"], out=out)
            if self.config.bias:
                out += w[f"{name}.bias"]
            return out
        ops.rms_norm(x, norm, inv_rms)
        if t and self.config.token_shift:
            ops.token_shift(norm.reshape(-1, t, x.shape[-1]), out.reshape(-1, t, x.shape[-1]))
            return out
        return norm

    def _norm_backward(
        self, w: Params, name: str, dx: Array, inputs: BranchInput, t: int | None
    ) -> Array:
        """Turn the gradient of the result of `_norm` into that of x, over dx."""
        norm, inv_rms, _ = inputs.first(len(dx))
        scratch = self.scratch[: len(dx)]
        if self.config.is_gpt2:
            self._vector_grad(f"{name}.weight", np.multiply(dx, norm, out=scratch))
            if self.config.bias:
                self._vector_grad(f"{name}.bias", dx)
            dx *= w[f"{name}.weight"]
            gpt2.layer_norm_backward(dx, norm, inv_rms, scratch)
            return dx
        if t and self.config.token_shift:
            ops.token_shift_backward(dx.reshape(-1, t, dx.shape[-1]))
        ops.rms_norm_backward(dx, norm, inv_rms, scratch)
        return dx

    # Gradients of parameters, dropout

    def _per_head(self, x: Array) -> Array:
        """Return queries and keys of x (N, ≥2C) by head: a view (N, 2H, D)."""
        config = self.config
        return x[:, : 2 * config.n_embd].reshape(len(x), 2 * config.n_head, config.head_size)

    def _weight_grad(self, name: str, dout: Array, inputs: Array, more: bool = False) -> None:
        """Add doutᵀ · inputs, (out, in), to the gradient of a weight.

        The first chunk of a step overwrites, unless this is `more` of the same chunk.
        """
        gradient = self.grads[name]
        if self.accumulating or more:
            spare = self.spare[: gradient.size].reshape(gradient.shape)
            gradient += np.matmul(dout.T, inputs, out=spare)
        else:
            np.matmul(dout.T, inputs, out=gradient)

    def _vector_grad(self, name: str, dout: Array) -> None:
        """Add the sum over positions of dout (N, size) to the gradient of a gain or bias.

        The first chunk of a step overwrites.
        """
        gradient = self.grads[name]
        if self.accumulating:
            gradient += dout.sum(axis=0)
        else:
            np.sum(dout, axis=0, out=gradient)

    def _drop(self, branch: Array, mask: Array, random: Randoms | None) -> Array:
        if random is None or not self.config.dropout:
            return branch
        for generator, rows in zip(random, np.split(mask[: len(branch)], len(random)), strict=True):
            ops.dropout_mask(generator, self.config.dropout, rows)
        branch *= mask[: len(branch)]
        return branch

    def _undrop(self, dx: Array, mask: Array, dropped: bool) -> Array:
        if not dropped or not self.config.dropout:
            return dx
        return np.multiply(dx, mask[: len(dx)], out=self.dropped[: len(dx)])
