"""Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): a trained model is fine-tuned by few
numbers, W = W₀ + (alpha / rank) · B · A, with W₀ frozen.

Here are first values, merging, and what is trained. Knows no backend but by name.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from mlx_randygpt.config import ConfigError, ModelConfig
from mlx_randygpt.state import Params, initial_params, parameter_shapes

BACKENDS = {  # name -> module and class; as config.BACKENDS for models with adapters
    "mlx": ("mlx_randygpt.backends.mlx_lora", "MLXLora"),
    "numpy": ("mlx_randygpt.backends.numpy_lora", "NumpyLora"),
}


def backend(name: str) -> tuple[str, str]:
    """Module and class of the backend that trains adapters; ConfigError where there is none."""
    if name not in BACKENDS:
        raise ConfigError(f"the backend {name} has no --lora-rank; {' and '.join(BACKENDS)} do")
    return BACKENDS[name]


def scale(config: ModelConfig) -> float:
    """What B · A is multiplied by."""
    return config.lora_alpha / config.lora_rank


def base(config: ModelConfig) -> ModelConfig:
    """The model that is adapted."""
    alpha, targets = ModelConfig.lora_alpha, ModelConfig.lora_targets  # the defaults
    return replace(config, lora_rank=0, lora_alpha=alpha, lora_targets=targets)


def adapter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what is trained, in the published order: A, B, matrix by matrix."""
    frozen = parameter_shapes(base(config))
    return {n: s for n, s in parameter_shapes(config).items() if n not in frozen}


def matrices(config: ModelConfig) -> dict[str, tuple[str, str]]:
    """Of each adapted weight, the names of its A and its B."""
    firsts = (name for name in adapter_shapes(config) if name.endswith(".lora_a"))
    places = [name.removesuffix(".lora_a") for name in firsts]
    return {f"{place}.weight": (f"{place}.lora_a", f"{place}.lora_b") for place in places}


def trained_count(config: ModelConfig) -> int:
    """How many numbers training changes: those of the adapters, where there are any."""
    shapes = adapter_shapes(config) if config.lora_rank else parameter_shapes(config)
    return sum(prod(shape) for shape in shapes.values())


def begin(config: ModelConfig, params: Params, seed: int) -> Params:
    """The weights of a trained model and first adapters beside them: A normal, B zero, so that
    nothing is changed yet."""
    if not config.lora_rank:
        return params
    first = initial_params(config, seed)
    return params | {name: first[name] for name in adapter_shapes(config)}


def merged(params: Params, config: ModelConfig) -> tuple[Params, ModelConfig]:
    """The same model without adapters: W₀ + (alpha / rank) · B · A in their place."""
    if not config.lora_rank:
        return params, config
    whole = {name: params[name] for name in parameter_shapes(base(config))}
    for name, (a, b) in matrices(config).items():
        whole[name] = whole[name] + scale(config) * (params[b] @ params[a])
    return whole, base(config)
