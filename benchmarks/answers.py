"""How many questions a model answers word for word as a file of conversations does.

    python benchmarks/answers.py --checkpoint checkpoints --data data/additions-held-out.jsonl

Greedy, each question alone. Prints one JSON object with the wrong answers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from mlx_randygpt import load
from mlx_randygpt.api import LoadedModel
from mlx_randygpt.data.reading import pieces
from mlx_randygpt.dialogue import Turn, render_prompt
from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.sampling.generate import generate

N_SHOWN = 10  # wrong answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backend", default="numpy")
    args = parser.parse_args()
    model = load(args.checkpoint, backend=args.backend)
    wrong, n = [], 0
    for turns, expected in answers(args.data):
        n += 1
        if (written := answer(model, turns)) != expected:
            wrong.append({"asked": turns[-1].text, "expected": expected, "written": written})
    row = {"asked": n, "right": n - len(wrong), "share": 1 - len(wrong) / max(1, n)}
    print(json.dumps(row | {"wrong": wrong[:N_SHOWN]}, indent=1))


def answers(file: Path) -> Iterator[tuple[list[Turn], str]]:
    """Yield each answer of a file with the turns ahead of it."""
    turns: list[Turn] = []
    for piece in pieces(file):
        turns = [] if piece.begins else turns
        if piece.role == "assistant":
            yield list(turns), piece.text
        turns.append(Turn(piece.role, piece.text))


def answer(model: LoadedModel, turns: list[Turn]) -> str:
    """Return what the model answers to these turns."""
    prompt = render_prompt(turns, model.tokenizer).tolist()
    config, text = SampleConfig(temperature=0, max_tokens=model.config.block_size), ""
    for [sample] in generate(model.backend, model.config, model.tokenizer, prompt, config):
        text = sample.text
    return text


if __name__ == "__main__":
    main()
