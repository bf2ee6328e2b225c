"""Which backends there are, and which one runs here.

MLX is imported only when it is asked for or might have a GPU; a missing library is a reason to
tell, not a crash. Their table is config.BACKENDS.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from mlx_randygpt.backends.base import Backend, BackendError
from mlx_randygpt.config import BACKENDS, ModelConfig, TrainConfig
from mlx_randygpt.model import adapter_backend
from mlx_randygpt.state import TrainState


def choose(name: str) -> tuple[str, str]:
    """`auto` -> the backend to take and the reason, "" where there is nothing to explain.

    Raises BackendError where the one asked for cannot run here.
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


def make_backend(name: str, model: ModelConfig, train: TrainConfig, state: TrainState) -> Backend:
    """The backend called `name` ("auto" chooses) with these weights and moments."""
    name = choose(name)[0]
    module, attribute = adapter_backend(name) if model.lora_rank else BACKENDS[name]
    build: Callable[..., Backend] = getattr(import_module(module), attribute)
    return build(model, train, state)


def mlx_device() -> tuple[Any, str]:
    """MLX's device, or None and one line that says why MLX does not run here."""
    try:
        return import_module(BACKENDS["mlx"][0]).probe(), ""
    except ModuleNotFoundError:
        return None, "MLX is not installed"
    except RuntimeError as error:
        return None, f"{error}; reinstall with [cpu]"
    except ImportError as error:  # plain `mlx` on Linux: the library comes with an extra
        return None, f"MLX is installed without its library ({error}); reinstall with [cpu]"
