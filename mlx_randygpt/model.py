"""The weights of a model: one table of names, shapes and roles, and what follows from it.

Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) stand beside the frozen matrices of a
trained model: W = W₀ + (alpha / rank) · B · A.

Legend: C n_embd, F = 4C, V vocab, L layers, r rank. Weights are (out, in).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from math import prod

import numpy as np

from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.state import Array, Params, TrainState, rng

GPT2_NORM_EPS = 1e-5  # of every LayerNorm


class Role(Enum):
    """What a weight does, which decides how it starts and which optimizer updates it."""

    EMBEDDING = "embedding"
    MATRIX = "matrix"  # of a block
    OUTPUT_PROJECTION = "output projection"  # a block's matrix whose output joins the residual
    HEAD = "head"
    GAIN = "gain"
    BIAS = "bias"
    ADAPTER = "adapter"


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One weight of a model."""

    name: str  # as published, "h.0.attn.c_attn.weight"
    shape: tuple[int, ...]
    role: Role
    std: float = 0.0  # of its initial values; 0: all are 0, or 1 for a gain
    stacked: int = 1  # projections in it: 3 where query, key and value are stacked
    in_out: bool = False  # GPT-2's own files hold it as (in, out)
    target: str = ""  # of a block's matrix: the word of --lora-targets for it
    adapts: str = ""  # of an adapter: the name of the matrix beside which it stands

    @property
    def size(self) -> int:
        """The number of its values."""
        return prod(self.shape)

    @property
    def neurons_shape(self) -> tuple[int, ...]:
        """The shape of one number per row of a matrix, (out, 1); (1, in) if it is wider than high.

        These are its neurons: of `mlp.c_proj`, which is wider, the hidden units that it reads.
        """
        n_out, n_in = self.shape
        return (n_out, 1) if n_out >= n_in else (1, n_in)

    @property
    def is_block_matrix(self) -> bool:
        """Whether it is a matrix of a block: Muon updates it, and adapters can stand beside it."""
        return self.role in (Role.MATRIX, Role.OUTPUT_PROJECTION)

    def initial_values(self, seed: int, index: int) -> Array:
        """Return its untrained values, float32; `index` is its place in the published order."""
        if not self.std:
            return np.full(self.shape, self.role is Role.GAIN, np.float32)
        normal = rng(seed, "init", index).standard_normal(self.shape, dtype=np.float32)
        return normal * np.float32(self.std)


def parameters(config: ModelConfig) -> list[Parameter]:
    """Return every weight in the published order, which each file and each backend keeps."""
    c, v = config.n_embd, config.vocab_size
    std = config.init_scale * c**-0.5

    def table(name: str, rows: int, role: Role) -> Parameter:
        return Parameter(name=name, shape=(rows, c), role=role, std=std)

    weights = [table("wte.weight", v, Role.EMBEDDING)]
    if config.position == "learned":
        weights.append(table("wpe.weight", config.block_size, Role.EMBEDDING))
    weights += [matrix for i in range(config.n_layer) for matrix in _block_matrices(config, i, std)]
    if config.is_gpt2:
        weights += _gpt2_vectors(config)
    else:
        weights.append(table("lm_head.weight", v, Role.HEAD))
    return weights + [a for weight in weights for a in _adapters(config, weight, std)]


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight by its name, in the published order."""
    return {weight.name: weight.shape for weight in parameters(config)}


def parameter_count(config: ModelConfig) -> int:
    """Count the values of all weights, embeddings, head and adapters included."""
    return sum(weight.size for weight in parameters(config))


def trained_count(config: ModelConfig) -> int:
    """Count the values that training changes: those of the adapters if there are any."""
    if not config.lora_rank:
        return parameter_count(config)
    return sum(prod(shape) for shape in adapter_shapes(config).values())


def flops_per_token(config: ModelConfig) -> int:
    """Count the floating-point operations of one training step per token.

    They are 6 per weight of a product, and 12·C·T per layer for attention over the full square
    (the convention of PaLM, appendix B).
    """
    weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    return 6 * weights + 12 * config.n_layer * config.n_embd * config.block_size


def muon_matrices(config: ModelConfig) -> dict[str, int]:
    """Return how many stacked matrices Muon sees in each weight that it can update, by name."""
    return {weight.name: weight.stacked for weight in parameters(config) if weight.is_block_matrix}


def second_moment_shapes(model: ModelConfig, train: TrainConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of the optimizer's second moment of each trained weight that has one.

    AdamW's is as the weight. Muon has one number per neuron, or nothing without `muon_beta2`.
    """
    trained = [p for p in parameters(model) if not model.lora_rank or p.role is Role.ADAPTER]
    by_muon = {p.name for p in trained if p.is_block_matrix and train.optimizer == "muon"}
    return {
        p.name: p.neurons_shape if p.name in by_muon else p.shape
        for p in trained
        if p.name not in by_muon or train.muon_beta2
    }


def rope_rates(head_size: int, base: float) -> Array:
    """Return ω_j = base^(−j/n) for pair j of n = ⌊D/2⌋, (n,) float64: its turn per position."""
    n = head_size // 2
    return np.asarray(base ** (-np.arange(n) / n))


def in_out_names(config: ModelConfig) -> set[str]:
    """Return the names of the weights that GPT-2's own files hold as (in, out)."""
    return {weight.name for weight in parameters(config) if weight.in_out}


def initial_state(config: ModelConfig, seed: int) -> TrainState:
    """Return the state before the first step: untrained weights, and no moments yet."""
    return TrainState(0, initial_params(config, seed), {})


