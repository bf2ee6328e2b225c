"""A folder gives its texts, not what this program wrote into it."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_randygpt.cli import group
from mlx_randygpt.data.files import find_files

SMALL = "--plain --backend=numpy --n-layer=1 --n-head=1 --n-embd=8 --block-size=8 --batch-size=2"


def done(words: str) -> str:
    result = CliRunner().invoke(group, words.split())
    assert result.exit_code == 0, result.output
    return str(result.stdout + result.stderr)


@pytest.fixture
def folder(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text(text)
    return tmp_path


def test_a_run_in_the_folder_of_its_text_can_be_resumed(folder: Path) -> None:
    done(f"train {SMALL} --iters=2 --sample-every=1 --data .")
    done("inspect -o page.html --max-tokens 50")
    done("plot checkpoints -o plot.html")
    for kind in ("hf", "safetensors"):
        done(f"export --format {kind} -o {kind}")
    said = done("train --plain --backend=numpy --iters=3 --resume --data .")
    assert "The text has changed" not in said
    assert "of . that mlxgpt wrote (" in said
    assert find_files(["**/*.html", "a.txt"]) == [Path("a.txt")]


def test_a_log_without_a_line_is_known_by_its_place(folder: Path) -> None:
    for name in ("metrics.jsonl", "run/metrics.jsonl", "run/checkpoint.safetensors"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    assert find_files(["."]) == [Path("a.txt"), Path("metrics.jsonl")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", '{"text": "rows of somebody else"}'),
        ("samples.jsonl", '{"text": "rows"}'),
        ("metrics.jsonl", "[1]"),
        ("README.md", "# mlxgpt\nA text about it"),
        ("mlx_model.py", "print()"),
        ("page.html", "<title>What others learned</title>"),
    ],
)
def test_a_text_with_such_a_name_is_a_text(folder: Path, name: str, content: str) -> None:
    Path(name).write_text(content)
    assert Path(name) in find_files(["."])


def test_a_file_that_is_named_is_read(folder: Path) -> None:
    Path("metrics.jsonl").write_text('{"step": 1, "loss": 2}')
    lines = list[str]()
    assert find_files(["metrics.jsonl"], lines.append) == [Path("metrics.jsonl")]
    assert not lines
    shutil.copy("metrics.jsonl", "samples.jsonl")
    assert find_files(["."], lines.append) == [Path("a.txt"), Path("samples.jsonl")]
    assert lines == [
        "Left out: 1 file of . that mlxgpt wrote (metrics.jsonl); name files to read them."
    ]
