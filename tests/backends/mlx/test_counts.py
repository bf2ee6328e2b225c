"""The calls of one step, compared with the committed table: more calls make it slower.

After an intended change, `python benchmarks/roofline.py --counts` rewrites the table.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def roofline(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("roofline")


def test_a_step_calls_what_the_table_says(roofline) -> None:  # type: ignore[no-untyped-def]
    assert roofline.counts() == json.loads((BENCHMARKS / "counts.json").read_text())


def test_the_products_of_a_step_are_those_of_the_model(roofline) -> None:  # type: ignore[no-untyped-def]
    """Six FLOP for each weight and token: three products per matrix, none for the embedding."""
    model = roofline.sized("small", "modern")
    step = roofline.stepper(model, 4)
    flop = sum(values[1] for values in roofline.recorded(step).values())
    weights = 12 * model.n_layer * model.n_embd**2 + model.vocab_size * model.n_embd
    assert flop == 6 * weights * 4 * model.block_size
