"""What commands write replaces a file as a whole, and what dead processes left is swept up."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mlx_randygpt import files


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_refuses_leaves_the_older_file(
    tmp_path: Path, code: int, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path := tmp_path / "loss.svg").write_bytes(b"older")

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError, match=os.strerror(code)):
        files.write(path, b"newer")
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"older", ["loss.svg"])


@pytest.mark.parametrize(
    "left",
    [
        ".model.safetensors.123.tmp",
        ".model.safetensors.9.0a1b2c3d.tmp",
        ".model.safetensors.9.12345678.tmp",  # a random part without letters
    ],
)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_next_write_sweeps_what_a_dead_process_left(
    tmp_path: Path, left: str, kind: str
) -> None:
    if kind == "file":
        (tmp_path / left).write_bytes(b"half")
    else:
        (tmp_path / left).mkdir()
        (tmp_path / left / "part").write_bytes(b"half")
    files.write(tmp_path / "model.safetensors", b"whole")
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize(
    "module",
    ["analysis/charts", "cli/commands/inspect", "cli/commands/chat", "cli/commands/import_"],
)
def test_commands_write_through_one_place(module: str) -> None:
    source = (Path(files.__file__).parent / f"{module}.py").read_text()
    assert not any(call in source for call in (".write_text(", ".write_bytes(", '"w")', '"wb")'))
