"""Files are replaced as a whole, privately if asked, and what dead writers left is removed."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_randygpt import files


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


ASKED = (files.exists, files.is_file, files.is_folder)
UNKNOWN = ("EACCES", "EIO", "ESTALE", "EMFILE", "ELOOP", "ENAMETOOLONG", "EPERM", "ENOMEM")


def test_what_lies_at_a_path_is_a_file_a_folder_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dead").symlink_to("gone")
    (tmp_path / "link").symlink_to("file")
    names = ("file", "link", "pipe", "", "gone", "file/below", "dead", "\0")
    answers = [[asks(tmp_path / name) for asks in ASKED] for name in names]
    there = [[True, True, False], [True, True, False], [True, False, False], [True, False, True]]
    assert answers == there + [[False] * 3] * 4


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("asks", ASKED)
def test_what_cannot_be_known_is_an_error(
    asks: Callable[[Path], bool], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)), str(path))

    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(OSError, match=os.strerror(getattr(errno, name))) as caught:
        asks(Path("a"))
    assert caught.value.filename == "a"


def test_a_walk_reports_what_it_cannot_read_and_reads_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/x", "b/y", "z"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to("loop")
    scandir, errors = os.scandir, list[OSError]()

    def fail(path: Path) -> Any:
        if path.name == "a":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    found = sorted(files.walk(tmp_path, lambda entry: True, errors.append))
    assert found == [tmp_path / "b/y", tmp_path / "z"]
    assert {(e.filename, e.errno) for e in errors} == {
        (str(tmp_path / "a"), errno.EMFILE),
        (str(tmp_path / "loop"), errno.ELOOP),
    }


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
