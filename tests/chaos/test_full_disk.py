"""A disk that is full at any byte of a checkpoint: the old files stay, and the line says which
file could not be written and how much room it needs."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlx_randygpt.checkpoint import NEWEST, Checkpoint, CheckpointError, Progress, save_checkpoint
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.model import initial_params
from mlx_randygpt.state import TrainState
from mlx_randygpt.words import format_bytes

POINTS = range(20)  # twentieths of the file that the disk still takes
Make = Callable[[int], Checkpoint]


@pytest.fixture
def make(
    tiny_model: Callable[..., ModelConfig], tiny_train: Callable[..., TrainConfig]
) -> Callable[[int], Checkpoint]:
    """step -> a checkpoint of about 100 kB, another one at each step."""

    def build(step: int) -> Checkpoint:
        model = tiny_model("modern")
        state = TrainState(step, initial_params(model, step), {})
        tokenizer = {"type": "char", "chars": ["a"]}
        return Checkpoint(model, tiny_train("modern"), Progress(), tokenizer, {}, "numpy", state)

    return build


@contextmanager
def no_file_longer_than(n_bytes: int) -> Iterator[None]:
    """What the kernel refuses of this process's files; it writes up to there, then EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def only_so_much_room(disk: Path, n_bytes: int) -> Iterator[None]:
    """A real disk with so many bytes left, which then has no space."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "ballast").write_bytes(bytes(free - n_bytes))
    try:
        yield
    finally:
        (disk / "ballast").unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte of its own, where this user may mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting takes root")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "ballast"}


def two_saved(folder: Path, make: Make) -> tuple[Path, dict[str, bytes]]:
    """The newest file and the one before it, and all that is in the folder."""
    for step in (1, 2):
        save_checkpoint(folder / NEWEST, make(step))
    return folder / NEWEST, contents(folder)


def assert_spared(path: Path, before: dict[str, bytes], failure: CheckpointError) -> None:
    """All is as it was, and the line names the file and the room it needs."""
    assert contents(path.parent) == before  # no temporary file either
    assert str(path) in str(failure)
    assert f"needs {format_bytes(len(before[path.name]))}" in str(failure)


@pytest.mark.parametrize("point", POINTS)
def test_a_disk_full_at_any_byte_spares_the_old_files(
    point: int, make: Make, tmp_path: Path
) -> None:
    path, before = two_saved(tmp_path, make)
    size = len(before[NEWEST])
    with (
        no_file_longer_than(size * point // len(POINTS)),
        pytest.raises(CheckpointError) as failure,
    ):
        save_checkpoint(path, make(3))
    assert_spared(path, before, failure.value)


@pytest.mark.parametrize("point", POINTS)
def test_a_disk_without_space_spares_the_old_files(
    point: int, make: Make, small_disk: Path
) -> None:
    path, before = two_saved(small_disk, make)
    size = len(before[NEWEST])
    room = size * point // len(POINTS) // 4096 * 4096
    with (
        only_so_much_room(small_disk, room),
        pytest.raises(CheckpointError, match="No space left on device") as failure,
    ):
        save_checkpoint(path, make(3))
    assert_spared(path, before, failure.value)


def test_the_next_save_succeeds_where_there_is_room_again(make: Make, tmp_path: Path) -> None:
    path, before = two_saved(tmp_path, make)
    with no_file_longer_than(10_000), pytest.raises(CheckpointError):
        save_checkpoint(path, make(3))
    save_checkpoint(path, make(3))
    assert sorted(contents(tmp_path)) == sorted(before)
    assert contents(tmp_path)[NEWEST] not in before.values()
