"""`mlxgpt sample`: text from a checkpoint, streamed to stdout."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_randygpt.cli.options import (
    Command,
    backend_option,
    default_checkpoint,
    json_option,
    print_json,
)

if TYPE_CHECKING:
    from mlx_randygpt.sample import Generated, SampleConfig

MOST_STREAMS = 4096  # at once; more would only fill the memory


@click.command("sample", cls=Command)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="[default: the best of checkpoints/, else the newest]",
)
@click.option("--prompt", help="Text to continue.  [default: the prompt of the run]")
@click.option("--prompt-file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--max-tokens", default=200, show_default=True)
@click.option("--temperature", default=0.8, show_default=True, help="0 always takes the likeliest.")
@click.option("--top-p", default=0.9, show_default=True, help="Likeliest tokens up to this sum.")
@click.option("--top-k", default=0, show_default=True, help="The k likeliest; 0 is off.")
@click.option(
    "--min-p", default=0.0, show_default=True, help="At least this share of the likeliest."
)
@click.option("--repetition-penalty", default=1.0, show_default=True)
@click.option("--beams", default=1, show_default=True, help="Beam search where above 1.")
@click.option("--num-samples", default=1, show_default=True)
@click.option("--stop", multiple=True, help="Text to stop before; may be given several times.")
@click.option("--seed", default=1337, show_default=True)
@click.option("--no-echo", is_flag=True, help="Leave the prompt out.")
@backend_option
@json_option
def command(
    checkpoint: Path | None, prompt: str | None, prompt_file: Path | None, beams: int,
    num_samples: int, stop: tuple[str, ...], no_echo: bool, backend: str, json: bool,
    **filters: Any,
) -> None:  # fmt: skip
    """Let a trained model write. The same seed and settings give the same text."""
    from mlx_randygpt.backends import choose, make_backend
    from mlx_randygpt.checkpoint import load_checkpoint
    from mlx_randygpt.cli.job import describe_backend
    from mlx_randygpt.cli.text import unknown_line
    from mlx_randygpt.data.reading import read_text
    from mlx_randygpt.sample import SampleConfig, beam_search, generate
    from mlx_randygpt.tokenizer import tokenizer_from_json

    if prompt is not None and prompt_file is not None:
        raise click.UsageError("--prompt and --prompt-file exclude each other")
    for name, value in (("--beams", beams), ("--num-samples", num_samples)):
        if not 1 <= value <= MOST_STREAMS:
            fits = "too small; it must be at least 1"
            fits = fits if value < 1 else f"too large; it must be at most {MOST_STREAMS}"
            raise click.BadParameter(f"{value} is {fits}", param_hint=name)
    if beams > 1 and num_samples > 1:
        raise click.UsageError("--beams finds one text; it does not go with --num-samples")
    config = SampleConfig(stop=stop, **filters)
    saved = load_checkpoint(default_checkpoint(checkpoint), weights_only=True)
    tokenizer = tokenizer_from_json(saved.tokenizer)
    if prompt_file is not None:
        prompt = read_text(prompt_file)
    prompt = saved.train.prompt if prompt is None else prompt
    if line := unknown_line(tokenizer.unknown(prompt)):
        click.echo(line, err=True)
    ids = tokenizer.encode(prompt).tolist() or [tokenizer.bos]
    name, why = choose(backend)
    engine = make_backend(name, saved.model, replace(saved.train, threads=0), saved.state)
    click.echo(f"Backend: {describe_backend(engine, why)}", err=True)
    show = Printer("" if no_echo else prompt, config, quiet=json or num_samples > 1)
    started = time.perf_counter()
    if beams > 1:
        samples = [beam_search(engine, saved.model, tokenizer, ids, config, beams)]
        show(samples)
    else:
        samples = []
        for samples in generate(engine, saved.model, tokenizer, ids, config, num_samples):
            show(samples)
    seconds = time.perf_counter() - started
    if json:
        print_json(_report(samples, prompt, seconds))
    else:
        show.end(samples)


class Printer:
    """Writes the growth of one sample to stdout; several are written when they are done."""

    def __init__(self, prompt: str, config: SampleConfig, quiet: bool) -> None:
        self._prompt, self._stops, self._quiet = prompt, config.stop, quiet
        self._shown = 0
        if not quiet:
            self._write(prompt)

    def __call__(self, samples: list[Generated]) -> None:
        if self._quiet:
            return
        from mlx_randygpt.sample import unambiguous

        text, done = samples[0].text, samples[0].finish_reason
        ready = len(text) if done else unambiguous(text, self._stops)
        self._write(text[self._shown : ready])
        self._shown = max(self._shown, ready)

    def end(self, samples: list[Generated]) -> None:
        """The rest, and a line's end."""
        if not self._quiet:
            self._write((samples[0].text[self._shown :] if samples else "") + "\n")
            return
        for index, sample in enumerate(samples):
            self._write("---\n" * (index > 0) + self._prompt + sample.text + "\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _report(samples: list[Generated], prompt: str, seconds: float) -> dict[str, Any]:
    total = sum(len(sample.ids) for sample in samples)
    rows = [
        {
            "text": sample.text,
            "prompt": prompt,
            "tokens": len(sample.ids),
            "tokens_per_second": round(total / seconds, 1),
            "finish_reason": sample.finish_reason,
        }
        for sample in samples
    ]
    return rows[0] if len(rows) == 1 else {"samples": rows}
