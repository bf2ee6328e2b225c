"""Which matrices low-rank adapters stand beside, and what the adapters are called.

Names and shapes alone: what is done with them is the business of lora and of the backends.
"""

from __future__ import annotations

from collections.abc import Mapping

TARGETS = ("c_attn", "c_proj", "c_fc", "all")  # of each block; c_proj is attention's and MLP's


def shapes(
    weights: Mapping[str, tuple[int, ...]], rank: int, targets: str
) -> dict[str, tuple[int, ...]]:
    """`h.i.….lora_a` (rank, in) and `.lora_b` (out, rank) of each chosen matrix; none at rank 0."""
    wanted, found = targets.split(","), dict[str, tuple[int, ...]]()
    for name, shape in weights.items():
        place, _, kind = name.rpartition(".")
        layer = place.rpartition(".")[2]
        if rank and kind == "weight" and layer in TARGETS and {layer, "all"} & {*wanted}:
            found[f"{place}.lora_a"] = (rank, shape[1])
            found[f"{place}.lora_b"] = (shape[0], rank)
    return found