def initial_params(config: ModelConfig, seed: int) -> Params:
    """Return the untrained weights, float32.

    They are normal(0, init_scale / √C); output projections are zero, or smaller by √(2L) as in
    GPT-2, and so are B of each adapter and biases zero, gains one.
    """
    weights = enumerate(parameters(config))
    return {weight.name: weight.initial_values(seed, index) for index, weight in weights}


def adapter_scale(config: ModelConfig) -> float:
    """Return alpha / rank, the factor of B · A."""
    return config.lora_alpha / config.lora_rank


def base_config(config: ModelConfig) -> ModelConfig:
    """Return the config of the model without its adapters."""
    alpha, targets = ModelConfig.lora_alpha, ModelConfig.lora_targets  # the defaults
    return replace(config, lora_rank=0, lora_alpha=alpha, lora_targets=targets)


def adapter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the adapters by their names: A, B, matrix by matrix."""
    return {p.name: p.shape for p in parameters(config) if p.role is Role.ADAPTER}


def adapted_matrices(config: ModelConfig) -> dict[str, tuple[str, str]]:
    """Return the names of A and B for each adapted matrix."""
    adapters = [p for p in parameters(config) if p.role is Role.ADAPTER]
    pairs = zip(adapters[::2], adapters[1::2], strict=True)
    return {a.adapts: (a.name, b.name) for a, b in pairs}


def add_adapters(config: ModelConfig, params: Params, seed: int) -> Params:
    """Add untrained adapters to the weights of a trained model; B is zero, so nothing changes."""
    if not config.lora_rank:
        return params
    first = initial_params(config, seed)
    return params | {name: first[name] for name in adapter_shapes(config)}


def add_tokens(
    params: Params, config: ModelConfig, vocab_size: int, seed: int
) -> tuple[Params, ModelConfig]:
    """Add the rows of new tokens to the embedding and the head; all other weights stay.

    The rows are random, with the standard deviation of those that are there.
    """
    if vocab_size == config.vocab_size:
        return params, config
    grown = dict(params)
    for index, weight in enumerate(parameters(config)):
        if weight.name in ("wte.weight", "lm_head.weight"):
            rows = params[weight.name]
            shape = vocab_size - len(rows), rows.shape[1]
            normal = rng(seed, "init", index, 1).standard_normal(shape, dtype=np.float32)
            grown[weight.name] = np.concatenate([rows, normal * rows.std()])
    return grown, replace(config, vocab_size=vocab_size)


def merge_adapters(params: Params, config: ModelConfig) -> tuple[Params, ModelConfig]:
    """Merge the adapters into the weights: W₀ + (alpha / rank) · B · A, and the model's config."""
    if not config.lora_rank:
        return params, config
    merged = {name: params[name] for name in parameter_shapes(base_config(config))}
    for name, (a, b) in adapted_matrices(config).items():
        merged[name] = merged[name] + adapter_scale(config) * (params[b] @ params[a])
    return merged, base_config(config)


def _block_matrices(config: ModelConfig, layer: int, std: float) -> Iterator[Parameter]:
    """Yield the four matrices of a block."""
    c = config.n_embd
    projection_std = 0.0 if config.zero_init else std * (2 * config.n_layer) ** -0.5

    def matrix(name: str, n_out: int, n_in: int, role: Role, stacked: int = 1) -> Parameter:
        return Parameter(
            name=f"h.{layer}.{name}.weight",
            shape=(n_out, n_in),
            role=role,
            std=std if role is Role.MATRIX else projection_std,
            stacked=stacked,
            in_out=True,
            target=name.rpartition(".")[2],
        )

    yield matrix("attn.c_attn", 3 * c, c, Role.MATRIX, stacked=3)
    yield matrix("attn.c_proj", c, c, Role.OUTPUT_PROJECTION)
    yield matrix("mlp.c_fc", 4 * c, c, Role.MATRIX)
    yield matrix("mlp.c_proj", c, 4 * c, Role.OUTPUT_PROJECTION)


def _gpt2_vectors(config: ModelConfig) -> Iterator[Parameter]:
    """Yield GPT-2's gains and biases, which come after all matrices."""
    c = config.n_embd

    def norm(name: str) -> Iterator[Parameter]:
        yield Parameter(name=f"{name}.weight", shape=(c,), role=Role.GAIN)
        yield from bias(name, c)

    def bias(name: str, size: int, stacked: int = 1) -> Iterator[Parameter]:
        if config.bias:
            yield Parameter(name=f"{name}.bias", shape=(size,), role=Role.BIAS, stacked=stacked)

    for i in range(config.n_layer):
        yield from norm(f"h.{i}.ln_1")
        yield from bias(f"h.{i}.attn.c_attn", 3 * c, stacked=3)
        yield from bias(f"h.{i}.attn.c_proj", c)
        yield from norm(f"h.{i}.ln_2")
        yield from bias(f"h.{i}.mlp.c_fc", 4 * c)
        yield from bias(f"h.{i}.mlp.c_proj", c)
    yield from norm("ln_f")


def _adapters(config: ModelConfig, weight: Parameter, std: float) -> Iterator[Parameter]:
    """Yield A, `h.….lora_a` (r, in), and B, `h.….lora_b` (out, r), if this weight is a target."""
    targets = {weight.target, "all"} & {*config.lora_targets.split(",")}
    if not (config.lora_rank and weight.is_block_matrix and targets):
        return
    place = weight.name.removesuffix(".weight")
    (n_out, n_in), rank = weight.shape, config.lora_rank
    for name, shape, own_std in (("lora_a", (rank, n_in), std), ("lora_b", (n_out, rank), 0.0)):
        yield Parameter(
            name=f"{place}.{name}",
            shape=shape,
            role=Role.ADAPTER,
            std=own_std,
            adapts=weight.name,
        )
