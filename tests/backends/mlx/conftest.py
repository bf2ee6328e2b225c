"""The Metal kernels on the CPU, for the tests of this folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest


@pytest.fixture(scope="session")
def build_on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a stand-in for `kernels.build`; the test is skipped without g++."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels with")
    from metal_on_cpu import compiled, launcher

    return partial(launcher, compiled(tmp_path_factory.mktemp("kernels")))


@pytest.fixture
def on_cpu(build_on_cpu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the Metal kernels on the CPU."""
    from mlx_randygpt.backends.mlx import kernels

    monkeypatch.setattr(kernels, "build", build_on_cpu)
