"""`mlxgpt sample`: generate text, streamed to stdout."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.loading import Loaded, load, parse_biases
from mlx_randygpt.cli.options import (
    backend_option,
    check_options,
    checkpoint_option,
    json_option,
    quantize_option,
    require_check,
    sampling_options,
)
from mlx_randygpt.cli.output import echo, print_json, show
from mlx_randygpt.cli.values import ExistingFile, Number
from mlx_randygpt.palette import PROBABILITIES
from mlx_randygpt.words import clean_text

if TYPE_CHECKING:
    from mlx_randygpt.sampling.filters import SampleConfig
    from mlx_randygpt.sampling.generate import Generated
    from mlx_randygpt.tokenizers import Tokenizer


MAX_STREAMS = 4096  # at once; more would exhaust the memory
N_ALTERNATIVES = 5  # to show for each token


@click.command("sample", cls=Command)
@checkpoint_option
@click.option("--prompt", help="Continue this text.  [default: the prompt of the run]")
@click.option(
    "--prompt-file",
    type=ExistingFile(allow_dash=True),
    help="Read the prompt from a file; - is stdin.",
)
@sampling_options
@click.option(
    "--beams",
    default=1,
    show_default=True,
    help="Search the likeliest text with this many beams; 1 samples.",
)
@click.option(
    "--length-penalty",
    type=Number(-10, 10),
    default=1.0,
    show_default=True,
    help="Favour long texts in the beam search (above 1).",
)
@click.option("--num-samples", default=1, show_default=True, help="Generate this many texts.")
@click.option("--no-echo", is_flag=True, help="Leave the prompt out of the output.")
@click.option(
    "--show-probs", is_flag=True, help="Colour tokens by their probability and list alternatives."
)
@check_options
@click.option("--interactive", is_flag=True, help="Chat, as `mlxgpt chat` does.")
@quantize_option
@backend_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    checkpoint: Path | None,
    prompt: str | None,
    prompt_file: Path | None,
    beams: int,
    length_penalty: float,
    num_samples: int,
    stop: tuple[str, ...],
    no_echo: bool,
    show_probs: bool,
    check: bool,
    data: tuple[str, ...],
    interactive: bool,
    logit_bias: tuple[str, ...],
    backend: str,
    quantize: int | None,
    json: bool,
    **filters: Any,
) -> None:
    """Generate text with a trained model. The same seed and settings give the same text."""
    from mlx_randygpt.cli.copies import copies_json, load_training_text, show_copies
    from mlx_randygpt.data.files import find_files
    from mlx_randygpt.data.reading import read_text
    from mlx_randygpt.sampling.filters import SampleConfig
    from mlx_randygpt.words import unify_newlines, unknown_line

    _check_usage(ctx.params)
    SampleConfig(stop=stop, **filters)  # check the values before loading anything
    loaded = load(checkpoint, backend, quantize, max(beams, num_samples))
    bias = parse_biases(logit_bias, loaded.tokenizer)
    config = SampleConfig(stop=stop, logit_bias=bias, **filters)
    if interactive:
        from mlx_randygpt.cli.commands.chat import converse

        converse(loaded, config)
        return
    original = load_training_text(loaded.saved, loaded.tokenizer, data) if check else None
    if prompt_file is not None:
        prompt = read_text(find_files([str(prompt_file)])[0])
    prompt = unify_newlines(loaded.saved.train.prompt if prompt is None else prompt)
    if line := unknown_line(loaded.tokenizer.unknown(prompt)):
        echo(line, err=True, wrapped=True)
    printer = Printer("" if no_echo else prompt, config, json or num_samples > 1 or show_probs)
    started, samples = time.perf_counter(), list["Generated"]()
    for samples in _generate(
        loaded,
        prompt,
        config,
        beams=(beams, length_penalty),
        n_samples=num_samples,
        n_likely=N_ALTERNATIVES if show_probs else None,
    ):
        printer.update(samples)
    seconds = time.perf_counter() - started
    texts = [sample.text for sample in samples]
    if json:
        rows = _report(samples, prompt, seconds, loaded)
        for row, found in zip(rows, original.find(texts) if original else [], strict=False):
            assert original
            row["copies"] = copies_json(row["text"], found, original.changed)
        print_json(rows[0] if len(rows) == 1 else {"samples": rows})
    elif show_probs:
        for sample in samples:
            show_choices("" if no_echo else prompt, sample, loaded.tokenizer)
    else:
        printer.end(samples)
    if original and not json:
        show_copies(texts, original.find(texts))


def _check_usage(given: dict[str, Any]) -> None:
    """Raise UsageError for values out of range and options that exclude each other."""
    if given["prompt"] is not None and given["prompt_file"] is not None:
        raise click.UsageError("--prompt cannot be combined with --prompt-file")
    for name in ("beams", "num_samples"):
        value, option = given[name], f"--{name.replace('_', '-')}"
        if not 1 <= value <= MAX_STREAMS:
            fits = "too small; it must be at least 1"
            fits = fits if value < 1 else f"too large; it must be at most {MAX_STREAMS}"
            raise click.BadParameter(f"{value} is {fits}", param_hint=option)
    if given["beams"] > 1:
        for name, option in (("num_samples", "--num-samples"), ("show_probs", "--show-probs")):
            if given[name] > 1 or given[name] is True:
                raise click.UsageError(f"--beams finds one text; it cannot use {option}")
    require_check(given["check"], given["data"])
    if given["interactive"]:
        is_set = {
            "--json": given["json"],
            "--beams": given["beams"] > 1,
            "--num-samples": given["num_samples"] > 1,
            "--show-probs": given["show_probs"],
            "--check": given["check"],
            "--prompt": given["prompt"] is not None,
            "--prompt-file": bool(given["prompt_file"]),
        }
        if excluded := [option for option, value in is_set.items() if value]:
            raise click.UsageError(f"--interactive is a conversation; it cannot use {excluded[0]}")


def _generate(
    loaded: Loaded,
    prompt: str,
    config: SampleConfig,
    *,
    beams: tuple[int, float],
    n_samples: int,
    n_likely: int | None,
) -> Iterator[list[Generated]]:
    """Yield the samples after each token; `beams` are their number and their length penalty."""
    from mlx_randygpt.sampling.beams import beam_search
    from mlx_randygpt.sampling.generate import generate

    tokenizer, model, backend = loaded.tokenizer, loaded.saved.model, loaded.backend
    ids = tokenizer.encode(prompt).tolist() or [tokenizer.bos]
    if beams[0] > 1:
        yield [beam_search(backend, model, tokenizer, ids, config, *beams)]
        return
    yield from generate(backend, model, tokenizer, ids, config, n_samples, n_likely=n_likely)


class Printer:
    """Writes one sample to stdout while it grows; several are written at the end."""

    def __init__(self, prompt: str, config: SampleConfig, quiet: bool) -> None:
        self._prompt, self._stops, self._quiet = prompt, config.stop, quiet
        self._shown = 0
        if not quiet:
            echo(prompt, nl=False)

    def update(self, samples: list[Generated]) -> None:
        """Write the text that can no longer turn into a stop text."""
        if self._quiet:
            return
        from mlx_randygpt.sampling.generate import shown_length

        text, done = samples[0].text, samples[0].finish_reason
        ready = len(text) if done else shown_length(text, self._stops)
        echo(text[self._shown : ready], nl=False)
        self._shown = max(self._shown, ready)

    def end(self, samples: list[Generated]) -> None:
        """Write the rest and a newline."""
        if not self._quiet:
            echo(samples[0].text[self._shown :] if samples else "")
            return
        for index, sample in enumerate(samples):
            echo("---\n" * (index > 0) + self._prompt + sample.text)


def _report(
    samples: list[Generated], prompt: str, seconds: float, loaded: Loaded
) -> list[dict[str, Any]]:
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
            from mlx_randygpt.tokenizers import token_speller

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
    return rows


VISIBLE = {"\n": "⏎\n", "\t": "⇥"}


def token_color(probability: float) -> str:
    """Return the style of a token that had this probability."""
    return next(_on(ground) for most, ground in PROBABILITIES if probability <= most + 1e-9)


def _on(ground: str) -> str:
    return f"black on {ground}"


def show_choices(prompt: str, sample: Generated, tokenizer: Tokenizer) -> None:
    """Print a line with alternatives per token, a legend, and last the text in their colours."""
    from rich.table import Table
    from rich.text import Text

    from mlx_randygpt.tokenizers import token_speller

    name = token_speller(tokenizer)
    text, legend = Text(clean_text(prompt, keep="\n")), Text()
    table = Table("token", "probability", "instead of", box=None, pad_edge=False)
    for choice in sample.choices:
        p = math.exp(choice.logprob)
        written = name(choice.token)
        text.append("".join(VISIBLE.get(c, clean_text(c)) for c in written), token_color(p))
        others = [(i, q) for i, q in choice.likeliest if i != choice.token]
        listed = "  ".join(f"{name(i)!r} {math.exp(q):.1%}" for i, q in others)
        table.add_row(Text(repr(written), token_color(p)), f"{p:.1%}", listed)
    for most, ground in PROBABILITIES:
        legend.append(f" to {most:.0%} ", _on(ground))
    for part in (table, Text(), legend, Text(), text):
        show(part)
