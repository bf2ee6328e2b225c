"""The time of a training step of every preset on this machine: measured once, and kept.

`mlxgpt doctor` measures steps of a few shallow models, `mlxgpt presets` shows what follows. A
preset is scaled from the measured model that is nearest in width, by layers, sequences and FLOP.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from mlx_randygpt import settings
from mlx_randygpt.backends import make_backend
from mlx_randygpt.backends.numpy.backend import available_cores
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.data import DataError, cache
from mlx_randygpt.model import flops_per_token, initial_state
from mlx_randygpt.planning.footprint import chunk_rows
from mlx_randygpt.planning.plan import Rate, fit, step_seconds
from mlx_randygpt.recipes import PRESETS

FILE = "speed.json"  # in the folder of caches
MEASURED = ("mini", "tiny", "small", "l")  # widths 32 to 256
RECIPE = "modern"
VOCAB_SIZE = 67  # of tiny Shakespeare
TRIAL_SECONDS = 0.2  # for each size
MAX_SEQUENCES = 64  # at once: a whole batch of the presets


@dataclass(frozen=True)
class Speed:
    """Seconds of a step by preset, with RECIPE, and where and when it was measured."""

    backend: str
    device: str
    date: str
    step_seconds: dict[str, float]


def measure(backend: str, clock: Callable[[], float] = time.perf_counter) -> Speed:
    """Measure short steps of a backend on this machine, for some seconds."""
    rates: dict[str, Rate] = {}
    device = ""
    for preset in MEASURED:
        model, train = _sized(preset)
        few = MAX_SEQUENCES
        if backend == "numpy":  # it computes in chunks: time grows with their number
            few = available_cores() * chunk_rows(model, MAX_SEQUENCES, available_cores())
        trials = []
        for n_layer in (1, 2):
            shallow = _sized(preset, n_layer=n_layer)[0]
            state = initial_state(shallow, train.seed)
            built = make_backend(backend, shallow, train, state)
            device = built.device
            seconds = step_seconds(built, shallow, train, few, clock, TRIAL_SECONDS)
            trials.append((n_layer, few, seconds))
        rates[preset] = Rate(fit(trials), model.n_embd, 1.0, tuple(trials))
    seconds_of = {name: estimate(name, rates) for name in PRESETS}
    return Speed(backend, device, date.today().isoformat(), seconds_of)


def estimate(preset: str, rates: dict[str, Rate]) -> float:
    """Return the time of a preset's step, scaled from the measured one nearest in width."""

    def flops(model: ModelConfig) -> float:
        return flops_per_token(model) * model.block_size  # of a sequence

    model, train = _sized(preset)
    nearest = min(rates, key=lambda name: abs(math.log(rates[name].width / model.n_embd)))
    measured, _ = _sized(nearest, n_layer=model.n_layer)
    scale = flops(model) / flops(measured)
    return scale * rates[nearest].seconds(model.n_layer, train.batch_size)


def _sized(preset: str, **sizes: int) -> settings.Configs:
    return settings.resolve_new({"recipe": RECIPE, "preset": preset, **sizes}, VOCAB_SIZE)


def save(speed: Speed, folder: Path | None = None) -> None:
    """Keep a measurement; raise DataError if it cannot be written."""
    path = (folder or cache.default_folder()) / FILE
    cache.write_small(path, json.dumps(asdict(speed)).encode())


def load(folder: Path | None = None) -> Speed | None:
    """Return the measurement that was kept; None if there is none that can be read."""
    with contextlib.suppress(DataError, ValueError, TypeError, AttributeError):
        speed = Speed(**json.loads(cache.read_small((folder or cache.default_folder()) / FILE)))
        if all(seconds > 0 for seconds in speed.step_seconds.values()):
            return speed
    return None
