"""Records as JSON and back: settings and progress in the header of a checkpoint.

A file may come from anywhere, so every field is checked for its name and its type.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from mlx_randygpt.config import ConfigError
from mlx_randygpt.schedule import Plateau

LARGEST = 1 << 63
LONGEST_REASON = 160  # characters of an error that a damaged file had a part in
_T = TypeVar("_T")


@dataclass(frozen=True)
class Progress:
    """What a run remembers besides its arrays."""

    tokens: int = 0  # trained on
    seconds: float = 0.0  # spent training
    best_loss: float = math.inf  # lowest validation loss, and the step it was seen at
    best_step: int = 0
    val_loss: float = math.nan  # of the last evaluation, and its step
    eval_step: int = -1
    plateau: Plateau = field(default_factory=Plateau)
    rollbacks: int = 0  # by --on-nan, each of which halved the rate
    bits_per_byte: float = math.nan  # of the last evaluation


def strict(value: Any) -> Any:
    """`value` as JSON can hold it: what is not finite yet, such as a first loss, becomes null."""
    if isinstance(value, dict):
        return {key: strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def known(values: dict[str, Any]) -> dict[str, Any]:
    """Without the nulls, whose fields have their defaults."""
    return {name: value for name, value in values.items() if value is not None}


def record(kind: type[_T], values: object) -> _T:
    """A settings record from JSON; ConfigError for an unknown field or a value of another type."""
    if not isinstance(values, dict):
        raise ConfigError(f"{kind.__name__} is {reprlib.repr(values)}, not an object")
    types = {f.name: str(f.type) for f in fields(kind)}  # type: ignore[arg-type]
    for name, value in values.items():
        if name not in types:
            raise ConfigError(f"{kind.__name__} has no field {reprlib.repr(name)}")
        found = type(value).__name__
        if found != types[name] and (found, types[name]) != ("int", "float"):
            raise ConfigError(f"{name}={reprlib.repr(value)} is not {types[name]}")
        largest = math.inf if found == "float" else LARGEST
        if found in ("int", "float") and not abs(value) < largest:
            raise ConfigError(f"{name}={reprlib.repr(value)} is not a number of 64 bits")
    return kind(**values)


def progress(values: object) -> Progress:
    if not isinstance(values, dict) or not isinstance(values.get("plateau"), dict):
        raise ConfigError("progress is not an object with a plateau")
    plateau = record(Plateau, known(values["plateau"]))
    rest = {name: value for name, value in known(values).items() if name != "plateau"}
    found = replace(record(Progress, rest), plateau=plateau)
    counts = (plateau.evaluations_without_best, plateau.reductions, found.rollbacks)
    if min(*counts, found.tokens, found.best_step, found.eval_step + 1) < 0:
        raise ConfigError("progress has a count below 0")
    return found


def header_facts(header: dict[str, Any]) -> tuple[int, str, dict[str, Any]]:
    """Step, backend and data of a header."""
    step, backend, data = header["step"], header["backend"], header["data"]
    paths, kinds = data["paths"], (step, data["characters"], backend, data["sha256"])
    fits = [type(value) for value in kinds] == [int, int, str, str] and 0 <= step < LARGEST
    fits = fits and isinstance(paths, list) and all(isinstance(path, str) for path in paths)
    if not (fits and backend.isprintable()):
        raise ConfigError("step, backend or data are of another type than they should be")
    return step, backend, data


def one_line(error: Exception) -> str:
    line = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    return line if len(line) <= LONGEST_REASON else line[:LONGEST_REASON] + "…"
