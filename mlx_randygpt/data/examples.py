"""Example dialogues that this package makes itself, for a first model that answers."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any, NamedTuple

NUMBERS = range(10, 100)  # of two digits
QUESTIONS = ("What is {a} + {b}?", "How much is {a} plus {b}?", "Please add {a} and {b}.")
ANSWER = "{a} + {b} is {sum}."
Rows = list[dict[str, Any]]


class Example(NamedTuple):
    """Rows to train on, and rows of the same kind that are held out."""

    training: Rows
    held_out: Rows


def is_held_out(a: int, b: int) -> bool:
    """Return whether a + b is held out, and b + a with it; 8 % of all are."""
    return a * b % 11 == 5


def additions(seed: int = 1337) -> Example:
    """Return all additions of two numbers of two digits, each as one question and its answer."""
    random = Random(seed)
    example = Example([], [])
    for a, b in _pairs(random):
        question = random.choice(QUESTIONS).format(a=a, b=b)
        turns = (("user", question), ("assistant", ANSWER.format(a=a, b=b, sum=a + b)))
        row = {"messages": [{"role": role, "content": text} for role, text in turns]}
        (example.held_out if is_held_out(a, b) else example.training).append(row)
    return example


def _pairs(random: Random) -> Iterator[tuple[int, int]]:
    """Yield all pairs in random order, the two orders of a pair one after the other.

    So next to no pair for validation, which is the end of the text, is in the training text.
    """
    pairs = [(a, b) for a in NUMBERS for b in NUMBERS if a <= b]
    random.shuffle(pairs)
    for a, b in pairs:
        yield a, b
        if a != b:
            yield b, a


EXAMPLES = {"additions": additions}
