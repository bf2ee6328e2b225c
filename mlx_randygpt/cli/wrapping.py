"""Lines on a terminal that end between words, while their text is still growing."""

from __future__ import annotations

from rich.cells import cell_len

BLANKS = " \t\n"
TAB = 8  # columns between two stops


class WordWrapper:
    """Break the lines of a text that arrives in pieces; a word is held back until it is complete.

    A space for which the line has no room is left out. A word that is wider than the terminal is
    written as it comes.
    """

    def __init__(self, width: int) -> None:
        self._width, self._column = max(1, width), 0
        self._word, self._is_wide = "", False

    def add(self, piece: str) -> str:
        """Return what can be written now."""
        text = ""
        for char in piece:
            if char in BLANKS:
                text += self.end() + self._blank(char)
                continue
            self._word += char
            if self._is_wide or len(self._word) > self._width:
                text += self.end()
                self._is_wide = True
        return text

    def end(self) -> str:
        """Return the word that is held back, on a new line if this one has no room for it."""
        word, self._word = self._word, ""
        breaks = not self._is_wide and 0 < self._column > self._width - cell_len(word)
        self._column = 0 if breaks else self._column
        for char in word:
            width = cell_len(char)
            self._column = width + self._column * (self._column + width <= self._width)
        return "\n" * breaks + word

    def _blank(self, char: str) -> str:
        self._is_wide = False
        width = {" ": 1, "\t": TAB - self._column % TAB, "\n": 0}[char]
        if self._column + width > self._width:
            return ""
        self._column = 0 if char == "\n" else self._column + width
        return char
