"""The settings of a GPT of mlx-randygpt, as transformers reads them from config.json."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class MLXGPTConfig(PretrainedConfig):  # type: ignore[misc]
    """Sizes and switches, under the names of mlx-randygpt."""

    model_type = "mlxgpt"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    }

    def __init__(  # noqa: PLR0913
        self,
        vocab_size: int = 67,
        block_size: int = 64,
        n_layer: int = 6,
        n_head: int = 8,
        n_embd: int = 128,
        dropout: float = 0.0,
        position: str = "rope",
        rope_base: float = 10000.0,
        qk_norm: bool = True,
        final_norm: bool = True,
        token_shift: bool = False,
        **others: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.block_size = block_size  # keys that a position attends to, its own included
        self.n_layer, self.n_head, self.n_embd = n_layer, n_head, n_embd
        self.dropout = dropout
        self.position, self.rope_base = position, rope_base  # "rope" | "learned"
        self.qk_norm, self.final_norm, self.token_shift = qk_norm, final_norm, token_shift
        others.setdefault("tie_word_embeddings", False)
        super().__init__(**others)
