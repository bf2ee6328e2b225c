"""The one renderer of dialogues: turns become token ids, and which of these are learned.

A turn is the token of its role, its text and `<|end|>`; a dialogue is its turns, one after the
other, and nothing else. Training, `chat`, `serve` and the exported template use this format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.tokenizers import DIALOGUE_TOKENS, END_OF_TURN, NO_TOKEN, Tokenizer

ROLES = ("system", "user", "assistant")
ROLE_TOKENS = dict(zip(ROLES, DIALOGUE_TOKENS, strict=False))
CHAT_TEMPLATE = (  # with <|assistant|> in one piece, llama.cpp without Jinja takes it for Phi-3's
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role must be system, user or assistant') }}"
    "{% endif %}"
    "{% if message['content'] is not string %}"
    "{{ raise_exception('content must be text') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|' + 'assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Turn:
    """What one side of a dialogue says, or the instruction that a dialogue begins with."""

    role: str  # of ROLES
    text: str


class Rendered(NamedTuple):
    """The ids of turns, and which of them a model learns to write: answers and their ends."""

    ids: NDArray[np.int32]
    counts: NDArray[np.bool_]


def has_dialogue(tokenizer: Tokenizer) -> bool:
    """Return whether a vocabulary has the tokens of dialogues."""
    return all(tokenizer.special(name) != NO_TOKEN for name in DIALOGUE_TOKENS)


def render(turns: Sequence[Turn], tokenizer: Tokenizer) -> Rendered:
    """Return the tokens of turns. Text that looks like a special token stays text."""
    texts = tokenizer.encode_batch([turn.text for turn in turns])
    return join([frame(turn.role, ids, tokenizer) for turn, ids in zip(turns, texts, strict=True)])


def render_prompt(turns: Sequence[Turn], tokenizer: Tokenizer) -> NDArray[np.int32]:
    """Return the ids after which a model writes its answer to these turns."""
    begin = np.array([tokenizer.special(ROLE_TOKENS["assistant"])], np.int32)
    return np.concatenate([render(turns, tokenizer).ids, begin])


def frame(role: str, ids: NDArray[np.int32], tokenizer: Tokenizer) -> Rendered:
    """Return the tokens of one turn from the ids of its text."""
    begin, end = tokenizer.special(ROLE_TOKENS[role]), tokenizer.special(END_OF_TURN)
    counts = np.full(len(ids) + 2, role == "assistant")
    counts[0] = False
    return Rendered(np.concatenate([[begin], ids, [end]], dtype=np.int32), counts)


def join(parts: Sequence[Rendered]) -> Rendered:
    """Return the tokens of parts that follow each other."""
    nothing = Rendered(np.empty(0, np.int32), np.empty(0, np.bool_))
    ids, counts = zip(nothing, *parts, strict=True)
    return Rendered(np.concatenate(ids), np.concatenate(counts))


def fit_prompt(
    turns: Sequence[Turn], tokenizer: Tokenizer, block_size: int, max_tokens: int
) -> tuple[list[Turn], int]:
    """Return the turns that fit into a context with their answer, and how many were dropped.

    The answer gets `max_tokens`, but at most a quarter of the context of `block_size` tokens.
    """
    return fit(turns, tokenizer, block_size - min(max_tokens, block_size // 4))


def fit(turns: Sequence[Turn], tokenizer: Tokenizer, room: int) -> tuple[list[Turn], int]:
    """Return the turns whose prompt fits into `room` tokens, and how many were dropped.

    The oldest are dropped, so that what is left begins with a user's turn; the system's turn at the
    beginning stays. The last turn stays even if it is too long.
    """
    system = list(turns[:1]) if turns and turns[0].role == "system" else []
    rest = list(turns[len(system) :])
    sizes = [len(ids) + 2 for ids in tokenizer.encode_batch([turn.text for turn in turns])]
    size = sum(sizes) + 1
    n_dropped = 0
    while size > room and n_dropped < len(rest) - 1:
        n_dropped += 1
        while rest[n_dropped].role == "assistant" and n_dropped < len(rest) - 1:
            n_dropped += 1
        size = sum(sizes[: len(system)]) + sum(sizes[len(system) + n_dropped :]) + 1
    return system + rest[n_dropped:], n_dropped
