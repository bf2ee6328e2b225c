"""The cells of docs/notebook.ipynb, run in order as a reader would."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import mlx_randygpt

plt = pytest.importorskip("matplotlib.pyplot")

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"
CELLS = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]


def test_it_is_stored_with_its_outputs() -> None:
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    kinds = {output["output_type"] for cell in CELLS for output in cell["outputs"]}
    assert kinds == {"stream", "display_data"}  # texts and pictures, no error


def test_it_uses_public_names_only() -> None:
    source = "".join(line for cell in CELLS for line in cell["source"])
    assert "from mlx_randygpt" not in source
    assert set(re.findall(r"\bgpt\.(\w+)", source)) <= set(mlx_randygpt.__all__)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the names of the notebook stand for after its last cell."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("reader"))
        plt.switch_backend("Agg")
        found: dict[str, Any] = {}
        for cell in CELLS:
            exec("".join(cell["source"]), found)
        yield found
        plt.close("all")


def test_the_model_of_the_notebook_learns(names: dict[str, Any]) -> None:
    before, after = names["evals"][0].val_loss, names["evals"][-1].val_loss
    assert after < 0.5 * before  # measured: 4.64 and 1.51
    assert names["score"].loss == pytest.approx(after, rel=1e-3)


def test_it_shows_curves_and_a_map_of_every_head(names: dict[str, Any]) -> None:
    assert [len(plt.figure(n).axes) for n in plt.get_fignums()] == [1, 8]
    assert len(names["written"]) == 200
