"""Text comes from stdin or a pipe, which can be read only once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_randygpt.data.corpus import Loader
from mlx_randygpt.data.vocabulary import Vocabulary

TEXT = "to be or not to be, that is the question\n" * 100
M = f"{sys.executable} -m mlx_randygpt"
DATA_PREPARE = f"{M} data prepare --data -"
TRAIN = (
    f"{M} train --plain --backend=numpy --iters=2 --n-layer=1 --n-head=1 --n-embd=8 "
    "--block-size=8 --batch-size=2 --out out"
)


def shell(folder: Path, line: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a line of bash in a folder that has the text."""
    (folder / "text").write_text(TEXT)
    environ = os.environ | {
        "MLXGPT_CACHE": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    return subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        env=environ,
    )


@pytest.mark.parametrize(
    "data",
    [
        "--data - < text",
        "--data - < <(cat text)",
        "--data <(cat text)",
        "--data pipe",
        "--data -:0.3 < <(cat text)",
        "--data <(cat text):0.3",
    ],
)
def test_a_run_reads_a_pipe_and_is_resumed(tmp_path: Path, data: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    feed = "cat text > pipe & " if data.endswith("pipe") else ""
    done = shell(tmp_path, f"{feed}{TRAIN} {data}")
    assert done.returncode == 0, done.stderr
    assert f"{len(TEXT):,} characters" in done.stdout
    done = shell(tmp_path, f"{M} train --plain --backend=numpy --resume --out out --iters 4")
    assert (done.returncode, "has changed" in done.stdout) == (0, False), done.stderr
    (kept,) = (tmp_path / "cache").glob("*.txt")
    assert (kept.read_text(), kept.stat().st_mode & 0o777) == (TEXT, 0o600)


@pytest.mark.parametrize("prompt", ["--prompt-file - < text", "--prompt-file <(cat text)"])
def test_a_prompt_comes_from_a_pipe(tmp_path: Path, prompt: str) -> None:
    assert shell(tmp_path, f"{TRAIN} --data text").returncode == 0
    done = shell(tmp_path, f"{M} sample --checkpoint out --backend numpy --max-tokens 2 {prompt}")
    assert (done.returncode, done.stdout.startswith(TEXT)) == (0, True), done.stderr


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\xff", b"a\0b" * 100])
def test_a_pipe_without_text_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bytes").write_bytes(content)
    done = shell(tmp_path, f"{TRAIN} --data <(cat bytes)")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr


@pytest.mark.parametrize(
    ("n", "data"), [(1, "-"), (1, "<(cat text)"), (1, "pipe"), (1, "/dev/stdin"), (2, "pipe")]
)
def test_ranks_have_neither_stdin_nor_pipes(tmp_path: Path, n: int, data: str) -> None:
    if n > 1:
        pytest.importorskip("mlx.core")
    os.mkfifo(tmp_path / "pipe")
    feed = "cat text > pipe & feed=$!; " if data == "pipe" else ""
    line = f"{M} launch -n {n} -- {TRAIN.removeprefix(M)} --data {data}"
    done = shell(tmp_path, f"{feed}{line}; code=$?; [ -n '{feed}' ] && kill $feed; exit $code")
    assert (done.returncode, done.stderr.count("Error")) == (1, 1), done.stderr
    assert "Error: ranks cannot read stdin or a pipe, so --data " in done.stderr
    assert not (tmp_path / "cache").exists()


def test_a_rank_that_another_launcher_started_has_no_stdin(tmp_path: Path) -> None:
    done = shell(tmp_path, f"MLX_RANK=0 {DATA_PREPARE} < text")
    assert (done.returncode, done.stderr) == (
        1,
        "Error: ranks cannot read stdin or a pipe, so --data - is not possible; name a file\n",
    )


def test_a_tokenizer_and_a_config_can_come_from_a_pipe(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "c.toml").write_text('data = "text"\njson = true\n', "utf-8-sig")
    (tmp_path / "text").write_text(TEXT)
    learned, _ = Loader().load([tmp_path / "text"], Vocabulary("bpe", 270))
    (tmp_path / "t.json").write_text(json.dumps(learned.to_json()["tokenizer"]))
    prepare = f"{M} data prepare --config <(cat c.toml) --tokenizer <(cat t.json)"
    done = shell(tmp_path, prepare)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["vocab_size"] == learned.vocab_size
