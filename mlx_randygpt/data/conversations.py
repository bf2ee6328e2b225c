"""Conversations among the tokens of a corpus: where their turns are, and how windows are cut.

A conversation begins with the token of a role, which is stored as its complement, as is every token
that only is read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.data import DataError
from mlx_randygpt.data.token_file import TokenFile
from mlx_randygpt.data.windows import Conversations
from mlx_randygpt.dialogue import ROLE_TOKENS, ROLES, has_dialogue
from mlx_randygpt.state import plain_ids
from mlx_randygpt.tokenizers import Tokenizer

BLOCK_TOKENS = 1 << 20  # read at a time
N_QUESTIONS = 20
USER, ASSISTANT = ROLES.index("user"), ROLES.index("assistant")
Array = NDArray[Any]
Numbers = NDArray[np.int64]


class Turns(NamedTuple):
    """The turns of all conversations, in order."""

    first: Numbers  # (N,) the token of the role
    ends: Numbers  # (N,) past the last token
    roles: Numbers  # (N,) indices of ROLES
    begin: NDArray[np.bool_]  # (N,) whether they are the first of their conversation

    def select(self, which: NDArray[np.bool_]) -> Turns:
        """Return the turns that the mask `which` (N,) selects."""
        return Turns(self.first[which], self.ends[which], self.roles[which], self.begin[which])


def find_turns(tokens: Array | TokenFile, starts: Numbers, tokenizer: Tokenizer) -> Turns:
    """Return the turns among tokens (n,) whose documents begin at `starts`."""
    marks = np.array([~tokenizer.special(name) for name in ROLE_TOKENS.values()])
    places, roles = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for start in range(0, len(tokens) * has_dialogue(tokenizer), BLOCK_TOKENS):
        block = np.asarray(tokens[start : start + BLOCK_TOKENS]).astype(np.int64)
        at = np.flatnonzero(np.isin(block, marks))
        places.append(at + start)
        roles.append(np.argmax(block[at, None] == marks, axis=1))
    first = np.concatenate(places)
    ends = np.minimum(np.append(first[1:], len(tokens)), _next(starts, first, len(tokens)))
    return Turns(first, ends, np.concatenate(roles), np.isin(first, starts))


def cut_windows(turns: Turns, block_size: int, *, pack: bool = False) -> Conversations:
    """Return windows of at most `block_size` + 1 tokens in which every answer is a target once.

    A window holds whole exchanges of one conversation, with `pack` also those of the next ones; an
    exchange that is longer than a window is cut wherever one ends. Windows without a target are
    left out; DataError if none remains.
    """
    before = np.append(ASSISTANT, turns.roles[:-1])[: len(turns.roles)]
    asks = turns.begin | ((turns.roles == USER) & (before == ASSISTANT))
    first, begins = turns.first[asks], turns.begin[asks]
    ends = np.append(turns.ends[:-1][asks[1:]], turns.ends[-1:])
    windows: list[list[int]] = []
    for start, end, begin in zip(first.tolist(), ends.tolist(), begins.tolist(), strict=True):
        joins = bool(windows) and windows[-1][1] == start and (pack or not begin)
        if joins and end - windows[-1][0] <= block_size + 1:
            windows[-1][1] = end
        else:
            windows.append([start, end])
    edges = np.array(windows, np.int64).reshape(-1, 2)
    n_parts = np.maximum(1, -(-(edges[:, 1] - edges[:, 0] - 1) // block_size))
    part = np.arange(n_parts.sum()) - np.repeat(np.cumsum(n_parts) - n_parts, n_parts)
    first = np.repeat(edges[:, 0], n_parts) + part * block_size
    ends = np.minimum(first + block_size + 1, np.repeat(edges[:, 1], n_parts))
    answers = turns.roles == ASSISTANT
    answer_first = np.append(turns.first[answers], np.iinfo(np.int64).max - 1)
    following = np.searchsorted(turns.ends[answers], first + 1, side="right")
    learns = answer_first[following] + 1 < ends
    if not learns.any():
        raise DataError("no conversation has an answer to learn")
    last = np.append(turns.begin[1:], True)[: len(turns.begin)]
    sizes = turns.ends[last] - turns.first[turns.begin]
    n_long = int((sizes > block_size + 1).sum())
    return Conversations(first[learns], ends[learns], len(sizes), n_long)


def short_question(tokens: Array | TokenFile, starts: Numbers, tokenizer: Tokenizer) -> str:
    """Return the shortest opening question of the conversations, which begin at `starts`."""
    turns = find_turns(tokens, starts, tokenizer)
    asks = np.flatnonzero(turns.roles == USER)[:N_QUESTIONS]
    places = zip(turns.first[asks] + 1, turns.ends[asks] - 1, strict=True)
    texts = [tokenizer.decode(plain_ids(np.asarray(tokens[a:b]))) for a, b in places]
    return min(texts, key=len, default="Hello")


def _next(starts: Numbers, places: Numbers, n: int) -> Numbers:
    """Return the next of `starts` after each place, or `n`."""
    return np.append(starts, n)[np.searchsorted(starts, places, side="right")]
