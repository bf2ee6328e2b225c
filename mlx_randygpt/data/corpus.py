"""Corpora: files become one array of tokens, split into training and validation.

Short texts are held in memory, long ones in a cache on the disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import file_digest
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.data import DataError, cache, token_files
from mlx_randygpt.data.conversations import short_question
from mlx_randygpt.data.encoding import TextStats, blocks
from mlx_randygpt.data.files import find_files, is_packed, is_tokens, kind
from mlx_randygpt.data.reading import Piece, Reading, Seen, all_pieces, holds_conversations
from mlx_randygpt.data.split import (
    TRAIN_SHARE,
    Parts,
    Split,
    conversations_last,
    copies_together,
    parts_split,
    tail_split,
    train_tokens,
)
from mlx_randygpt.data.token_file import TokenFile
from mlx_randygpt.data.vocabulary import AUTO, Choice, Vocabulary, choose_tokenizer, learn
from mlx_randygpt.dialogue import has_dialogue
from mlx_randygpt.files import resolve
from mlx_randygpt.tokenizers import Tokenizer, tokenizer_from_json
from mlx_randygpt.tokenizers.subword import KINDS

PROMPT_TOKENS = 1 << 20  # tokens at the beginning of a text that decide the default prompt
MAX_IN_MEMORY_BYTES = 1 << 24  # bytes of files that are read into memory
Array = NDArray[Any]
FACTS = (  # fields of a corpus that one pass over the text finds
    "sha256",
    "characters",
    "n_bytes",
    "unknown",
    "n_conversations",
    "n_skipped",
    "first_skipped",
)
Progress = Callable[[str, int, int], None]  # activity, bytes so far, total bytes


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents as one array of tokens: BOS document EOS BOS document EOS and so on.

    Conversations stand between them as their rendered turns. `train` and `val` return the same
    array objects at every call, so a backend can hold them.
    """

    names: tuple[str, ...]  # of the files
    tokens: Array | TokenFile  # (n,) int32; in a file 16 or 32 bits
    starts: NDArray[np.int64]  # the first token of each document
    sha256: str  # of the documents in UTF-8, with a NUL between them; or of the token files
    characters: int = 0  # 0 for token files
    n_bytes: int = 0  # of the text in UTF-8
    split: Split | None = None  # None: at nine tenths
    keeps_copies: bool = True  # whether the rule of the split is that copies are on one side
    unknown: dict[str, int] = field(default_factory=dict)  # characters that were dropped
    choice: Choice | None = None  # why it has its tokenizer; None: that was given
    n_conversations: int = 0
    n_skipped: int = 0  # invalid rows that were left out
    first_skipped: str = ""  # what is wrong with the first of them

    @cached_property
    def train(self) -> Array | TokenFile:
        """Return the training tokens; a view."""
        return self.tokens[: self._n_train()]

    @cached_property
    def val(self) -> Array | TokenFile:
        """Return the tokens after `train`; a view."""
        return self.tokens[self._n_train() :]

    def provenance(self, reading: Reading, **more: Any) -> dict[str, Any]:
        """Return the `data` of a checkpoint: the source of the text, its options, and `more`."""
        return {
            "paths": [str(resolve(Path(name))) for name in self.names],
            "characters": self.characters,
            "sha256": self.sha256,
            **asdict(reading),
            "respect_documents": False,
            "pack": False,
            "keeps_copies": self.keeps_copies,
            "dialogue": self.n_conversations > 0,
            "validation": self.validation,
            **more,
        }

    @property
    def validation(self) -> str:
        """Return which files, or which part of a file, form the validation text."""
        split = self.split or tail_split([0], len(self.tokens))
        return split.describe(self.names if self.split else ["the text"])

    def _n_train(self) -> int:
        return self.split.n_train if self.split else train_tokens(len(self.tokens))


