"""Files are replaced as a whole, privately if asked, and what dead writers left is removed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_randygpt import files


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_block_that_raises_leaves_the_old_content(tmp_path: Path) -> None:
    (path := tmp_path / "a").write_bytes(b"old")

    def interrupted() -> None:
        with files.replace(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"old", ["a"])


def test_private_content_is_never_readable_by_others(tmp_path: Path) -> None:
    with files.replace(tmp_path / "a", private=True) as file:
        file.write(b"secret")
        assert [mode(path) for path in tmp_path.iterdir()] == [0o600]
    assert mode(tmp_path / "a") == 0o600


def test_the_umask_decides_otherwise(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        files.write(tmp_path / "a", b"x")
    finally:
        os.umask(old)
    assert mode(tmp_path / "a") == 0o640


def test_a_link_is_followed_and_a_device_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a")
    files.write(tmp_path / "link", b"x")
    files.write(Path(os.devnull), b"x")
    assert (tmp_path / "a").read_bytes() == b"x"
    assert (tmp_path / "link").is_symlink()
    assert Path(os.devnull).is_char_device()


WRITER = """
import sys
from pathlib import Path
from mlx_randygpt import files
with files.replace(Path(sys.argv[1])) as file:
    print("open", flush=True)
    sys.stdin.read()
"""


def test_a_sweep_spares_living_writers_and_removes_what_the_dead_left(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "a")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout
        writer.stdout.readline()
        files.sweep(tmp_path)
        assert len(os.listdir(tmp_path)) == 1
        writer.kill()
        writer.wait()
        (tmp_path / ".mine.tmp").touch()  # not named by this package
        files.sweep(tmp_path)
    assert os.listdir(tmp_path) == [".mine.tmp"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    (path := tmp_path / "x").mkdir()
    (path / "old").touch()
    with files.replace_folder(path) as new:
        (new / "new").touch()
        files.sweep(tmp_path)
    assert (os.listdir(path), os.listdir(tmp_path)) == (["new"], ["x"])
