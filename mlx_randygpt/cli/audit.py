"""Reporting what the audit of a text has found: as facts, as JSON, and as one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_randygpt.cli.output import echo
from mlx_randygpt.words import clean_text, format_bytes, format_duration, format_share

if TYPE_CHECKING:
    from mlx_randygpt.config import ModelConfig, TrainConfig
    from mlx_randygpt.data.audit import Audit
    from mlx_randygpt.data.corpus import Corpus
    from mlx_randygpt.data.reading import Reading

N_SCRIPTS = 5  # named
N_SUMMARY = 2  # of them in one line
MAX_START_BYTES = 1 << 21  # of a text that is checked whenever a run starts: a fraction of a second
NOTABLE = 0.01  # share from which a line reports repeated passages and leaks
BYTES_PER_TOKEN = 2.4  # of a byte-level BPE, to estimate the tokens of a text


@dataclass(frozen=True)
class Suitable:
    """The run that `mlxgpt train` would start on a text without options."""

    model: ModelConfig
    train: TrainConfig
    seconds: float | None  # None: not measured


def suitable_run(found: Audit, *, measure: bool) -> Suitable:
    """Return the default run for a text; `measure` its time by short steps on this machine."""
    from mlx_randygpt import settings
    from mlx_randygpt.backends import choose
    from mlx_randygpt.planning.plan import measure_rate, usual_threads

    is_char = found.choice.vocabulary.kind == "char"
    vocabulary = found.choice.vocabulary.size or min(512, found.choice.n_chars) + 3
    n_train = found.split.n_train  # characters, and the tokens around documents
    if not is_char:
        n_train = int(n_train * found.n_bytes / max(1, found.n_characters) / BYTES_PER_TOKEN)
    model, train = settings.resolve_new({}, vocabulary, n_train)
    if not measure:
        return Suitable(model, train, None)
    echo("Measuring short steps on this machine …", err=True)
    backend = choose("auto")[0]
    rate = measure_rate(model, train, backend, 1, usual_threads(backend))
    return Suitable(model, train, train.iters * rate.seconds(model.n_layer, train.batch_size))


def summary_line(found: Audit) -> str:
    """Return one line about the text of a run."""
    scripts = [f"{name} {format_share(share)}" for name, share in found.scripts.items()]
    scripts = [*found.scripts] if len(scripts) == 1 else scripts[:N_SUMMARY]
    copies = f"{format_share(found.copied)} of it in copies of documents"
    repeated = f"{format_share(found.repeated)} of the passages repeated"
    leaked = f"{format_share(found.leaked)} of the validation text also in the training text"
    parts = [
        f"Text: {format_bytes(found.n_bytes)}",
        *scripts,
        copies if found.n_copies else "no copies",
        repeated if found.repeated >= NOTABLE else "",
        leaked if found.n_leaks else "no leaks into the validation text",
        f"{_count(found.n_lines, 'line')} of boilerplate" if found.n_lines else "",
        f"{found.n_replacements:,} × �" if found.n_replacements else "",
    ]
    return f"{', '.join(filter(None, parts))} (mlxgpt data check)"


def check_start(corpus: Corpus, how: Reading) -> str:
    """Return the line about the text at the start of a run, or "" for token files.

    Of a long text it has only what is known from reading it, so that no start waits.
    """
    from pathlib import Path

    from mlx_randygpt.data.audit import audit
    from mlx_randygpt.data.reading import all_pieces

    files = [Path(name) for name in corpus.names]
    if not corpus.n_bytes:
        return ""
    if corpus.n_bytes > MAX_START_BYTES:
        size = f"Text: {format_bytes(corpus.n_bytes)}"
        return f"{size}, not searched for leaks into the validation text (mlxgpt data check)"
    return summary_line(audit(lambda: all_pieces(files, how), corpus.keeps_copies))


def audit_facts(
    found: Audit, names: Sequence[str], encoding: str, suits: Suitable
) -> Iterator[tuple[str, str]]:
    """Yield what an audit has found as names and values."""
    from mlx_randygpt import settings

    noun = "conversation" if found.n_conversations == found.n_documents else "document"
    documents = _count(found.n_documents, noun), _count(found.n_files, "file")
    amount = f"{format_bytes(found.n_bytes)}, {found.n_characters:,} characters"
    yield "Text", f"{amount}, {' in '.join(documents)}"
    broken = f", {found.n_replacements:,} × � of an earlier wrong reading"
    yield "Encoding", encoding + broken * bool(found.n_replacements)
    scripts = [f"{name} {format_share(share)}" for name, share in found.scripts.items()]
    scripts[N_SCRIPTS:] = [f"{len(scripts) - N_SCRIPTS} more"] * (len(scripts) > N_SCRIPTS)
    yield "Scripts", ", ".join(scripts) or "no letters"
    yield "Tokenizer", _tokenizer(found)
    copies = f"{_count(found.n_copies, 'document')} occurred before, {format_share(found.copied)}"
    yield "Copies", f"{copies} of the text" if found.n_copies else "no document occurs twice"
    for copy in found.copies:
        more = copy.times - len(copy.files)
        places = ", ".join(names[i] for i in copy.files) + f" and {more:,} more" * (more > 0)
        yield "", f"{copy.times:,} ×: {places}"
    estimated = " (estimated)" * (found.sampled_repeats > 1)
    others = " of other documents" * bool(found.n_copies)
    yield "Repeated", f"{format_share(found.repeated)} of the passages{others}{estimated}"
    kept = "; copies are kept on one side" * bool(found.split.n_copies)
    yield "Validation text", found.split.describe(names) + kept
    estimated = " (estimated)" * (found.sampled > 1)
    leaks = f"{format_share(found.leaked)} of it is in the training text{estimated}"
    yield "Leaks", f"{leaks}: {_count(found.n_leaks, 'passage')}" if found.n_leaks else "none"
    for leak in found.leaks:
        place = f"{names[leak.file]}, document {leak.document + 1:,}, from character {leak.start:,}"
        yield "", f"{leak.length:,} characters of {place}: {clean_text(leak.text)!r} …"
    yield "Boilerplate", _count(found.n_lines, "line") if found.n_lines else "none"
    for line, n in found.lines:
        yield "", f"{n:,} × {clean_text(line)!r}"
    time = f", about {format_duration(suits.seconds)} on this machine" if suits.seconds else ""
    advice = settings.text_advice(suits.model, found.n_bytes)
    run = f"preset {suits.train.preset}, {suits.train.iters:,} steps{time}"
    yield "Suits", f"{run}. {advice}".rstrip()


def audit_json(
    found: Audit, names: Sequence[str], encoding: str, suits: Suitable
) -> dict[str, Any]:
    """Return what an audit has found as JSON keys and values."""
    split, vocabulary = found.split, found.choice.vocabulary
    return {
        "files": found.n_files,
        "documents": found.n_documents,
        "conversations": found.n_conversations,
        "characters": found.n_characters,
        "bytes": found.n_bytes,
        "encoding": encoding,
        "replacement_characters": found.n_replacements,
        "scripts": found.scripts,
        "different_characters": found.choice.n_chars,
        "lost_by_char": found.choice.lost,
        "tokenizer": vocabulary.kind,
        "vocab_size": vocabulary.size or None,
        "copies": found.n_copies,
        "copied_share": found.copied,
        "copied_most": [
            {"times": copy.times, "files": [names[i] for i in copy.files]} for copy in found.copies
        ],
        "repeated_share": found.repeated,
        "repeated_sampled": found.sampled_repeats,
        "validation": split.describe(names),
        "validation_files": [name for name, n in zip(names, split.n_val, strict=True) if n],
        "copies_kept_on_one_side": bool(split.n_copies),
        "leaks": found.n_leaks,
        "leaked_share": found.leaked,
        "leaks_sampled": found.sampled,
        "leaked_longest": [
            leak._asdict() | {"file": names[leak.file], "document": leak.document + 1}
            for leak in found.leaks
        ],
        "boilerplate": found.n_lines,
        "boilerplate_most": [{"line": line, "times": n} for line, n in found.lines],
        "preset": suits.train.preset,
        "iters": suits.train.iters,
        "seconds": suits.seconds,
    }


def _tokenizer(found: Audit) -> str:
    choice, lost = found.choice, format_share(found.choice.lost)
    if choice.vocabulary.kind == "bpe":
        return f"bpe, {choice.vocabulary.size:,} tokens; characters would lose {lost} of the text"
    if choice.lost:
        return f"char, which loses {lost} of the text ({choice.n_chars:,} different characters)"
    return f"char, which loses none of {choice.n_chars:,} different characters"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"
