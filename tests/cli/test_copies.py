"""`sample --check` and the last lines of a run: what a model has copied from its text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mlx_randygpt.cli import group

LETTERS = random.Random(3)
TEXT = "".join(LETTERS.choices("abcdefgh \n", k=900))


def call(*words: str) -> Result:
    return CliRunner().invoke(group, words)


def answer(*words: str) -> dict[str, Any]:
    result = call("sample", "--backend", "numpy", "--check", "--json", *words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a short run, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text.txt"
    text.write_text(TEXT)
    words = ["--data", str(text), "--out", str(folder / "out"), "--preset", "mini", "--plain"]
    result = call("train", *words, "--iters", "3", "--backend", "numpy")
    assert result.exit_code == 0, result.output
    return folder, result.stdout


def model(run: tuple[Path, str]) -> tuple[str, str]:
    return "--checkpoint", str(run[0] / "out" / "checkpoint.safetensors")


def test_a_run_ends_with_what_its_last_sample_copied(run: tuple[Path, str]) -> None:
    *_, copied, advice = run[1].splitlines()
    assert copied.startswith("Copied by the sample: 0% in runs of 30 or more characters")
    assert advice.startswith("Let it write:")


def test_the_report_goes_to_stderr_and_leaves_the_text_alone(run: tuple[Path, str]) -> None:
    words = ("sample", *model(run), "--backend", "numpy", "--max-tokens", "20")
    plain, checked = call(*words), call(*words, "--check")
    assert checked.stdout == plain.stdout
    assert "Copied: 0% in runs of 30" in checked.stderr


def test_json_has_the_longest_run_of_every_sample(run: tuple[Path, str]) -> None:
    samples = answer(*model(run), "--num-samples", "3", "--max-tokens", "20")["samples"]
    train = TEXT[: int(0.9 * (len(TEXT) + 2))]
    for sample in samples:
        copies, text = sample["copies"], sample["text"]
        longest = copies["longest"]
        assert text[longest["start"] : longest["stop"]] == longest["text"]
        n = len(longest["text"])
        assert longest["text"] in train
        assert not any(text[i : i + n + 1] in train for i in range(len(text) - n))
        assert (copies["share"], copies["passages"], copies["text_changed"]) == (0, [], False)


def test_a_text_that_is_gone_or_has_changed_is_reported(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    words = ["--data", str(text), "--out", str(tmp_path), "--preset", "mini", "--plain"]
    assert call("train", *words, "--iters", "1", "--backend", "numpy").exit_code == 0
    words = ["sample", "--checkpoint", str(tmp_path), "--backend", "numpy", "--check"]
    other = tmp_path / "other.txt"
    other.write_bytes(TEXT.replace("\n", "\r\n").encode())
    text.write_text(TEXT[::-1])
    assert "The training text has changed" in call(*words).stderr
    assert "changed" not in call(*words, "--data", str(other)).stderr
    text.unlink()
    gone = call(*words)
    assert gone.exit_code == 1
    assert "Error: the training text cannot be read (no such file" in gone.stderr
    assert "give it with --data" in gone.stderr
    assert not gone.stdout
    assert call(*words, "--data", str(other)).exit_code == 0


def test_data_without_check_is_refused(run: tuple[Path, str]) -> None:
    result = call("sample", *model(run), "--data", "x.txt")
    assert result.exit_code == 2
    assert "add --check" in result.stderr


@pytest.mark.slow
def test_an_overtrained_model_shows_the_passages_that_it_copies(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path), "--plain"]
    sizes = ["--n-layer", "2", "--n-head", "4", "--n-embd", "64", "--block-size", "32"]
    result = call("train", *words, *sizes, "--iters", "600", "--backend", "numpy", "--dropout", "0")
    assert result.exit_code == 0, result.output
    model = ("--checkpoint", str(tmp_path / "checkpoint.safetensors"), "--temperature", "0")
    found = answer(*model, "--prompt", TEXT[100:132], "--max-tokens", "100")
    text, copies = found["text"], found["copies"]
    assert text[:60] == TEXT[132:192]
    assert copies["passages"][0]["start"] == 0
    for passage in copies["passages"]:
        start, stop = passage["start"], passage["stop"]
        assert text[start:stop] in TEXT
        assert stop == len(text) or text[start : stop + 1] not in TEXT
    listed = call("sample", *model, "--backend", "numpy", "--prompt", TEXT[100:132], "--check")
    assert "  [0:" in listed.stderr
