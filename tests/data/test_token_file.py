"""Tokens that are read from a file in windows: those of the array, or an error."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mlx_randygpt.checkpoint import NEWEST, peek_step
from mlx_randygpt.cli import group
from mlx_randygpt.data import DataError
from mlx_randygpt.data.token_file import OpenFile, TokenFile
from mlx_randygpt.data.windows import eval_batches, sample_batch

TOKENS = np.random.default_rng(1).integers(0, 60_000, 1000, np.uint16)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    TOKENS.tofile(path := tmp_path / "a.tokens")
    os.utime(path, (1, 1))
    return path


def opened(path: Path) -> TokenFile:
    return TokenFile(OpenFile(path), TOKENS.dtype, len(TOKENS))


@pytest.mark.parametrize("part", [slice(None), slice(900), slice(900, None), slice(-50, 10_000)])
def test_windows_of_a_file_are_those_of_the_array(path: Path, part: slice) -> None:
    file, array = opened(path)[part], TOKENS[part]
    assert np.array_equal(np.asarray(file), array)
    batches = [*eval_batches(file, 7, 4), sample_batch(file, 5, 9, 1, 2)]
    for batch, expected in zip(batches, [*eval_batches(array, 7, 4)], strict=False):
        assert np.array_equal(batch.x(), expected.x())
        assert np.array_equal(batch.y(), expected.y())
    assert np.array_equal(batches[-1].x(), sample_batch(array, 5, 9, 1, 2).x())


def test_a_part_of_a_part_begins_where_it_should(path: Path) -> None:
    assert np.array_equal(np.asarray(opened(path)[100:][50:60]), TOKENS[150:160])
    assert len(opened(path)[10:5]) == 0


@pytest.mark.parametrize("size", [0, 1, 1999, 2001])
def test_a_file_that_was_cut_off_or_grew_is_refused(path: Path, size: int) -> None:
    file = opened(path)
    os.truncate(path, size)
    with pytest.raises(DataError, match=r"a\.tokens was changed while it was in use; .* --resume"):
        sample_batch(file, 5, 9, 1, 2).x()


def test_a_file_that_was_written_to_is_refused(path: Path) -> None:
    file = opened(path)
    with path.open("r+b") as other:
        other.write(b"x")
    with pytest.raises(DataError, match="was changed while it was in use"):
        np.asarray(file)


def test_a_file_that_was_replaced_or_removed_is_still_what_it_was(path: Path) -> None:
    file = opened(path)
    (other := path.with_name("other")).write_bytes(b"")
    other.replace(path)
    path.unlink()
    assert np.array_equal(np.asarray(file), TOKENS)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_file_is_closed_with_its_last_part(path: Path) -> None:
    part = opened(path)[5:]
    assert str(path) in open_files()
    del part
    gc.collect()
    assert str(path) not in open_files()


def open_files() -> set[str]:
    descriptors = Path("/proc/self/fd").iterdir()
    return {os.readlink(path) for path in descriptors if path.is_symlink()}


@pytest.mark.slow
def test_a_run_whose_cache_is_cut_off_says_so_and_resumes(tmp_path: Path) -> None:
    """A map would end the process with SIGBUS."""
    (tmp_path / "text").write_text("to be or not to be, that is it\n" * 600_000)  # 19 MB: cached
    words = ["train", "--plain", "--backend=numpy", "--out", str(tmp_path / "out")]
    fresh = ["--n-layer=1", "--n-head=1", "--n-embd=8", "--block-size=8", "--save-every=1"]
    fresh += ["--iters=1000000", "--data", str(tmp_path / "text")]
    environ = os.environ | {"MLXGPT_CACHE": str(tmp_path / "cache")}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command, pipe = [sys.executable, "-m", "mlx_randygpt", *words, *fresh], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environ) as run:
        assert run.stdout
        assert run.stderr
        assert any(line.startswith("step 1/") for line in run.stdout)
        (cached,) = (tmp_path / "cache").glob("*.tokens")
        os.truncate(cached, 100)
        run.stdout.read()
        assert f"{cached} was changed while it was in use" in run.stderr.read()
    assert run.returncode == 1
    last = peek_step(tmp_path / "out" / NEWEST)
    again = CliRunner(env=environ).invoke(group, [*words, "--resume", f"--iters={last + 1}"])
    assert again.exit_code == 0, again.output
    assert cached.stat().st_size > 19_000_000
