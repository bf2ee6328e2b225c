"""`mlxgpt sample`: text from a checkpoint, streamed to stdout."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.loading import Loaded, biases, load
from mlx_randygpt.cli.options import (
    backend_option,
    checkpoint_option,
    json_option,
    quantize_option,
    sampling_options,
)
from mlx_randygpt.cli.output import print_json, show
from mlx_randygpt.tokenizers import token_speller

if TYPE_CHECKING:
    from mlx_randygpt.sampling.filters import SampleConfig
    from mlx_randygpt.sampling.generate import Generated
if TYPE_CHECKING:
    from mlx_randygpt.sampling.generate import Generated
    from mlx_randygpt.tokenizers import Tokenizer


MAX_STREAMS = 4096  # at once; more would only fill the memory
N_ALTERNATIVES = 5  # shown beside each token


@click.command("sample", cls=Command)
@checkpoint_option
@click.option("--prompt", help="Text to continue.  [default: the prompt of the run]")
@click.option("--prompt-file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@sampling_options
@click.option("--beams", default=1, show_default=True, help="Beam search where above 1.")
@click.option(
    "--length-penalty", default=1.0, show_default=True, help="Of beams: above 1 favours long texts."
)
@click.option("--num-samples", default=1, show_default=True)
@click.option("--no-echo", is_flag=True, help="Leave the prompt out.")
@click.option("--show-probs", is_flag=True, help="Tint each token; list what it might have been.")
@click.option("--interactive", is_flag=True, help="A conversation; the same as `mlxgpt chat`.")
@quantize_option
@backend_option
@json_option
@click.pass_context
def command(
    ctx: click.Context, /, checkpoint: Path | None, prompt: str | None, prompt_file: Path | None,
    beams: int, length_penalty: float, num_samples: int, stop: tuple[str, ...], no_echo: bool,
    show_probs: bool, interactive: bool, logit_bias: tuple[str, ...], backend: str,
    quantize: int | None, json: bool, **filters: Any,
) -> None:  # fmt: skip
    """Let a trained model write. The same seed and settings give the same text."""
    from mlx_randygpt.cli.training.text import unknown_line
    from mlx_randygpt.data.reading import read_text
    from mlx_randygpt.sampling.filters import SampleConfig

    _check_usage(ctx.params)
    SampleConfig(stop=stop, **filters)  # what is wrong is told before anything is loaded
    loaded = load(checkpoint, backend, quantize)
    bias = biases(logit_bias, loaded.tokenizer)
    config = SampleConfig(stop=stop, logit_bias=bias, **filters)
    if interactive:
        from mlx_randygpt.cli.commands.chat import converse

        converse(loaded, config)
        return
    if prompt_file is not None:
        prompt = read_text(prompt_file)
    prompt = loaded.saved.train.prompt if prompt is None else prompt
    if line := unknown_line(loaded.tokenizer.unknown(prompt)):
        click.echo(line, err=True)
    show = Printer("" if no_echo else prompt, config, json or num_samples > 1 or show_probs)
    started, samples = time.perf_counter(), list["Generated"]()
    n_likely = N_ALTERNATIVES if show_probs else None
    for samples in _grow(loaded, prompt, config, beams, length_penalty, num_samples, n_likely):
        show(samples)
    seconds = time.perf_counter() - started
    if json:
        print_json(_report(samples, prompt, seconds, loaded))
    elif show_probs:
        for sample in samples:
            show_choices("" if no_echo else prompt, sample, loaded.tokenizer)
    else:
        show.end(samples)


def _check_usage(given: dict[str, Any]) -> None:
    """Usage errors of options that exclude each other."""
    if given["prompt"] is not None and given["prompt_file"] is not None:
        raise click.UsageError("--prompt and --prompt-file exclude each other")
    for name in ("beams", "num_samples"):
        value, option = given[name], f"--{name.replace('_', '-')}"
        if not 1 <= value <= MAX_STREAMS:
            fits = "too small; it must be at least 1"
            fits = fits if value < 1 else f"too large; it must be at most {MAX_STREAMS}"
            raise click.BadParameter(f"{value} is {fits}", param_hint=option)
    if given["beams"] > 1:
        for name, what in (("num_samples", "--num-samples"), ("show_probs", "--show-probs")):
            if given[name] > 1 or given[name] is True:
                raise click.UsageError(f"--beams finds one text; it does not go with {what}")
    if given["interactive"]:
        alone = {
            "--json": given["json"], "--beams": given["beams"] > 1,
            "--num-samples": given["num_samples"] > 1, "--show-probs": given["show_probs"],
            "--prompt": given["prompt"] is not None, "--prompt-file": bool(given["prompt_file"]),
        }  # fmt: skip
        if wrong := [option for option, is_given in alone.items() if is_given]:
            raise click.UsageError(f"--interactive is a conversation; it takes no {wrong[0]}")


def _grow(
    loaded: Loaded, prompt: str, config: SampleConfig, beams: int, length_penalty: float,
    num_samples: int, n_likely: int | None,
) -> Iterator[list[Generated]]:  # fmt: skip
    """The samples after each token."""
    from mlx_randygpt.sampling.beams import beam_search
    from mlx_randygpt.sampling.generate import generate

    tokenizer, model, backend = loaded.tokenizer, loaded.saved.model, loaded.backend
    ids = tokenizer.encode(prompt).tolist() or [tokenizer.bos]
    if beams > 1:
        yield [beam_search(backend, model, tokenizer, ids, config, beams, length_penalty)]
        return
    yield from generate(backend, model, tokenizer, ids, config, num_samples, n_likely=n_likely)


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
        from mlx_randygpt.sampling.generate import shown_length

        text, done = samples[0].text, samples[0].finish_reason
        ready = len(text) if done else shown_length(text, self._stops)
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


def _report(
    samples: list[Generated], prompt: str, seconds: float, loaded: Loaded
) -> dict[str, Any]:

    total = sum(len(sample.ids) for sample in samples)
    rows = []
    for sample in samples:
        row: dict[str, Any] = {
            "text": sample.text,
            "prompt": prompt,
            "tokens": len(sample.ids),
            "tokens_per_second": round(total / seconds, 1),
            "finish_reason": sample.finish_reason,
        }
        if sample.choices:
            name = token_speller(loaded.tokenizer)
            row["choices"] = [
                {
                    "token": name(choice.token),
                    "logprob": choice.logprob,
                    "likeliest": [[name(i), logprob] for i, logprob in choice.likeliest],
                }
                for choice in sample.choices
            ]
        rows.append(row)
    return rows[0] if len(rows) == 1 else {"samples": rows}


# From surprising to expected: told apart without red and green, on a dark and a light ground.
SHADES = (
    (0.05, "black on #f4a582"), (0.2, "black on #fddbc7"), (0.5, "black on #f7f7f7"),
    (0.8, "black on #d1e5f0"), (1.0, "black on #92c5de"),
)  # fmt: skip
VISIBLE = {"\n": "⏎\n", "\t": "⇥"}


def shade(probability: float) -> str:
    """The style of a token that had this probability."""
    return next(style for most, style in SHADES if probability <= most + 1e-9)


def show_choices(prompt: str, sample: Generated, tokenizer: Tokenizer) -> None:
    """The text, each token on the shade of its probability, the legend, and a line per token."""
    from mlx_randygpt.screen.words import clean

    name = token_speller(tokenizer)
    text, legend = Text(clean(prompt, keep="\n")), Text()
    table = Table("token", "probability", "instead of", box=None, pad_edge=False)
    for choice in sample.choices:
        p = math.exp(choice.logprob)
        written = name(choice.token)
        text.append("".join(VISIBLE.get(c, clean(c)) for c in written), shade(p))
        others = [(i, q) for i, q in choice.likeliest if i != choice.token]
        listed = "  ".join(f"{name(i)!r} {math.exp(q):.1%}" for i, q in others)
        table.add_row(Text(repr(written), shade(p)), f"{p:.1%}", listed)
    for most, style in SHADES:
        legend.append(f" to {most:.0%} ", style)
    for part in (text, Text(), legend, Text(), table):
        show(part)