@dataclass(frozen=True)
class Loader:
    """How corpora are loaded: reading options, cache, threads and progress."""

    reading: Reading = field(default_factory=Reading)
    folder: Path = Path()  # of caches
    threads: int = 1
    progress: Progress = lambda activity, done, size: None
    small: int = MAX_IN_MEMORY_BYTES  # bytes up to which files are read into memory
    keeps_copies: bool = True  # on one side of the split; older runs did not

    def load(
        self, files: Sequence[Path], requested: Tokenizer | Vocabulary
    ) -> tuple[Tokenizer, Corpus]:
        """Return the corpus and its tokenizer, which is learned if `requested` is a Vocabulary.

        If there are conversations, the tokenizer gets the tokens of dialogues that it lacks.
        """
        if any(map(is_tokens, files)):
            files = token_files.sort_splits([*files])
            if other := [file for file in files if not is_tokens(file)]:
                ids = next(filter(is_tokens, files))
                raise DataError(
                    f"{other[0]} is text and {ids} is tokens; give only one of these kinds"
                )
            if isinstance(requested, Vocabulary):
                raise DataError(
                    f"{files[0]} holds token ids; give the tokenizer that made them: "
                    "--tokenizer tokenizer.json (GPT-2's for files of nanoGPT and llm.c)"
                )
        if self._is_small(files):
            tokenizer, choice = self._tokenizer(files, requested)
            stats = TextStats()
            tokens = np.concatenate([*self._blocks(files, tokenizer, stats)])
            starts, facts = self._finish(files, stats)
            if self.keeps_copies and facts["moves"] and (parts := _new_order(stats)):
                tokens = np.concatenate([*parts.blocks(tokens)])
                starts, facts = self._finish(files, stats, parts)
            corpus = self._corpus(files, tokens, np.asarray(starts, np.int64), facts)
            return tokenizer, replace(corpus, choice=choice)
        content = self._content(files)
        tokenizer, choice = self._cached_tokenizer(files, requested, content)
        cached = self._cached_tokens(files, tokenizer, content)
        corpus = self._corpus(files, cached.tokens, cached.starts, cached.facts)
        return tokenizer, replace(corpus, choice=choice)

    def _cached_tokens(
        self, files: Sequence[Path], tokenizer: Tokenizer, content: str
    ) -> cache.CachedTokens:
        """Return the tokens in a file of the cache, written if need be.

        They are in the order of the text or, in a second file, in that which keeps copies together.
        """
        parts = [content, tokenizer.to_json()]
        plain = self.folder / f"{cache.key(*parts)}.tokens"
        moved = self.folder / f"{cache.key(*parts, 'copies on one side')}.tokens"
        path, cached = plain, cache.read(plain)
        if cached is not None and self.keeps_copies and cached.facts["moves"]:
            path, cached = moved, cache.read(moved)
        if cached is not None:
            return cached
        stats, n, signed = TextStats(), tokenizer.vocab_size, has_dialogue(tokenizer)
        encoded = self._blocks(files, tokenizer, stats)
        cache.write(plain, encoded, n, lambda: self._finish(files, stats), signed=signed)
        path, cached = plain, cache.read(plain)
        moves = cached is not None and self.keeps_copies and cached.facts["moves"]
        if cached is not None and moves and (order := _new_order(stats)):
            again = order.blocks(cached.tokens)
            cache.write(moved, again, n, lambda: self._finish(files, stats, order), signed=signed)
            path, cached = moved, cache.read(moved)
        if cached is None:
            raise DataError(f"{path} was damaged or removed as soon as it was written; start again")
        return cached

    def holds_conversations(self, files: Sequence[Path]) -> bool:
        """Return whether any of the files is read as conversations."""
        return any(holds_conversations(file, self.reading) for file in files if not is_tokens(file))

    def learn(
        self, files: Sequence[Path], requested: Vocabulary
    ) -> tuple[Tokenizer, Choice | None]:
        """Learn the tokenizer from the text of the files; the text decides if that is requested."""
        size = self._size(files) if requested.kind == "char" else self._text_bytes(files)
        n_counted = 0 if requested.kind in KINDS else 1  # passes that count characters

        def texts() -> Iterator[str]:
            nonlocal n_counted
            n_counted -= 1
            for piece in self._pieces(files, "Learning the vocabulary"):
                yield piece.text
            if n_counted < 0:
                self.progress("Merging pairs into tokens", 0, size)

        try:
            tokenizer, choice = learn(requested, texts, size)
            return self._fitting(files, tokenizer), choice
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            raise DataError(str(error)) from error

    def _tokenizer(
        self, files: Sequence[Path], requested: Tokenizer | Vocabulary
    ) -> tuple[Tokenizer, Choice | None]:
        if isinstance(requested, Vocabulary):
            return self.learn(files, requested)
        return self._fitting(files, requested), None

    def _fitting(self, files: Sequence[Path], tokenizer: Tokenizer) -> Tokenizer:
        """Return the tokenizer with the tokens of dialogues if there are conversations."""
        return tokenizer.with_dialogue() if self.holds_conversations(files) else tokenizer

    def _cached_tokenizer(
        self, files: Sequence[Path], requested: Tokenizer | Vocabulary, content: str
    ) -> tuple[Tokenizer, Choice | None]:
        """Return the tokenizer; one learned from a long text is cached beside its tokens."""
        if not isinstance(requested, Vocabulary):
            return self._fitting(files, requested), None
        path = self.folder / f"{cache.key(content, requested.key)}.tokenizer.json"
        try:
            saved = json.loads(cache.read_small(path))
            tokenizer = tokenizer_from_json(saved)
            choice = Choice(**saved["choice"]) if requested.kind == AUTO else None
            cache.mark_used(path)
        except (ValueError, KeyError, TypeError):  # missing or damaged
            tokenizer, choice = self.learn(files, requested)
            reason = {"choice": asdict(choice)} if choice else {}
            cache.write_small(path, json.dumps(tokenizer.to_json() | reason).encode())
        return tokenizer, choice

    def _blocks(
        self, files: Sequence[Path], tokenizer: Tokenizer, stats: TextStats
    ) -> Iterator[NDArray[np.int32]]:
        if is_tokens(files[0]):
            seen = self._seen("Reading tokens", self._size(files))
            return token_files.token_blocks([*files], tokenizer, stats, seen)
        return blocks(self._pieces(files, "Making tokens", stats), tokenizer, stats, self.threads)

    def _pieces(
        self, files: Sequence[Path], activity: str, stats: TextStats | None = None
    ) -> Iterator[Piece]:
        seen, n_files = self._seen(activity, self._size(files)), 0
        skipped = (stats or TextStats()).skip
        for i, piece in all_pieces(files, self.reading, seen, skipped):
            if stats is not None and i == n_files:
                n_files += 1
                stats.begin_file()
            yield piece

    def _seen(self, activity: str, size: int) -> Seen:
        done = 0

        def seen(n: int) -> None:
            nonlocal done
            done += n
            self.progress(activity, done, size)

        return seen

    def _is_small(self, files: Sequence[Path]) -> bool:
        """Return whether the text fits into memory; packed files are read to know."""
        if self._size(files) > self.small:
            return False
        return self._text_bytes(files, self.small) <= self.small

    def _text_bytes(self, files: Sequence[Path], enough: float = float("inf")) -> int:
        """Return about how many bytes the text of files has; stop counting beyond `enough`.

        The sizes of packed files say little about it, so these are read.
        """
        packed = [file for file in files if is_packed(file)]
        n_bytes = self._size([file for file in files if not is_packed(file)])
        for piece in self._pieces(packed, "Measuring the text"):
            n_bytes += len(piece.text.encode("utf-8", "surrogatepass"))
            if n_bytes > enough:
                break
        return n_bytes

    def _size(self, files: Sequence[Path]) -> int:
        try:
            return sum(file.stat().st_size for file in files)
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error

    def _content(self, files: Sequence[Path]) -> str:
        """Hash the contents of the files and the reading options, but not the file names."""
        seen, parts = self._seen("Looking for changes", self._size(files)), []
        for file in files:
            try:
                with open(file, "rb") as stream:
                    digest = file_digest(stream, "sha256").hexdigest()
            except OSError as error:
                raise DataError(f"{file} cannot be read: {error.strerror}") from error
            parts.append([kind(file), digest])
            seen(file.stat().st_size)
        return cache.key(parts, self.reading.key)

    def _finish(
        self, files: Sequence[Path], stats: TextStats, parts: Parts | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Return where documents begin and the facts about the text, in the order of `parts`."""
        starts = np.asarray(stats.starts, np.int64)
        file_starts = starts[np.asarray(stats.files, np.int64)].tolist()
        order = parts or _new_order(stats)
        if any(stats.talks) and order is not None and not order.moves:
            parts = order
        moves = order is not None and parts is None
        if parts is not None:
            starts, split = parts.new_starts, parts_split(parts, file_starts, stats.n_tokens)
        else:
            n_train = token_files.n_train([*files]) if is_tokens(files[0]) else None
            split = tail_split(file_starts, stats.n_tokens, n_train)
        return starts, _facts(stats) | {"split": asdict(split), "moves": moves}

    def _corpus(
        self,
        files: Sequence[Path],
        tokens: Array | TokenFile,
        starts: Array,
        facts: dict[str, Any],
    ) -> Corpus:
        return Corpus(
            names=tuple(map(str, files)),
            tokens=tokens,
            starts=starts,
            split=Split.from_json(facts["split"]),
            keeps_copies=self.keeps_copies,
            **{name: facts[name] for name in FACTS},
        )


def load_corpus(
    *paths: str | Path,
    text: str | None = None,
    tokenizer: str | Tokenizer = AUTO,
    vocab_size: int = 0,
    reading: Reading | None = None,
) -> tuple[Tokenizer, Corpus]:
    """Return the tokenizer and the corpus of files, folders and globs, or of a `text`.

    `tokenizer` is a kind to learn ("char", "bpe", "wordpiece"; "auto": characters if they cover
    the text, else bpe), the path of a tokenizer.json, or a tokenizer; `vocab_size` limits a learned
    one. The `choice` of the corpus is why it has this tokenizer. Long texts are cached on the disk.
    """
    if bool(paths) == (text is not None):
        raise DataError("load_corpus takes either paths or text=, and exactly one of the two")
    requested = choose_tokenizer(tokenizer, vocab_size) if isinstance(tokenizer, str) else tokenizer
    loader = Loader(reading or Reading(), cache.default_folder(), os.cpu_count() or 1)
    if text is None:
        return loader.load(find_files([str(path) for path in paths]), requested)
    choice = None
    if isinstance(requested, Vocabulary):
        n_bytes = len(text.encode("utf-8", "surrogatepass"))
        requested, choice = learn(requested, lambda: [text], n_bytes)
    return requested, replace(encode_corpus({"text": text}, requested), choice=choice)


def encode_corpus(texts: Mapping[str, str], tokenizer: Tokenizer) -> Corpus:
    """Return the corpus of `texts`, name to text; each text is one document."""
    stats = TextStats()
    documents = (Piece(text, True, True) for text in texts.values())
    tokens = np.concatenate([*blocks(documents, tokenizer, stats)])
    return Corpus(tuple(texts), tokens, np.array(stats.starts), **_facts(stats))


def default_prompt(corpus: Corpus, tokenizer: Tokenizer) -> str:
    """Return a prompt for the samples: "ROMEO:", a newline, or the first character of the text.

    It is the first of these that occurs near the beginning of the text. If there are conversations,
    it is a question of those for validation.
    """
    if corpus.n_conversations:
        n_train = len(corpus.train)
        starts = corpus.starts[corpus.starts >= n_train] - n_train
        return short_question(corpus.val, starts, tokenizer)
    text = tokenizer.decode(np.asarray(corpus.tokens[:PROMPT_TOKENS]))
    return "ROMEO:" if "ROMEO:" in text else "\n" if "\n" in text else text[:1] or "\n"


def check_length(corpus: Corpus, block_size: int) -> None:
    """Raise DataError unless training and validation each hold a block and the token after it.

    Of conversations, which are filled up to a block, each needs one.
    """
    if corpus.n_conversations:
        if not len(corpus.val):
            raise DataError(
                "the text has 1 conversation, or copies of one; give at least 2 different ones, "
                "since validation needs one of its own"
            )
        return
    n, longest = len(corpus.tokens), min(len(corpus.train), len(corpus.val)) - 1
    if longest >= block_size:
        return
    least = max(n, int(block_size / (1 - TRAIN_SHARE)) - 1)
    n_needed = next(
        m for m in count(least) if min(train_tokens(m), m - train_tokens(m)) > block_size
    )
    smaller = f" or a --block-size of at most {longest}" if longest > 0 else ""
    amount = f"{corpus.characters} characters ({n} tokens)" if corpus.characters else f"{n} tokens"
    raise DataError(
        f"the text has {amount}; a context of {block_size} needs"
        f" at least {n_needed} tokens (train and validation each one block and one token);"
        f" give more text{smaller}"
    )


def _facts(stats: TextStats) -> dict[str, Any]:
    """Return the values of FACTS."""
    return {
        "sha256": stats.digest.hexdigest(),
        "characters": stats.characters,
        "n_bytes": stats.n_bytes,
        "unknown": dict(stats.unknown),
        "n_conversations": sum(stats.talks),
        "n_skipped": stats.n_skipped,
        "first_skipped": stats.first_skipped,
    }


def _new_order(stats: TextStats) -> Parts | None:
    """Return the order that the split needs, None if it is that of the text."""
    digests, starts = np.asarray(stats.documents, np.uint64), np.asarray(stats.starts, np.int64)
    if any(stats.talks):
        talks = np.asarray(stats.talks, np.bool_)
        return conversations_last(digests, starts, talks, stats.n_tokens)
    if len(stats.documents) < 2:  # also token files, of which no texts are known
        return None
    return copies_together(digests, starts, stats.n_tokens)
