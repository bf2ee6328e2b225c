"""The model in NumPy: one chunk of sequences forward and backward through preallocated arrays.

A `Chunk` owns the activations and one gradient vector and is used by one thread at a time; it
reads the weights and never writes them. What a formula means stands in numpy_ops.

Legend: B sequences of the chunk, T time, C n_embd, H heads, D = C/H, F = 4C, V vocab, N = B·T.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_randygpt.backends.numpy import ops
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.model import parameter_shapes
from mlx_randygpt.state import Array, Params


def flat_views(config: ModelConfig, dtype: type) -> tuple[Array, Params]:
    """One zeroed vector for all weights, and a view of it per name."""
    shapes = parameter_shapes(config)
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
    flat: Array = np.zeros(int(ends[-1]), dtype)
    pieces = np.split(flat, ends[:-1])
    return flat, {name: p.reshape(shapes[name]) for name, p in zip(shapes, pieces, strict=True)}


def copied(groups: list[Params]) -> list[Params]:
    """The same in float32, in one vector: large pages cost a fraction of many small ones."""
    arrays = [array for group in groups for array in group.values()]
    flat = np.concatenate([a.reshape(-1) for a in arrays], dtype=np.float32, casting="same_kind")
    pieces = iter(np.split(flat, np.cumsum([a.size for a in arrays])[:-1]))
    return [{name: next(pieces).reshape(a.shape) for name, a in g.items()} for g in groups]


LOGITS = 1 << 24  # numbers: 64 MB
ATTENTION = 1 << 17  # probabilities worked on at a time: half of a core's L2
Randoms = list[np.random.Generator]  # one for each sequence


@dataclass
class BranchInput:
    """What a branch or the head reads of the residual stream."""

    norm: Array  # (N, C)
    inv: Array  # (N,)
    out: Array  # (N, C), the norm itself, or what is made of it

    def first(self, n: int) -> tuple[Array, Array, Array]:
        return self.norm[:n], self.inv[:n], self.out[:n]


@dataclass
class Activations:
    """What one layer's backward pass needs from its forward pass."""

    read1: BranchInput  # by the attention
    qkv: Array  # (N, 3C), queries and keys normed and turned
    inv_qk: Array  # (N, 2H)
    p: Array  # (B, H, Tk, Tq)
    y: Array  # (N, C), the heads' outputs
    read2: BranchInput  # by the MLP
    r: Array  # (N, F), max(h, 0)
    mask1: Array  # (N, C), dropout after the attention; empty without dropout
    mask2: Array  # (N, C), dropout after the MLP


