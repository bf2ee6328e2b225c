"""The example of dialogues: what is held out is stated, complete and not trained on."""

from __future__ import annotations

import json
import re
from pathlib import Path

from click.testing import CliRunner

from mlx_randygpt.cli import group
from mlx_randygpt.data.examples import NUMBERS, additions, is_held_out
from mlx_randygpt.data.rows import conversation


def test_every_pair_is_asked_once_and_answered_rightly() -> None:
    example, pairs = additions(), set()
    for rows, held_out in ((example.training, False), (example.held_out, True)):
        for row in rows:
            question, answer = conversation(row, "")
            a, b = map(int, re.findall("[0-9]+", question.text))
            assert answer.text == f"{a} + {b} is {a + b}."
            assert is_held_out(a, b) == is_held_out(b, a) == held_out
            pairs.add((a, b))
    assert pairs == {(a, b) for a in NUMBERS for b in NUMBERS}
    assert (len(example.training), len(example.held_out)) == (7444, 656)


def test_the_command_writes_both_files(tmp_path: Path) -> None:
    words = ["data", "example", "additions", "--out", str(tmp_path / "new")]
    result = CliRunner().invoke(group, words)
    assert result.exit_code == 0, result.output
    files = [tmp_path / "new" / f"additions{end}.jsonl" for end in ("", "-held-out")]
    made = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert made == list(additions())
    assert f"mlxgpt train --data {files[0]}" in result.stdout
