"""A cache is whole or not there, and its name says what it was made of."""

import errno
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_randygpt.data import DataError, cache
from mlx_randygpt.data.corpus import Loader
from mlx_randygpt.data.vocabulary import Vocabulary

BLOCKS = [np.arange(5, dtype=np.int32), np.arange(5, 12, dtype=np.int32)]


def write(path: Path, vocab_size: int = 100, starts: tuple[int, ...] = (0, 4)) -> None:
    cache.write(path, BLOCKS, vocab_size, lambda: (starts, {"characters": 12}))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_what_was_written_is_read(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    write(tmp_path / "new" / "a.tokens", vocab_size)
    mapped = cache.read(tmp_path / "new" / "a.tokens")
    assert mapped is not None
    assert (np.asarray(mapped.tokens).tolist(), mapped.starts.tolist()) == ([*range(12)], [0, 4])
    assert (mapped.tokens.dtype, mapped.facts["characters"]) == (dtype, 12)
    assert os.listdir(tmp_path / "new") == ["a.tokens"]


def test_a_file_that_is_cut_off_at_any_byte_is_not_read(tmp_path: Path) -> None:
    write(path := tmp_path / "a.tokens")
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        assert cache.read(path) is None
    path.write_bytes(whole + b"x")
    assert cache.read(path) is None
    assert cache.read(tmp_path / "none") is None


def test_a_changed_byte_of_the_end_is_seen(tmp_path: Path) -> None:
    write(path := tmp_path / "a.tokens")
    whole = path.read_bytes()
    for at in range(whole.index(b"{"), len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert cache.read(path) is None


@pytest.mark.parametrize("block", [5, 16, 1 << 24])
def test_a_changed_bit_anywhere_is_seen(
    tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "DIGEST_BLOCK", block)
    write(path := tmp_path / "a.tokens")
    whole = path.read_bytes()
    assert cache.read(path) is not None
    for at in range(whole.index(b"{")):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert cache.read(path) is None


def test_a_cache_that_is_damaged_is_made_again(tmp_path: Path, text: str) -> None:
    (file := tmp_path / "a.txt").write_text(text)
    loader = Loader(folder=tmp_path / "cache", small=0)
    _, first = loader.load([file], Vocabulary())
    expected = np.asarray(first.tokens).tolist()
    path = next((tmp_path / "cache").glob("*.tokens"))
    content = bytearray(path.read_bytes())
    content[len(expected)] ^= 1
    path.write_bytes(content)
    _, again = loader.load([file], Vocabulary())
    assert np.asarray(again.tokens).tolist() == expected


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES, errno.EIO])
def test_what_cannot_be_read_is_not_damaged(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path := tmp_path / "a.tokens")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DataError, match=os.strerror(code)):
        cache.read(path)


def test_only_this_user_reads_the_cache(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        write(tmp_path / "new" / "a.tokens")
        cache.write_small(tmp_path / "new" / "b.json", b"{}")
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"new": 0o700, "a.tokens": 0o600, "b.json": 0o600}


TWIN = """
import os, sys
from pathlib import Path
import numpy as np
from mlx_randygpt.data import cache
os.getpid = lambda: 7  # as in two containers
path = Path(sys.argv[1])
expected = np.arange(40_000) % 251
wrong = 0
for _ in range(50):
    blocks = (expected[i : i + 1000] for i in range(0, 40_000, 1000))
    cache.write(path, blocks, 300, lambda: ((0,), {}))
    mapped = cache.read(path)
    wrong += mapped is None or not np.array_equal(mapped.tokens, expected)
print(wrong, os.getpid())
"""


def test_two_processes_of_one_number_share_a_cache(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TWIN, str(tmp_path / "cache" / "a.tokens")]
    twins = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [twin.communicate(timeout=60)[0] for twin in twins] == ["0 7\n"] * 2
    assert os.listdir(tmp_path / "cache") == ["a.tokens"]


def test_where_the_blocks_fail_nothing_is_left(tmp_path: Path) -> None:
    def broken() -> Iterator[Any]:
        yield BLOCKS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.write(tmp_path / "a.tokens", broken(), 9, lambda: ((), {}))
    assert os.listdir(tmp_path) == []