class Chunk:
    """Scratch memory for up to `rows` sequences of `block_size` tokens, and the vector and views
    that gradients are added to. GPT-2's differs in its norms, products and activation."""

    head_name = "lm_head.weight"

    def __init__(
        self, config: ModelConfig, rows: int, block_size: int, dtype: type,
        flat_grads: Array, grads: Params,
    ) -> None:  # fmt: skip
        self.config = config
        self.rows, self.block_size = rows, block_size
        n, c, t, h = rows * block_size, config.n_embd, block_size, config.n_head

        def new(*shape: int) -> Array:
            return np.empty(shape, dtype)

        drop = n if config.dropout else 0

        def read(apart: bool) -> BranchInput:
            norm = new(n, c)
            return BranchInput(norm, new(n), new(n, c) if apart else norm)

        def layer() -> Activations:
            apart = config.token_shift or config.is_gpt2
            return Activations(
                read(apart), new(n, 3 * c), new(n, 2 * h), new(rows, h, t, t), new(n, c),
                read(apart), new(n, 4 * c), new(drop, c), new(drop, c),
            )  # fmt: skip

        self.layers = [layer() for _ in range(config.n_layer)]
        self.x, self.dx, self.branch, self.scratch = new(n, c), new(n, c), new(n, c), new(n, c)
        self.final = read(config.is_gpt2)
        self.logits = new(max(1, min(n, LOGITS // config.vocab_size)), config.vocab_size)
        few = max(1, min(rows, ATTENTION // (h * t * t)))
        self.ds = new(few, h, t, t)
        self.turned = new(few, h, config.head_size, t)  # heads with time last
        self.wide, self.dqkv, self.dropped = new(n, 4 * c), new(n, 3 * c), new(drop, c)
        self.phases = ops.rope_phases(np.arange(t), config.head_size, 2 * h, dtype)  # of q and k
        self.back_phases = self.phases.conj()
        self.flat_grads, self.grads = flat_grads, grads
        self.spare = new(max(gradient.size for gradient in self.grads.values()))
        self.accumulating = False

    def forward(self, w: Params, tokens: Array, random: Randoms | None) -> Array:
        """What the head reads of tokens (B, T), (N, C); with `random`, dropout draws from it."""
        b, t = tokens.shape
        x = np.take(w["wte.weight"], tokens.reshape(-1), axis=0, out=self.x[: b * t], mode="clip")
        if self.config.position == "learned":
            x.reshape(b, t, -1)[...] += w["wpe.weight"][:t]
        for i in range(self.config.n_layer):
            self._layer(w, i, x, t, random)
        return self._read(w, "ln_f", x, self.final, None) if self.config.final_norm else x

    def _layer(self, w: Params, i: int, x: Array, t: int, random: Randoms | None) -> None:
        act = self.layers[i]
        x += self._drop(self._attention(w, i, act, x, len(x) // t, t), act.mask1, random)
        x += self._drop(self._mlp(w, i, act, x, t), act.mask2, random)

    def head(self, w: Params, final: Array, targets: Array, scale: float | None) -> float:
        """Σ cross-entropy of final (N, C) against targets (N,). With `scale`, also the gradients
        of scale times that: the head's into `grads`, final's into dx. A large vocabulary is worked
        through in blocks of positions, so that the logits never stand in memory all at once."""
        weight, loss = w[self.head_name], 0.0
        for start in range(0, len(final), len(self.logits)):
            part = slice(start, start + len(self.logits))
            inputs, wanted = final[part], targets[part]
            logits = np.matmul(inputs, weight.T, out=self.logits[: len(inputs)])
            loss += ops.cross_entropy(logits, wanted)
            if scale is not None:
                ops.cross_entropy_backward(logits, wanted, scale)
                self._weight_grad(self.head_name, logits, inputs, more=start > 0)
                np.matmul(logits, weight, out=self.dx[: len(final)][part])
        return loss

    def backward(self, w: Params, tokens: Array, dropped: bool) -> None:
        """Add the gradients of the last forward pass to `grads`, once `head` has left its in dx."""
        b, t = tokens.shape
        dx = self.dx[: b * t]
        if self.config.final_norm:
            self._read_backward(w, "ln_f", dx, self.final, None)
        for i in reversed(range(self.config.n_layer)):
            self._layer_backward(w, i, dx, t, dropped)
        if not self.accumulating and self.head_name != "wte.weight":
            self.grads["wte.weight"][...] = 0
        ops.embedding_backward(dx, tokens.reshape(-1), self.grads["wte.weight"])
        if self.config.position == "learned":
            dwpe = self.grads["wpe.weight"]
            if not self.accumulating:
                dwpe[...] = 0
            dwpe[:t] += dx.reshape(b, t, -1).sum(axis=0)
        self.accumulating = True

    def _layer_backward(self, w: Params, i: int, dx: Array, t: int, dropped: bool) -> None:
        act, b = self.layers[i], len(dx) // t
        dx += self._mlp_backward(w, i, act, self._undrop(dx, act.mask2, dropped), t)
        dx += self._attention_backward(w, i, act, self._undrop(dx, act.mask1, dropped), b, t)

    def _attention(self, w: Params, i: int, act: Activations, x: Array, b: int, t: int) -> Array:
        n, config = b * t, self.config
        qkv, y = act.qkv[:n], act.y[:n]
        inputs = self._read(w, f"h.{i}.ln_1", x, act.read1, t)
        self._product(w, f"h.{i}.attn.c_attn", inputs, qkv)  # (N, 3C)
        if config.qk_norm:
            qk = self._per_head(qkv, n)
            ops.rms_norm(qk, qk, act.inv_qk[:n])
        if config.position == "rope":
            ops.rotate(qkv.reshape(b, t, -1)[:, :, : 2 * config.n_embd], self.phases[:t])
        ops.attention(
            qkv.reshape(b, t, -1), config.n_head, config.qk_norm,
            self.turned[..., :t], act.p[:b, :, :t, :t], y.reshape(b, t, -1),
        )  # fmt: skip
        return self._product(w, f"h.{i}.attn.c_proj", y, self.branch[:n])  # (N, C)

    def _attention_backward(
        self, w: Params, i: int, act: Activations, dbranch: Array, b: int, t: int
    ) -> Array:
        n, config = b * t, self.config
        qkv, dqkv, y = act.qkv[:n], self.dqkv[:n], act.y[:n]
        dy = self._product_backward(w, f"h.{i}.attn.c_proj", dbranch, y, self.scratch[:n])  # (N, C)
        ops.attention_backward(
            dy.reshape(b, t, -1), y.reshape(b, t, -1), qkv.reshape(b, t, -1),
            act.p[:b, :, :t, :t], config.n_head,
            self.turned[..., :t], self.ds[..., :t, :t], dqkv.reshape(b, t, -1),
        )  # fmt: skip
        if config.qk_norm:  # the rotation keeps lengths, so the norm goes back in turned space
            turned, dturned = self._per_head(qkv, n), self._per_head(dqkv, n)
            scratch = self._per_head(self.wide[:n], n)
            ops.rms_norm_backward(dturned, turned, act.inv_qk[:n], scratch)
        if config.position == "rope":
            turned = dqkv.reshape(b, t, -1)[:, :, : 2 * config.n_embd]
            ops.rotate(turned, self.back_phases[:t])
        inputs, dx = act.read1.out[:n], self.branch[:n]  # (N, C)
        self._product_backward(w, f"h.{i}.attn.c_attn", dqkv, inputs, dx)
        return self._read_backward(w, f"h.{i}.ln_1", dx, act.read1, t)

    def _mlp(self, w: Params, i: int, act: Activations, x: Array, t: int) -> Array:
        n = len(x)
        r, a = act.r[:n], self.wide[:n]
        inputs = self._read(w, f"h.{i}.ln_2", x, act.read2, t)
        self._product(w, f"h.{i}.mlp.c_fc", inputs, r)  # (N, F)
        self._activate(r, a)
        return self._product(w, f"h.{i}.mlp.c_proj", a, self.branch[:n])  # (N, C)

    def _mlp_backward(self, w: Params, i: int, act: Activations, dbranch: Array, t: int) -> Array:
        n = len(dbranch)
        a = wide = self.wide[:n]  # (N, F)
        self._activate(act.r[:n], a, again=True)
        dh = self._product_backward(w, f"h.{i}.mlp.c_proj", dbranch, a, wide)
        self._activate_backward(dh, act.r[:n])
        inputs, dx = act.read2.out[:n], self.branch[:n]  # (N, C)
        self._product_backward(w, f"h.{i}.mlp.c_fc", dh, inputs, dx)
        return self._read_backward(w, f"h.{i}.ln_2", dx, act.read2, t)

    def _activate(self, h: Array, out: Array, again: bool = False) -> None:
        """a of h (N, F); in the backward pass once more, which is cheaper than keeping it."""
        (ops.relu_squared_again if again else ops.relu_squared)(h, out)

    def _activate_backward(self, da: Array, r: Array) -> None:
        ops.relu_squared_backward(da, r)

    def _product(self, w: Params, name: str, inputs: Array, out: Array) -> Array:
        """inputs · Wᵀ."""
        return np.matmul(inputs, w[f"{name}.weight"].T, out=out)

    def _product_backward(
        self, w: Params, name: str, dout: Array, inputs: Array, out: Array
    ) -> Array:
        """dinputs = dout · W; dW is added to `grads` before anything is written to `out`."""
        self._weight_grad(f"{name}.weight", dout, inputs)
        return np.matmul(dout, w[f"{name}.weight"], out=out)

    def _read(self, w: Params, name: str, x: Array, read: BranchInput, t: int | None) -> Array:
        """What a branch or the head (without t) reads of the residual stream x: its norm, shifted
        if the model does so. GPT-2's norms have weights, under this name."""
        norm, inv, out = read.first(len(x))
        ops.rms_norm(x, norm, inv)
        if t and self.config.token_shift:
            ops.token_shift(norm.reshape(-1, t, x.shape[-1]), out.reshape(-1, t, x.shape[-1]))
        return out

    def _read_backward(
        self, w: Params, name: str, dx: Array, read: BranchInput, t: int | None
    ) -> Array:
        """From the gradient of what is read to that of x, over dx."""
        norm, inv, _ = read.first(len(dx))
        if t and self.config.token_shift:
            ops.token_shift_backward(dx.reshape(-1, t, dx.shape[-1]))
        ops.rms_norm_backward(dx, norm, inv, self.scratch[: len(dx)])
        return dx

    def _per_head(self, x: Array, n: int) -> Array:
        """Queries and keys of x (N, ≥2C) by head: a view (N, 2H, D)."""
        config = self.config
        return x[:, : 2 * config.n_embd].reshape(n, 2 * config.n_head, config.head_size)

    def _weight_grad(self, name: str, dout: Array, inputs: Array, more: bool = False) -> None:
        """dW += doutᵀ · inputs, (out, in); the first chunk of a step overwrites, unless it is
        `more` of the same chunk."""
        gradient = self.grads[name]
        if self.accumulating or more:
            spare = self.spare[: gradient.size].reshape(gradient.shape)
            gradient += np.matmul(dout.T, inputs, out=spare)
        else:
            np.matmul(dout.T, inputs, out=gradient)

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


def recomputing(kind: type[Chunk]) -> type[Chunk]:
    """Such a chunk of this architecture."""
    return type(f"Recomputing{kind.__name__}", (Recomputing, kind), {})


class Recomputing(Chunk):
    """What is different; every layer shares one `Activations`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        n_layer = self.config.n_layer
        self.layers = self.layers[:1] * n_layer  # the others were never written to
        self.inputs: list[Array] = [np.empty_like(self.x) for _ in range(n_layer - 1)]
        self.draws: list[Randoms | None] = [None] * n_layer

    def _layer(self, w: Params, i: int, x: Array, t: int, random: Randoms | None) -> None:
        if i < len(self.inputs):  # nothing comes between the last layer's two passes
            self.inputs[i][: len(x)], self.draws[i] = x, deepcopy(random)
        super()._layer(w, i, x, t, random)

    def _layer_backward(self, w: Params, i: int, dx: Array, t: int, dropped: bool) -> None:
        if i < len(self.inputs):
            self._again(w, i, len(dx), t)
        super()._layer_backward(w, i, dx, t, dropped)

    def _again(self, w: Params, i: int, n: int, t: int) -> None:
        """The forward pass of layer i but for its last product, which nothing reads."""
        act, x, random = self.layers[i], self.inputs[i][:n], self.draws[i]
        x += self._drop(self._attention(w, i, act, x, n // t, t), act.mask1, random)
        inputs = self._read(w, f"h.{i}.ln_2", x, act.read2, t)
        self._activate(self._product(w, f"h.{i}.mlp.c_fc", inputs, act.r[:n]), self.wide[:n])
        self._drop(self.branch[:n], act.mask2, random)
