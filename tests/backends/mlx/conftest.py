"""The Metal kernels on the CPU, for the tests of this folder."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest


@pytest.fixture(scope="session")
def build_on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a stand-in for `kernels.build`; the test is skipped without g++, and on a Mac."""
    if sys.platform == "darwin":
        pytest.skip("macOS has no fibers for the lanes; its GPU runs the kernels themselves")
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels with")
    from metal_on_cpu import compiled, launcher

    return partial(launcher, compiled(tmp_path_factory.mktemp("kernels")))


@pytest.fixture
def on_cpu(build_on_cpu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the Metal kernels on the CPU."""
    from mlx_randygpt.backends.mlx import kernels

    monkeypatch.setattr(kernels, "build", build_on_cpu)


@pytest.fixture
def launched(
    on_cpu: None, build_on_cpu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """Let models use all kernels that suit them; the names of those that run are appended."""
    from mlx_randygpt.backends.mlx import kernels, selftest

    names: list[str] = []

    def build(kernel: Any) -> Any:
        names.append(kernel.name)
        return build_on_cpu(kernel)

    def pass_all(sizes: selftest.Sizes) -> tuple[selftest.Verdict, ...]:
        return tuple(selftest.Verdict(kernel) for kernel in selftest.suitable(sizes))

    monkeypatch.setattr(kernels, "build", build)
    monkeypatch.setattr(selftest, "unavailable", lambda: "")
    monkeypatch.setattr(selftest, "verdicts", pass_all)
    selftest.chosen.cache_clear()
    yield names
    selftest.chosen.cache_clear()
