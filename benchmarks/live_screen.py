"""The picture of the live screen in the README, from a real run.

    python benchmarks/live_screen.py --data data/shakespeare.txt [-o docs/live.svg]

Trains the small4 preset with batches of 12 and draws the screen as it stands at step `--at`.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme

from mlx_randygpt import settings
from mlx_randygpt.backends import choose, make_backend
from mlx_randygpt.cli.loading import describe_backend
from mlx_randygpt.cli.training.request import describe_model
from mlx_randygpt.data.corpus import encode_corpus
from mlx_randygpt.data.files import find_files
from mlx_randygpt.data.reading import read_text
from mlx_randygpt.model import initial_state
from mlx_randygpt.screen.dashboard import screen
from mlx_randygpt.screen.run_summary import RunInfo, RunSummary
from mlx_randygpt.tokenizers.chars import CharTokenizer
from mlx_randygpt.training.loop import Run, train

WIDTH, HEIGHT = 80, 26
THEME = TerminalTheme(
    (250, 250, 247), (40, 42, 46),
    [(40, 42, 46), (176, 48, 48), (46, 125, 70), (150, 110, 0), (40, 90, 170), (150, 60, 140),
     (0, 120, 140), (110, 112, 116)],
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--iters", type=int, default=900)
    parser.add_argument("--at", type=int, default=700)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/live.svg"))
    options = parser.parse_args()

    texts = {str(file): read_text(file) for file in find_files([options.data])}
    output = options.output.resolve()
    os.chdir(tempfile.mkdtemp())  # for ./checkpoints
    tokenizer = CharTokenizer.train(texts.values())
    corpus = encode_corpus(texts, tokenizer)
    given = {"preset": "small4", "batch_size": 12, "iters": options.iters, "prompt": "ROMEO:"}
    model, config = settings.resolve_new(given, tokenizer.vocab_size)
    name, why = choose("auto")
    backend = make_backend(name, model, config, initial_state(model, config.seed))
    out = "checkpoints"
    info = RunInfo(
        model=describe_model(model),
        data=f"{Path(options.data).name}: {corpus.characters:,} characters, "
        f"vocabulary {tokenizer.vocab_size}",
        backend=describe_backend(backend, why),
        recipe=config.recipe,
        saves=f"{out}/checkpoint.safetensors, every {config.save_every}",
        out=out,
        iters=options.iters,
        eval_every=config.eval_every,
        sample_every=config.sample_every,
    )
    tally = RunSummary(info, time.monotonic)
    for report in train(
        Run(model, config, tokenizer, corpus.train, corpus.val, {}), backend, Path(out)
    ):
        tally.add(report)
        if tally.step >= options.at:
            break
    draw(tally, output)


def draw(tally: RunSummary, path: Path) -> None:
    console = Console(
        record=True, file=io.StringIO(), width=WIDTH, height=HEIGHT, force_terminal=True,
        color_system="standard",
    )  # fmt: skip
    for line in screen(tally, console, WIDTH, HEIGHT):
        console.print(line)
    svg = console.export_svg(title="mlxgpt train", theme=THEME)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # nothing from elsewhere
    path.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
