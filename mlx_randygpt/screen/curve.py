"""A series of any length in bounded memory, and its drawing in braille dots."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

Point = tuple[float, float]  # step, loss

DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of one cell, by column then row
BLANK = 0x2800  # braille without dots, drawn as a space: some fonts show it as empty circles
CUT = 0.1  # share of the highest values that can leave the top, to give the rest room


class Curve:
    """A series in at most `max_points` points; once full, neighbours are averaged in pairs."""

    def __init__(self, max_points: int) -> None:
        self.points: list[Point] = []
        self._max_points = max_points  # even
        self._per_point = 1  # values averaged into one point
        self._n_newest = 1  # values in the newest point

    def add(self, step: float, loss: float) -> None:
        """Append a value; values that are not finite are ignored."""
        if not math.isfinite(loss):
            return
        if self.points and self._n_newest < self._per_point:
            self._n_newest += 1
            x, y = self.points[-1]
            self.points[-1] = (x + (step - x) / self._n_newest, y + (loss - y) / self._n_newest)
            return
        if len(self.points) == self._max_points:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [((a + c) / 2, (b + d) / 2) for (a, b), (c, d) in pairs]
            self._per_point *= 2
        self.points.append((step, loss))
        self._n_newest = 1


@dataclass(frozen=True)
class Frame:
    """The range of steps and values that a drawing of `width` x `height` characters covers."""

    first: int
    last: int
    low: float
    high: float
    width: int
    height: int

    def dot(self, point: Point) -> tuple[int, int]:
        """Return column and row in dots, 2 x 4 per character; row -1 is above the top."""
        right, bottom = 2 * self.width - 1, 4 * self.height - 1
        x = (point[0] - self.first) / max(self.last - self.first, 1) * right
        y = (self.high - point[1]) / (self.high - self.low) * bottom
        return min(max(round(x), 0), right), max(round(y), -1)

    def value(self, row: int) -> float:
        """Return the value at a row of characters."""
        return self.high - (self.high - self.low) * row / max(self.height - 1, 1)


def frame(
    points: Sequence[Point], marks: Sequence[Point], steps: tuple[int, int], size: tuple[int, int]
) -> Frame:
    """Return the frame of a line and marks, at least one in total, between two steps.

    The highest values of the line can leave the top; of the marks only one at step 0, which shows
    an untrained model.
    """
    line = sorted(value for _, value in points or marks)
    inside = [value for step, value in marks if step > 0]
    low = min([line[0], *(value for _, value in marks)])
    high = max([line[math.ceil(len(line) * (1 - CUT)) - 1], *inside, low + 1e-3])
    return Frame(*steps, low, high, *size)


def draw(points: Sequence[Point], frame: Frame) -> list[str]:
    """Draw a line through `points`, as `frame.height` strings of `frame.width` characters."""
    cells = [[BLANK] * frame.width for _ in range(frame.height)]
    for start, end in pairwise(frame.dot(point) for point in points):
        for x, y in _segment(start, end):
            if y >= 0:
                cells[y // 4][x // 2] |= DOTS[x % 2][y % 4]
    return ["".join(map(chr, row)).replace(chr(BLANK), " ") for row in cells]


def _segment(start: tuple[int, int], end: tuple[int, int]) -> Iterator[tuple[int, int]]:
    dx, dy = end[0] - start[0], end[1] - start[1]
    n = max(abs(dx), abs(dy), 1)
    for i in range(n + 1):
        yield start[0] + round(dx * i / n), start[1] + round(dy * i / n)
