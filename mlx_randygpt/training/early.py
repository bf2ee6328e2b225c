"""Early looks: a validation loss and a sample by time, ahead of the first regular ones.

They are only shown. What a run decides by, writes and computes is the same with and without them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from mlx_randygpt.config import ConfigError, TrainConfig

FIRST_SECONDS = 20.0  # after the first step; each look waits as long again as the run has taken
COST_SECONDS = 0.5  # of an evaluation and of a sample: together 5 % of the time to the first look
FORWARD_SPEED = 2  # of an evaluation over that of training, at least; measured: 3
KINDS = {"evaluation": "eval_every", "sample": "sample_every"}  # and the interval of regular ones


def early_kinds(train: TrainConfig, given: Collection[str]) -> frozenset[str]:
    """Return the kinds whose interval is the default, and is not among the `given` options."""
    usual = TrainConfig()
    return frozenset(
        kind
        for kind, name in KINDS.items()
        if name not in given and getattr(train, name) == getattr(usual, name)
    )


class EarlyLooks:
    """When to look: about 20, 40, 80, … seconds after the first step, until a regular one comes."""

    def __init__(self, kinds: Collection[str], clock: Callable[[], float]) -> None:
        if unknown := set(kinds) - set(KINDS):
            raise ConfigError(f"early={min(unknown)!r} is unknown; it is one of {', '.join(KINDS)}")
        self._kinds, self._clock = set(kinds), clock
        self._started = self._due_at = math.inf
        self._n_tokens = 0  # of an evaluation; decided by the first

    def __contains__(self, kind: str) -> bool:
        return kind in self._kinds

    def start(self) -> None:
        """Begin to count, at the first call: the first step is done, and compiling with it."""
        if self._started == math.inf:
            self._started = self._clock()
            self._due_at = self._started + FIRST_SECONDS

    def is_due(self) -> bool:
        """Return whether to look now."""
        return bool(self._kinds) and self._clock() >= self._due_at

    def end(self, kind: str) -> None:
        """Leave the rest to the regular ones, of which the first has come."""
        self._kinds.discard(kind)

    def postpone(self) -> float:
        """Begin a look: return the seconds to the next one, as many as have passed."""
        passed = self._clock() - self._started
        self._due_at = self._started + 2 * passed
        return passed

    def n_tokens(self, tokens_per_second: float) -> int:
        """Return how many tokens to evaluate, at this speed of training; the same every time."""
        affordable = int(COST_SECONDS * FORWARD_SPEED * tokens_per_second)
        self._n_tokens = self._n_tokens or max(1, affordable)
        return self._n_tokens
