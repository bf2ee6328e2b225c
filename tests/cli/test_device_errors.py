"""What MLX says when a device fails, word for word, and the line that a user gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from mlx_randygpt.backends.numpy.backend import NumpyBackend
from mlx_randygpt.cli import group
from mlx_randygpt.cli.device_errors import describe_failure
from mlx_randygpt.cli.errors import Command

METAL = "[METAL] Command buffer execution failed: "
IMPACTING = f"{METAL}Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"  # noqa: E501
TIMEOUT = f"{METAL}Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)"
HANG = f"{METAL}Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang)"
VICTIM = f"{METAL}Discarded (victim of GPU error/recovery) (00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim)"  # noqa: E501
IGNORED = f"{METAL}Ignored (for causing prior/excessive GPU errors) (00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored)"  # noqa: E501
RESOURCES = "[metal::malloc] Resource limit (499000) exceeded."
MEMORY = f"{METAL}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
BUFFER = "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed buffer size of 8 bytes."  # noqa: E501


@pytest.mark.parametrize(
    ("text", "meaning", "cure"),
    [
        (IMPACTING, "kept the display waiting", "let the display sleep"),
        (IMPACTING, "kept the display waiting", "--micro-batch"),
        (IMPACTING, "kept the display waiting", "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 before"),
        (TIMEOUT, "took too long", "--micro-batch"),
        (HANG, "took too long", "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1"),
        (VICTIM, "the GPU was reset", "start again"),
        (IGNORED, "the GPU was reset", "start again"),
        (RESOURCES, "as many arrays as macOS allows", "start again"),
        (MEMORY, "out of memory", "--micro-batch auto"),
        (BUFFER, "out of memory", "--checkpoint-activations"),
    ],
)
def test_a_failure_of_the_gpu_has_a_cure(text: str, meaning: str, cure: str) -> None:
    line = describe_failure(RuntimeError(text), in_training=True)
    assert line.startswith(("macOS", "MLX", "the GPU", "out of memory"))
    assert meaning in line
    assert text[:100] in line
    assert cure in line.rpartition("); ")[2]
    assert "\n" not in line


def test_other_errors_are_none_of_the_device() -> None:
    assert describe_failure(RuntimeError("[ring] connection to a peer was lost")) == ""
    assert describe_failure(RuntimeError("There is no Stream(cpu, 0) in current thread")) == ""
    assert "out of memory" in describe_failure(MemoryError("Unable to allocate 9 GiB"))


@pytest.mark.parametrize("text", [IMPACTING, TIMEOUT, RESOURCES])
def test_every_command_reports_it_in_one_line(text: str) -> None:
    @click.command(cls=Command)
    def fails() -> None:
        raise RuntimeError(text)

    done = CliRunner().invoke(fails)
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert done.output == f"Error: {describe_failure(RuntimeError(text))}\n"


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list; its text is the error of the sixth step."""
    texts: list[str] = []
    real = NumpyBackend.train_step

    def train_step(self: Any, *words: Any) -> Any:
        if self.step == 5 and texts:
            raise RuntimeError(texts.pop())
        return real(self, *words)

    monkeypatch.setattr(NumpyBackend, "train_step", train_step)
    return texts


@pytest.mark.parametrize(
    ("says", "cure"),
    [
        (IMPACTING, "let the display sleep"),
        (TIMEOUT, "--micro-batch"),
        (RESOURCES, "start again"),
        (MEMORY, "try --micro-batch auto, --checkpoint-activations, or a smaller --batch-size"),
    ],
)
def test_a_run_that_the_gpu_ends_says_how_to_go_on(
    failing: list[str],
    says: str,
    cure: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(text)
    failing.append(says)
    small = ["--preset", "mini", "--batch-size", "2", "--iters", "7", "--backend", "numpy"]
    words = ["train", "--plain", "--data", "text.txt", "--save-every", "3", *small]
    done = CliRunner().invoke(group, words)
    resume = "mlxgpt train --resume --backend numpy"
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert done.exit_code == 1
    assert cure in line
    assert line.endswith(
        f". Saved last: checkpoints/checkpoint.safetensors (iter 3). Go on with: {resume}"
    )
    again = CliRunner().invoke(group, resume.split()[1:])
    assert again.exit_code == 0, again.output
