"""Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): a trained model is fine-tuned by few
numbers, W = W₀ + (alpha / rank) · B · A, with W₀ frozen.

Here are first values, merging, and what is trained. Knows no backend but by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import numpy as np

from mlx_randygpt.config import LORA_TARGETS, ConfigError, ModelConfig
from mlx_randygpt.state import Params, rng


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Published name -> shape, in the order every file and every backend keeps; (out, in)."""
    c, v = config.n_embd, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (v, c)}
    if config.position == "learned":
        shapes["wpe.weight"] = (config.block_size, c)
    for i in range(config.n_layer):
        shapes[f"h.{i}.attn.c_attn.weight"] = (3 * c, c)  # query, key and value stacked
        shapes[f"h.{i}.attn.c_proj.weight"] = (c, c)
        shapes[f"h.{i}.mlp.c_fc.weight"] = (4 * c, c)
        shapes[f"h.{i}.mlp.c_proj.weight"] = (c, 4 * c)
    if config.is_gpt2:
        shapes |= gpt2_vector_shapes(config.n_layer, c, config.bias)
    else:
        shapes["lm_head.weight"] = (v, c)
    return shapes | lora_shapes(shapes, config.lora_rank, config.lora_targets)


def parameter_count(config: ModelConfig) -> int:
    """Trainable numbers, embeddings and head included."""
    return sum(int(np.prod(shape)) for shape in parameter_shapes(config).values())


def flops_per_token(config: ModelConfig) -> int:
    """Floating-point operations of one training step per token: 6 per weight of a product, and
    12·C·T per layer for attention over the full square (the convention of PaLM, appendix B)."""
    weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    return 6 * weights + 12 * config.n_layer * config.n_embd * config.block_size


def muon_parts(name: str) -> int:
    """How many stacked square-ish matrices Muon sees in this weight; 0 means AdamW updates it."""
    if not (name.startswith("h.") and ".c_" in name and name.endswith("weight")):
        return 0
    return 3 if name.endswith("c_attn.weight") else 1


def initial_params(config: ModelConfig, seed: int) -> Params:
    """The untrained weights, float32: normal(0, init_scale / √C); output projections zero, or
    smaller by √(2L) as in GPT-2."""
    params: Params = {}
    for index, (name, shape) in enumerate(parameter_shapes(config).items()):
        zero = config.zero_init and name.endswith("c_proj.weight")
        if len(shape) == 1 or zero or name.endswith("lora_b"):
            params[name] = np.full(shape, "ln_" in name and name.endswith("weight"), np.float32)
            continue
        scale = (2 * config.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 1.0
        normal = rng(seed, "init", index).standard_normal(shape, dtype=np.float32)
        params[name] = normal * np.float32(config.init_scale * config.n_embd**-0.5 * scale)
    return params


BACKENDS = {  # name -> module and class; as config.BACKENDS for models with adapters
    "mlx": ("mlx_randygpt.backends.mlx.adapters", "MLXLora"),
    "numpy": ("mlx_randygpt.backends.numpy.adapters", "NumpyLora"),
}


def adapter_backend(name: str) -> tuple[str, str]:
    """Module and class of the backend that trains adapters; ConfigError where there is none."""
    if name not in BACKENDS:
        raise ConfigError(f"the backend {name} has no --lora-rank; {' and '.join(BACKENDS)} do")
    return BACKENDS[name]


def adapter_scale(config: ModelConfig) -> float:
    """What B · A is multiplied by."""
    return config.lora_alpha / config.lora_rank


def base_config(config: ModelConfig) -> ModelConfig:
    """The model that is adapted."""
    alpha, targets = ModelConfig.lora_alpha, ModelConfig.lora_targets  # the defaults
    return replace(config, lora_rank=0, lora_alpha=alpha, lora_targets=targets)


def adapter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what is trained, in the published order: A, B, matrix by matrix."""
    frozen = parameter_shapes(base_config(config))
    return {n: s for n, s in parameter_shapes(config).items() if n not in frozen}


def adapted_matrices(config: ModelConfig) -> dict[str, tuple[str, str]]:
    """Of each adapted weight, the names of its A and its B."""
    firsts = (name for name in adapter_shapes(config) if name.endswith(".lora_a"))
    places = [name.removesuffix(".lora_a") for name in firsts]
    return {f"{place}.weight": (f"{place}.lora_a", f"{place}.lora_b") for place in places}


def trained_count(config: ModelConfig) -> int:
    """How many numbers training changes: those of the adapters, where there are any."""
    shapes = adapter_shapes(config) if config.lora_rank else parameter_shapes(config)
    return sum(prod(shape) for shape in shapes.values())


def add_adapters(config: ModelConfig, params: Params, seed: int) -> Params:
    """The weights of a trained model and first adapters beside them: A normal, B zero, so that
    nothing is changed yet."""
    if not config.lora_rank:
        return params
    first = initial_params(config, seed)
    return params | {name: first[name] for name in adapter_shapes(config)}


def merge_adapters(params: Params, config: ModelConfig) -> tuple[Params, ModelConfig]:
    """The same model without adapters: W₀ + (alpha / rank) · B · A in their place."""
    if not config.lora_rank:
        return params, config
    whole = {name: params[name] for name in parameter_shapes(base_config(config))}
    for name, (a, b) in adapted_matrices(config).items():
        whole[name] = whole[name] + adapter_scale(config) * (params[b] @ params[a])
    return whole, base_config(config)


def lora_shapes(
    weights: Mapping[str, tuple[int, ...]], rank: int, targets: str
) -> dict[str, tuple[int, ...]]:
    """`h.i.….lora_a` (rank, in) and `.lora_b` (out, rank) of each chosen matrix; none at rank 0."""
    wanted, found = targets.split(","), dict[str, tuple[int, ...]]()
    for name, shape in weights.items():
        place, _, kind = name.rpartition(".")
        layer = place.rpartition(".")[2]
        if rank and kind == "weight" and layer in LORA_TARGETS and {layer, "all"} & {*wanted}:
            found[f"{place}.lora_a"] = (rank, shape[1])
            found[f"{place}.lora_b"] = (shape[0], rank)
    return found


GPT2_NORM_EPS = 1e-5  # of every LayerNorm
GPT2_IN_OUT = (  # weights that its files hold as (in, out)
    "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight",
)  # fmt: skip


def gpt2_vector_shapes(n_layer: int, c: int, bias: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of gains and biases, which come after all matrices; the head is wte."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(n_layer):
        for norm, products in (
            ("ln_1", {"attn.c_attn": 3 * c, "attn.c_proj": c}),
            ("ln_2", {"mlp.c_fc": 4 * c, "mlp.c_proj": c}),
        ):
            shapes[f"h.{i}.{norm}.weight"] = (c,)
            sizes = {norm: c, **products} if bias else {}
            shapes |= {f"h.{i}.{name}.bias": (size,) for name, size in sizes.items()}
    return shapes | {"ln_f.weight": (c,)} | ({"ln_f.bias": (c,)} if bias else {})
