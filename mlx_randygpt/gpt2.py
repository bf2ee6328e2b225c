"""What GPT-2 is, apart from any backend: switches of ModelConfig, and weights beside the matrices.

Its layers are numpy_gpt2 and mlx_gpt2.
"""

from __future__ import annotations

from typing import Any

NORM_EPS = 1e-5  # of every LayerNorm
TURNED = (  # weights that its files hold as (in, out)
    "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight",
)  # fmt: skip
ACTIVATIONS = ("gelu_tanh", "gelu")
SWITCHES: dict[str, Any] = {  # over those of a recipe
    "arch": "gpt2", "activation": "gelu_tanh", "bias": True, "position": "learned",
    "qk_norm": False, "final_norm": True, "token_shift": False, "zero_init": False,
}  # fmt: skip
FIXED = ("position", "qk_norm", "final_norm", "token_shift")  # of these


def vectors(n_layer: int, c: int, bias: bool) -> dict[str, tuple[int, ...]]:
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
