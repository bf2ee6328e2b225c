"""The worked example of docs/third-backend.md: its own text, put where it says."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from mlx_randygpt import check, config
from mlx_randygpt.backends.base import Backend
from mlx_randygpt.checkpoint import load_checkpoint
from mlx_randygpt.training.loop import Run, train

Make = Callable[..., tuple[Run, Backend]]

PAGE = Path(__file__).parents[2] / "docs" / "third-backend.md"


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module and the row of the page."""
    source, row = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    ((name, where),) = eval("{" + row + "}").items()
    module = ModuleType(where[0])
    exec(source, module.__dict__)
    monkeypatch.setitem(sys.modules, where[0], module)
    monkeypatch.setitem(config.BACKENDS, name, where)


def test_its_gradients_are_those_of_numpy_up_to_rounding() -> None:
    model = check.check_model("modern")
    findings = list(check.cross_check(model, check.scaled_up(model, 1), 1, "double"))
    assert all(finding.error <= finding.bound for finding in findings)
    assert max(finding.error for finding in findings) > 0  # float32 against float64


def test_it_trains_as_numpy_does_and_numpy_goes_on(make_run: Make, tmp_path: Path) -> None:
    run, double = make_run("modern", "double", iters=3)
    _, single = make_run("modern", iters=3)
    for backend in (double, single):
        list(train(run, backend, tmp_path / backend.name))
    saved = load_checkpoint(tmp_path / "double" / "checkpoint.safetensors")
    assert (saved.state.step, saved.backend) == (3, "double")
    for name, w in single.state().params.items():
        assert check.distance(saved.state.params[name], w) < 2e-5, name  # measured: 1.8e-6
    longer, backend = make_run("modern", state=saved.state, iters=5)
    list(train(longer, backend, tmp_path / "on"))
    assert backend.step == 5