def test_a_disk_that_refuses_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device; set MLXGPT_CACHE to a folder"):
        write(tmp_path / "a.tokens")
    assert os.listdir(tmp_path) == []


def test_what_the_dead_left_is_swept_and_what_the_living_write_is_not(tmp_path: Path) -> None:
    (tmp_path / ".b.tokens.1.tmp").write_bytes(b"half")
    seen: list[str] = []

    def blocks() -> Iterator[Any]:
        write(tmp_path / "c.tokens")  # another process, so to speak
        seen.extend(os.listdir(tmp_path))
        yield BLOCKS[0]

    cache.write(tmp_path / "a.tokens", blocks(), 9, lambda: ((), {}))
    temporary, other = sorted(seen)
    assert re.fullmatch(rf"\.a\.tokens\.{os.getpid()}\.[0-9a-f]{{8}}\.tmp", temporary)
    assert other == "c.tokens"
    assert sorted(os.listdir(tmp_path)) == ["a.tokens", "c.tokens"]


def test_what_no_run_has_read_for_long_goes(tmp_path: Path) -> None:
    old, read = tmp_path / f"{'a' * 32}.tokens", tmp_path / f"{'b' * 32}.tokens"
    for path in (old, read, foreign := tmp_path / "c.tokens"):
        write(path)
    for path in (old, read, foreign):
        os.utime(path, (0, 0))
    assert cache.read(read) is not None
    write(new := tmp_path / "new.tokens")
    assert sorted(tmp_path.iterdir()) == sorted([read, foreign, new])


def test_the_name_depends_on_every_part() -> None:
    names = {cache.key("a", {"x": 1}), cache.key("a", {"x": 2}), cache.key("b", {"x": 1})}
    assert len(names) == 3
    assert cache.key("a", {"x": 1, "y": 2}) == cache.key("a", {"y": 2, "x": 1})


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"MLXGPT_CACHE": "/fast"}, "/fast"),
        ({"XDG_CACHE_HOME": "/home/x"}, "/home/x/mlx-randygpt"),
        ({}, str(Path("~/.cache/mlx-randygpt").expanduser())),
    ],
)
def test_the_place_is_that_of_the_environment(environ: dict[str, str], folder: str) -> None:
    assert str(cache.default_folder(environ)) == folder


def test_without_a_home_the_place_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # KeyError: a user without a name
    assert cache.default_folder({}) == Path(".cache", "mlx-randygpt")


def test_a_refused_tokenizer_names_the_variable_too(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="set MLXGPT_CACHE to a folder"):
        cache.write_small(tmp_path / "file" / "a.tokenizer.json", b"{}")


PREPARE = """
import sys
from pathlib import Path
from mlx_randygpt.data.corpus import Loader
from mlx_randygpt.data.vocabulary import Vocabulary
text, folder = map(Path, sys.argv[1:])
print("begun", flush=True)
_, corpus = Loader(folder=folder, small=0).load([text], Vocabulary())
print(corpus.sha256, len(corpus.tokens), int(corpus.tokens.astype("u8").sum()), flush=True)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_leaves_a_whole_cache_or_none(
    tmp_path: Path, text: str
) -> None:
    """The kills are spread over the time that a whole run takes, measured first."""
    (file := tmp_path / "a.txt").write_text(text * 2000)
    command = [sys.executable, "-c", PREPARE, str(file), str(tmp_path / "cache")]

    def struck(after: float) -> str:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            try:
                process.wait(after)
            except subprocess.TimeoutExpired:
                process.kill()
            return process.stdout.read()

    began = time.monotonic()
    whole = struck(60)
    seconds = time.monotonic() - began
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    for i in range(12):
        assert struck(seconds * i / 14) in ("", whole)
        for path in (tmp_path / "cache").glob("*.tokens"):
            assert cache.read(path) is not None
            path.unlink()
    assert struck(60) == whole
    assert not list((tmp_path / "cache").glob(".*.tmp"))
    assert json.loads(next((tmp_path / "cache").glob("*.json")).read_text())["type"] == "char"
