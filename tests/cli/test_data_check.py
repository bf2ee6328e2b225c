"""`mlxgpt data check` reports copies, leaks and the validation text, and modifies nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mlx_randygpt.cli import group


def call(*words: str, **env: str) -> Result:
    return CliRunner().invoke(group, ["data", "check", "--no-time", *words], env=env)


def noise(n: int, seed: int) -> str:
    return "".join(random.Random(seed).choices("abcdefghijklmnop qrstuvwxyz", k=n))


@pytest.fixture(autouse=True)
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: books with two copies, a leak of 200 characters, and a line."""
    monkeypatch.chdir(tmp_path)
    line = "\nAll rights reserved. Do not copy.\n"
    one, last = noise(4000, 1), noise(2000, 3)
    books = {
        "a": one,
        "b": noise(6000, 2) + line * 20 + "#" + last[1500:1700] + "#",
        "c": one,
        "d": last,
    }
    (tmp_path / "books").mkdir()
    for name, text in books.items():
        (tmp_path / "books" / f"{name}.txt").write_text(text)
    return tmp_path


def answer(*words: str) -> dict[str, Any]:
    result = call(*words, "--json")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    values = json.loads(result.stdout)
    assert isinstance(values, dict)
    return values


def test_what_was_planted_is_found() -> None:
    found = answer("books")
    assert (found["files"], found["documents"], found["copies"]) == (4, 4, 1)
    assert found["copied_most"] == [{"times": 2, "files": ["books/a.txt", "books/c.txt"]}]
    assert found["validation_files"] == ["books/d.txt"]
    assert found["copies_kept_on_one_side"] is False
    [leak] = found["leaked_longest"]
    assert (leak["file"], leak["start"], leak["length"]) == ("books/d.txt", 1500, 200)
    assert found["boilerplate_most"] == [{"line": "All rights reserved. Do not copy.", "times": 20}]
    assert (found["tokenizer"], found["lost_by_char"]) == ("char", 0)
    assert (found["preset"], found["seconds"]) == ("tiny", None)


def test_it_names_the_validation_text_that_train_and_info_name() -> None:
    words = "--data books --preset mini --iters 1 --backend numpy --plain --tokenizer char"
    trained = CliRunner().invoke(group, ["train", *words.split()])
    assert f"Validation text: {answer('books')['validation']}." in trained.stdout.splitlines()
    info = CliRunner().invoke(group, ["info"])
    assert answer("books")["validation"] in info.stdout


def test_nothing_is_modified(texts: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in texts.rglob("*")}
    call("books")
    assert {file: file.stat().st_mtime_ns for file in texts.rglob("*")} == before


@pytest.mark.parametrize("columns", ["60", "80", "140"])
def test_a_row_has_a_name_and_a_value(columns: str) -> None:
    lines = call("books", COLUMNS=columns).stdout.splitlines()
    rows = ["Text", "Encoding", "Scripts", "Tokenizer", "Copies", "Repeated", "Validation text"]
    assert [line[:15].rstrip() for line in lines if line[0] != " "] == [
        *rows,
        "Leaks",
        "Boilerplate",
        "Suits",
    ]


def test_a_file_that_cannot_be_read_is_the_error_of_train(texts: Path) -> None:
    (texts / "books" / "e.txt").write_bytes(b"\xff\xfe\0")
    result = call("books")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "books/e.txt is UTF-16, not UTF-8; give --encoding utf-16" in result.stderr


def test_token_files_are_refused(texts: Path) -> None:
    (texts / "train.bin").write_bytes(b"\1\0" * 100)
    result = call("train.bin")
    assert result.exit_code == 1
    assert result.stderr == "Error: train.bin holds token ids; data check reads texts\n"


def first_note() -> str:
    words = "--data books --preset mini --iters 1 --backend numpy --plain --overwrite"
    lines = CliRunner().invoke(group, ["train", *words.split()]).stdout.splitlines()
    return next(line for line in lines if line.startswith("Text: "))


def test_a_run_begins_with_what_a_check_finds() -> None:
    assert first_note() == (
        "Text: 16.9 kB, Latin, 24 % of it in copies of documents, 6 % of the passages repeated, "
        "12 % of the validation text also in the training text, 1 line of boilerplate "
        "(mlxgpt data check)"
    )


def test_a_long_text_is_not_searched_when_a_run_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_randygpt.cli.audit.MAX_START_BYTES", 1000)
    assert first_note() == (
        "Text: 16.9 kB, not searched for leaks into the validation text (mlxgpt data check)"
    )


def test_the_run_that_suits_is_that_of_train_with_many_short_documents(texts: Path) -> None:
    documents = noise(44_000, 9)
    rows = (json.dumps({"text": documents[i : i + 10]}) for i in range(0, 44_000, 10))
    (texts / "rows.jsonl").write_text("\n".join(rows))  # 39,600 characters, 47,520 tokens
    assert answer("rows.jsonl")["preset"] == "small"


def test_a_single_character_is_a_short_text(texts: Path) -> None:
    (texts / "one.txt").write_text("a")
    assert answer("one.txt")["preset"] == "tiny"


def test_lone_surrogates_are_reported_as_broken(texts: Path) -> None:
    (texts / "half.jsonl").write_text(json.dumps({"text": "half \ud83d of it " * 20}))
    found = answer("half.jsonl")
    assert (found["replacement_characters"], found["lost_by_char"]) == (20, 0)
    assert found["different_characters"] == 8
