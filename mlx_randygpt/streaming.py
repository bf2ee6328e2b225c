"""Text as its tokens come, where what a token adds depends on its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Growing:
    """Decode the last few tokens with and without the new one, and give the difference once it
    holds no half character."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._n_shown = 0  # of the ids kept, those whose text was given

    def __call__(self, token: int) -> str:
        self._ids.append(token)
        shown, grown = self._decode(self._ids[: self._n_shown]), self._decode(self._ids)
        if len(grown) <= len(shown) or grown.endswith("\ufffd"):
            return ""
        self._ids, self._n_shown = self._ids[self._n_shown :], len(self._ids) - self._n_shown
        return grown[len(shown) :]
