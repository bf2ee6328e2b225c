"""The factory of backends: which one runs here, and how one is built.

The table of backends is config.BACKENDS. MLX is imported only if it is asked for or might have a
GPU; if it is missing or does not run, the reason is reported.
"""

from __future__ import annotations

import platform
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlx_randygpt.backends.base import Backend, BackendError, Scorer
from mlx_randygpt.backends.placement import faster_on
from mlx_randygpt.backends.ranks.group import SINGLE, Group, RankError
from mlx_randygpt.config import (
    BACKENDS,
    ConfigError,
    ModelConfig,
    TrainConfig,
    install_command,
)
from mlx_randygpt.model import merge_adapters
from mlx_randygpt.state import Params, TrainState

if TYPE_CHECKING:
    from mlx_randygpt.backends.mlx.backend import Device


def choose(name: str) -> tuple[str, str]:
    """Resolve `auto` to a backend; return its name and the reason, "" if nothing needs explaining.

    Raises BackendError if the backend that was asked for cannot run here.
    """
    if name not in ("auto", *BACKENDS):
        known = ", ".join(("auto", *BACKENDS))
        raise BackendError(f"backend {name!r} is unknown; it is one of {known}")
    if name not in ("auto", "mlx"):
        return name, ""
    device, reason = mlx_device()
    if name == "mlx" and device is None:
        raise BackendError(f"MLX cannot run here: {reason}; --backend numpy can")
    if name == "mlx" or (device is not None and device.has_gpu):
        return "mlx", ""
    return "numpy", reason if device is None else "MLX has no GPU here"


def choose_for_text(name: str, model: ModelConfig, n_streams: int) -> tuple[str, str]:
    """Resolve `auto` to the backend that generates text faster; return its name and the reason."""
    chosen, reason = choose(name)
    if name != "auto" or chosen != "mlx":
        return chosen, reason
    return faster_on(model, n_streams)


def make_backend(
    name: str,
    model: ModelConfig,
    train: TrainConfig,
    state: TrainState,
    *,
    group: Group = SINGLE,
) -> Backend:
    """Build the backend called `name` ("auto" chooses) with these weights and moments.

    With a group of several ranks, all of them begin with rank 0's state.
    """
    name = choose(name)[0]
    require_features(name, adapters=model.lora_rank > 0, ranks=group.size > 1)
    backend: Backend = _backend_class(name)(model, train, state, group=group)
    return backend


def make_scorer(
    name: str, model: ModelConfig, params: Params, *, dtype: str = "float32", bits: int = 0
) -> Scorer:
    """Build a backend that evaluates and generates with these weights.

    `dtype` is that of the loss on a GPU. With `bits` (8 or 4; MLX only) the matrices are quantised,
    and everything else is computed in float32.
    """
    name = choose(name)[0]
    params, model = merge_adapters(params, model)
    if not bits:
        return make_backend(name, model, TrainConfig(dtype=dtype), TrainState(0, params, {}))
    if name != "mlx":
        raise BackendError(f"the backend {name} has no quantised weights; mlx does")
    module = import_module("mlx_randygpt.backends.mlx.quantized")
    scorer: Scorer = module.QuantizedScorer(model, params, bits)
    return scorer


def text_scorer(name: str, model: ModelConfig, backend: Backend) -> Scorer:
    """Return a scorer that generates text with the current weights of a backend in training.

    It is `backend` itself, or another one called `name` with a copy of the weights.
    """
    if name in ("", backend.name):
        return backend
    return make_scorer(name, model, backend.state().params)


def require_features(name: str, *, adapters: bool = False, ranks: bool = False) -> None:
    """Raise ConfigError or RankError unless this backend trains adapters, or on several ranks."""
    features = getattr(_backend_class(name), "features", ())
    if adapters and "adapters" not in features:
        raise ConfigError(f"the backend {name} has no --lora-rank; mlx and numpy do")
    if ranks and "ranks" not in features:
        raise RankError(f"--backend {name} trains on one rank; mlx and numpy on several")


def limit_memory(backend: Scorer, planned: int = 0) -> None:
    """Limit MLX on a Metal GPU to `planned` bytes (0: unknown), and keep them in memory."""
    if backend.name == "mlx" and (device := mlx_device()[0]) and device.recommended:
        _mlx_memory().limit(planned, device.recommended)


def release_memory(backend: Scorer) -> None:
    """Release the memory that an idle or finished backend keeps for reuse."""
    if backend.name == "mlx":
        _mlx_memory().release()


def _mlx_memory() -> Any:
    return import_module("mlx_randygpt.backends.mlx.memory")


def mlx_device() -> tuple[Device | None, str]:
    """Return MLX's device, or None and one line with the reason why MLX does not run here."""
    module = BACKENDS["mlx"][0]
    try:
        device: Device = import_module(module).probe()
    except ModuleNotFoundError:
        return None, "MLX is not installed"
    except RuntimeError as error:
        hidden = "a sandbox or a virtual machine may hide it"
        return None, f"{error}; {hidden if platform.system() == 'Darwin' else install_mlx()}"
    except ImportError as error:  # plain `mlx` on Linux: the library comes with an extra
        return None, f"MLX is installed without its library ({error}); {install_mlx()}"
    return device, ""


def install_mlx() -> str:
    """Return the command that installs a working MLX here, or why there is none."""
    if platform.system() != "Darwin":
        return install_command("cpu")
    if platform.machine() == "arm64":
        return "pip install --force-reinstall mlx"
    return "it needs Apple silicon and a Python for arm64"


def _backend_class(name: str) -> Any:
    module, attribute = BACKENDS[name]
    return getattr(import_module(module), attribute)
