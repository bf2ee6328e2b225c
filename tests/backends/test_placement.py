"""Where text is generated: by size, number of texts, and what this machine has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_randygpt import backends, settings
from mlx_randygpt.api import load
from mlx_randygpt.backends import choose_for_text, placement
from mlx_randygpt.backends.base import Backend, BackendError
from mlx_randygpt.backends.placement import gpu_from
from mlx_randygpt.checkpoint import Checkpoint, save_checkpoint
from mlx_randygpt.cli import group
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.model import parameter_count
from mlx_randygpt.progress import Progress
from mlx_randygpt.training.loop import Run, train
from mlx_randygpt.training.reports import SampleLog

Make = Callable[..., tuple[Run, Backend]]


def model(preset: str) -> ModelConfig:
    return settings.resolve_new({"preset": preset}, 67)[0]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this a machine on which MLX has a GPU and numba is installed."""
    device = SimpleNamespace(has_gpu=True, recommended=0)
    monkeypatch.setattr(backends, "mlx_device", lambda: (device, ""))
    monkeypatch.setattr(placement, "find_spec", lambda name: name)


def test_the_break_even_falls_from_twelve_million_to_one() -> None:
    assert gpu_from(1, compiled=True) == 12e6
    assert gpu_from(32, compiled=True) == pytest.approx(1e6)
    assert gpu_from(1, compiled=False) == 3e6
    sizes = [gpu_from(n, compiled=True) for n in (1, 2, 8, 64, 4096)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("preset", "n_streams", "expected"),
    [
        ("small", 1, "numpy"),  # 1.2 M
        ("small", 16, "numpy"),
        ("small", 32, "mlx"),
        ("medium", 1, "numpy"),  # 4.8 M
        ("medium", 32, "mlx"),
        ("xl", 1, "mlx"),  # 14 M
    ],
)
def test_a_gpu_gets_the_large_models_and_many_texts(
    gpu: None, preset: str, n_streams: int, expected: str
) -> None:
    name, reason = choose_for_text("auto", model(preset), n_streams)
    assert name == expected
    other = {"numpy": "the GPU", "mlx": "NumPy"}[name]
    assert reason.startswith(f"faster than {other} with ")
    assert reason.endswith(f" parameters and {n_streams} text{'s' * (n_streams > 1)} at once")


def test_without_numba_and_for_gpt2_the_gpu_gets_more(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    medium = model("medium")
    assert 3e6 < parameter_count(medium) < 12e6
    gpt2 = settings.resolve_new({"preset": "medium", "arch": "gpt2"}, 67)[0]
    assert choose_for_text("auto", gpt2, 1)[0] == "mlx"  # numba's function cannot decode it
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    assert choose_for_text("auto", medium, 1)[0] == "mlx"


def test_a_backend_that_was_named_is_taken(gpu: None) -> None:
    assert choose_for_text("mlx", model("mini"), 1) == ("mlx", "")
    assert choose_for_text("numpy", model("gpt2"), 64) == ("numpy", "")


def test_without_a_gpu_it_is_numpy_for_the_usual_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "mlx_device", lambda: (None, "MLX is not installed"))
    assert choose_for_text("auto", model("gpt2"), 64) == ("numpy", "MLX is not installed")
    with pytest.raises(BackendError, match="MLX cannot run here"):
        choose_for_text("mlx", model("mini"), 1)


# The commands


@pytest.fixture
def checkpoint(make_run: Make, tmp_path: Path) -> Path:
    run, backend = make_run("modern")
    saved = Checkpoint(
        model=run.model,
        train=run.train,
        progress=Progress(),
        tokenizer=run.tokenizer.to_json(),
        data=run.data,
        backend="numpy",
        state=backend.state(),
    )
    save_checkpoint(tmp_path / "checkpoint.safetensors", saved)
    return tmp_path / "checkpoint.safetensors"


def call(command: str, checkpoint: Path, *words: str) -> Any:
    text = "The\n" if command == "chat" else None
    done = CliRunner().invoke(group, [command, f"--checkpoint={checkpoint}", *words], input=text)
    assert done.exit_code == 0, done.output
    return done


@pytest.mark.parametrize("command", ["sample", "chat"])
def test_one_line_says_where_and_why_and_the_text_is_the_same(
    gpu: None, command: str, checkpoint: Path
) -> None:
    pytest.importorskip("mlx.core", exc_type=ImportError)
    small, explicit = call(command, checkpoint), call(command, checkpoint, "--backend=mlx")
    line, *_ = small.stderr.splitlines()
    assert line.startswith("Backend: NumPy on ")
    assert line.endswith("parameters and 1 text at once)")
    assert "(faster than the GPU with 2" in line
    assert explicit.stderr.splitlines()[0].startswith("Backend: MLX on ")
    assert small.stdout == explicit.stdout
    assert load(checkpoint).backend.name == "numpy"


def test_sample_counts_its_texts(
    gpu: None, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlx.core", exc_type=ImportError)
    monkeypatch.setattr(placement, "MANY_STREAMS", 1e4)
    many = call("sample", checkpoint, "--num-samples=32", "--max-tokens=2")
    assert "Backend: MLX on " in many.stderr
    assert "faster than NumPy with 2" in many.stderr
    assert "parameters and 32 texts at once)" in many.stderr


def test_samples_of_a_run_come_from_the_faster_backend_with_the_same_text(
    make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlx.core", exc_type=ImportError)

    def samples(text_backend: str) -> list[str]:
        run, backend = make_run("modern", "mlx", iters=4, sample_every=2)
        reports = train(replace(run, text_backend=text_backend), backend)
        return [report.text for report in reports if isinstance(report, SampleLog)]

    expected = samples("")
    assert len(expected) == 2
    assert samples("mlx") == expected
    read: list[str] = []
    numpy = backends.make_scorer

    def make_scorer(name: str, *words: Any) -> Any:
        read.append(name)
        return numpy(name, *words)

    monkeypatch.setattr(backends, "make_scorer", make_scorer)
    assert samples("numpy") == expected
    assert read == ["numpy", "numpy"]


def test_train_says_where_its_samples_come_from(
    gpu: None, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlx.core", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(text)
    words = ["train", "--plain", "--data", "text.txt", "--preset", "mini", "--batch-size", "2"]
    done = CliRunner().invoke(group, [*words, "--iters", "2"])
    assert done.exit_code == 0, done.output
    assert "Samples: NumPy, faster than the GPU with " in done.stdout
    explicit = CliRunner().invoke(group, [*words, "--iters=2", "--backend=mlx", "--overwrite"])
    assert "Samples: " not in explicit.stdout
