"""Decoding: tokens become pieces of text again, a document at a time, in bounded memory.

Each turn of a conversation is a document of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from mlx_randygpt.data.corpus import Array
from mlx_randygpt.data.reading import Piece
from mlx_randygpt.data.token_file import TokenFile
from mlx_randygpt.dialogue import ROLE_TOKENS
from mlx_randygpt.state import plain_ids
from mlx_randygpt.tokenizers import NO_TOKEN, Tokenizer

CHUNK_TOKENS = 1 << 16  # decoded at a time
CONTEXT = 4  # tokens: a character has at most so many, one per byte
HALF = "\ufffd"  # at the end of a text: perhaps half a character


def decoded(
    tokens: Array | TokenFile, tokenizer: Tokenizer, size: int = CHUNK_TOKENS
) -> Iterator[Piece]:
    """Yield the text of (n,) tokens in pieces of about `size` tokens, none for an empty document.

    The pieces of a document add up to its decoded text. `ends` is set at its end, and where the
    tokens end.
    """
    begin_of = [tokenizer.special(name) for name in ROLE_TOKENS.values()]
    if tokenizer.eos != NO_TOKEN:  # otherwise BOS is an ordinary token
        begin_of.append(tokenizer.bos)
    begins, position = True, 0
    while position < len(tokens):
        stop = _next_cut(tokens, tokenizer, position, size)
        chunk = plain_ids(np.asarray(tokens[position:stop]))
        marks = np.flatnonzero(np.isin(chunk, begin_of))
        for start, end in pairwise([0, *marks.tolist(), len(chunk)]):
            begins = begins or start in marks
            n_before = 0 if begins else min(CONTEXT, position)
            before = plain_ids(np.asarray(tokens[position + start - n_before : position + start]))
            text = tokenizer.decode(np.concatenate([before, chunk[start:end]]))
            text = text[len(tokenizer.decode(before)) :] if n_before else text
            ends = end < len(chunk) or stop == len(tokens)
            if text:
                yield Piece(text, begins, ends)
                begins = False
        position = stop


def _next_cut(tokens: Array | TokenFile, tokenizer: Tokenizer, start: int, size: int) -> int:
    """Return where a piece from `start` ends: after about `size` tokens, not inside a character."""
    least = min(start + size, len(tokens))
    for stop in range(least, min(least + CONTEXT, len(tokens))):
        last = plain_ids(np.asarray(tokens[max(start, stop - CONTEXT) : stop]))
        if not tokenizer.decode(last).endswith(HALF):
            return stop
    return min(least + CONTEXT, len(tokens)) if least < len(tokens) else least
