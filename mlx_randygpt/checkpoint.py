"""Checkpoints: one safetensors file that is either whole or not there.

Owns the format and the atomic write. Knows no backend: a checkpoint is
NumPy arrays and settings, so that one backend resumes what another began.

Tensors: every weight under its published name, moments as `optimizer.m.<name>` and
`optimizer.v.<name>`, all float32. Metadata: `format`, `format_version`, `header` (JSON) and
`sha256` of header and tensors together.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import reprlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open

from mlx_randygpt import files
from mlx_randygpt.config import LIMITS, ConfigError, ModelConfig, TrainConfig, UserError
from mlx_randygpt.model import parameter_shapes
from mlx_randygpt.progress import Plateau, Progress
from mlx_randygpt.state import Params, TrainState
from mlx_randygpt.tokenizers.chars import tokenizer_from_json

NEWEST = "checkpoint.safetensors"
PREVIOUS = "checkpoint_previous.safetensors"  # the newest before the newest
BEST = "checkpoint_best.safetensors"
FORMAT = "mlx-randygpt"
FORMAT_VERSION = "1"
_MOMENTS = ("m", "v")
MAX_TENSORS = 3 * (4 * LIMITS["n_layer"] + 3) + 1000  # 1000: braces in texts and settings
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
Parts = list[bytes | memoryview]  # of a file, one after the other


class CheckpointError(UserError, ValueError):
    """A file that cannot be read as a checkpoint, or not be written; names it and says why."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything that decides how a run goes on, and what its model needs to write."""

    model: ModelConfig
    train: TrainConfig
    progress: Progress
    tokenizer: dict[str, Any]  # Tokenizer.to_json()
    data: dict[str, Any]  # paths, characters and SHA-256 of the text
    backend: str  # who wrote it
    state: TrainState


def kept_name(step: int) -> str:
    """The file of a checkpoint that later ones do not replace."""
    return f"checkpoint-{step}.safetensors"


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write the file whole or not at all; whatever was at `path` stays until the new one is safe.

    The newest of a run leaves the one before it as PREVIOUS. Raises CheckpointError on a full or
    read-only disk, and where a weight is not finite.
    """
    for name, tensor in _tensors(checkpoint.state).items():
        if not np.isfinite(tensor).all():
            raise CheckpointError(f"{path} is not replaced: {name} is not finite")
    follows = path.name == NEWEST and checkpoint.state.step > 0
    previous = path.with_name(PREVIOUS) if follows else None
    write_atomically(path, serialized(checkpoint), previous)


def serialized(checkpoint: Checkpoint) -> Parts:
    """The content of its file, byte for byte what `safetensors.numpy.save` could return; that
    makes two more copies and stops all threads, and `save_file` leaves other names if killed."""
    named = sorted(_tensors(checkpoint.state).items())
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in named}
    header = json.dumps(to_strict_json(header_of(checkpoint)), sort_keys=True, allow_nan=False)
    facts = {"format": FORMAT, "format_version": FORMAT_VERSION, "header": header}
    index: dict[str, Any] = {"__metadata__": facts | {"sha256": _digest(header, tensors)}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        index[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(index, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *(tensor.data for tensor in tensors.values())]


def load_checkpoint(path: Path, *, weights_only: bool = False) -> Checkpoint:
    """Read and verify a checkpoint. Raises CheckpointError; never returns half of one.

    With `weights_only` the moments are checked but not kept, as sampling needs none.
    """
    header, tensors = _read(path)
    try:
        model, train = (
            dataclass_from_json(ModelConfig, header["model"]),
            dataclass_from_json(TrainConfig, header["train"]),
        )
        reached, tokenizer = progress_from_json(header["progress"]), header["tokenizer"]
        step, backend, data = header_facts(header)
        if tokenizer_from_json(tokenizer).vocab_size != model.vocab_size:
            raise ConfigError("its tokenizer has another vocabulary than its model")
    except _UNREADABLE as error:
        raise CheckpointError(f"{path} has an unreadable header: {one_line(error)}") from error
    params = {name: tensors.pop(name) for name in parameter_shapes(model) if name in tensors}
    moments: dict[str, Params] = {kind: {} for kind in _MOMENTS}
    for name, tensor in tensors.items():
        kind, _, weight = name.removeprefix("optimizer.").partition(".")
        moments.setdefault(kind, {})[weight] = tensor
    _verify_shapes(path, model, params, moments)
    state = TrainState(step, params, {} if weights_only else moments)
    return Checkpoint(model, train, reached, tokenizer, data, backend, state)


def write_atomically(path: Path, parts: Parts, previous: Path | None = None) -> None:
    """Temporary file beside `path`, flushed to the disk, renamed over it, folder flushed; what
    was at `path` is then at `previous`. A folder that is gone is made again."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb", buffering=1 << 20) as file:
            file.writelines(parts)
            file.flush()
            files.flush(file.fileno())
        if previous is not None and path.exists():
            _link_atomically(path, previous)
        os.replace(temporary, path)
        files.sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason, size = error.strerror or str(error), _size(sum(memoryview(p).nbytes for p in parts))
        raise CheckpointError(f"could not write {path}: {reason}; it needs {size}") from error


def _tensors(state: TrainState) -> Params:
    named = dict(state.params)
    for kind in _MOMENTS:
        named |= {f"optimizer.{kind}.{n}": a for n, a in state.moments.get(kind, {}).items()}
    return named


def header_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything but the arrays, for JSON."""
    return {
        "step": checkpoint.state.step,
        "model": asdict(checkpoint.model),
        "train": asdict(checkpoint.train),
        "progress": asdict(checkpoint.progress),
        "tokenizer": checkpoint.tokenizer,
        "data": checkpoint.data,
        "backend": checkpoint.backend,
    }


def peek_step(path: Path) -> int:
    """The step of a checkpoint by its header alone; CheckpointError where that cannot be read."""
    try:
        _check_tensor_count(path)
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            _verify_format(path, metadata)
            return int(json.loads(metadata["header"])["step"])
    except CheckpointError:
        raise
    except (SafetensorError, OSError, *_UNREADABLE) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({one_line(error)})") from error


def _check_tensor_count(path: Path) -> None:
    """ValueError for a file of more tensors than any model has: each costs 1 kB once it is read."""
    with open(path, "rb") as file:
        n_bytes = min(int.from_bytes(file.read(8), "little"), path.stat().st_size)
        n_objects = file.read(n_bytes).count(b"{")  # an index has one for each tensor
    if n_objects > MAX_TENSORS:
        raise ValueError(f"{n_objects} tensors are more than the {MAX_TENSORS} of any model")


def _read(path: Path) -> tuple[dict[str, Any], Params]:
    """Header and tensors of a file whose checksum holds."""
    try:
        _check_tensor_count(path)
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            _verify_format(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except IsADirectoryError as error:
        raise CheckpointError(
            f"{path} is a folder; name the file, such as {path / NEWEST}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {error.strerror or error}") from error
    except CheckpointError:
        raise
    except (SafetensorError, *_UNREADABLE) as error:
        reason = one_line(error)
        raise CheckpointError(
            f"{path} is not a checkpoint of mlxgpt, or is truncated or damaged ({reason})"
        ) from error
    if _digest(metadata["header"], tensors) != metadata["sha256"]:
        raise CheckpointError(f"{path} is damaged: its contents do not match its SHA-256")
    try:
        return dict(json.loads(metadata["header"])), tensors
    except _UNREADABLE as error:
        raise CheckpointError(f"{path} has an unreadable header: {one_line(error)}") from error


def _verify_format(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT or not {"header", "sha256"} <= metadata.keys():
        raise CheckpointError(
            f"{path} is a safetensors file but not a checkpoint of mlxgpt "
            f"(format {reprlib.repr(metadata.get('format'))}, expected {FORMAT!r})"
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {reprlib.repr(metadata.get('format_version'))}; "
            f"this version of mlxgpt reads format {FORMAT_VERSION!r}"
        )


def _verify_shapes(
    path: Path, model: ModelConfig, params: Params, moments: dict[str, Params]
) -> None:
    shapes = parameter_shapes(model)
    if missing := shapes.keys() - params.keys():
        raise CheckpointError(f"{path} lacks the weight {min(missing)}")
    if unknown := moments.keys() - set(_MOMENTS):
        raise CheckpointError(
            f"{path} has tensors of an unknown kind, {reprlib.repr(min(unknown))}"
        )
    groups = (params, *moments.values())
    for name, array in (pair for group in groups for pair in group.items()):
        if array.dtype != np.float32 or shapes.get(name) != array.shape:
            raise CheckpointError(
                f"{path}: {reprlib.repr(name)} is {array.dtype} {array.shape}, expected float32 "
                f"{shapes.get(name, 'no such weight')}"
            )


def _digest(header: str, tensors: Params) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _link_atomically(path: Path, other: Path) -> None:
    """Let the file at `path` be at `other` too, at no moment at neither."""
    link = other.with_name(f".{other.name}.{os.getpid()}.tmp")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
        os.replace(link, other)
        link.unlink(missing_ok=True)  # still there where `other` was this very file already
    except OSError:  # a file system without hard links
        os.replace(path, other)


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e5 else f"{n_bytes / 1e3:.1f} kB"


MAX_INTEGER = 1 << 63
MAX_REASON = 160  # characters of an error that a damaged file had a part in
_T = TypeVar("_T")


def to_strict_json(value: Any) -> Any:
    """`value` as JSON can hold it: what is not finite yet, such as a first loss, becomes null."""
    if isinstance(value, dict):
        return {key: to_strict_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_strict_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def drop_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """Without the nulls, whose fields have their defaults."""
    return {name: value for name, value in values.items() if value is not None}


def dataclass_from_json(kind: type[_T], values: object) -> _T:
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
        largest = math.inf if found == "float" else MAX_INTEGER
        if found in ("int", "float") and not abs(value) < largest:
            raise ConfigError(f"{name}={reprlib.repr(value)} is not a number of 64 bits")
    return kind(**values)


def progress_from_json(values: object) -> Progress:
    if not isinstance(values, dict) or not isinstance(values.get("plateau"), dict):
        raise ConfigError("progress is not an object with a plateau")
    plateau = dataclass_from_json(Plateau, drop_nulls(values["plateau"]))
    rest = {name: value for name, value in drop_nulls(values).items() if name != "plateau"}
    found = replace(dataclass_from_json(Progress, rest), plateau=plateau)
    counts = (plateau.evaluations_without_best, plateau.reductions, found.rollbacks)
    if min(*counts, found.tokens, found.best_step, found.eval_step + 1) < 0:
        raise ConfigError("progress has a count below 0")
    return found


def header_facts(header: dict[str, Any]) -> tuple[int, str, dict[str, Any]]:
    """Step, backend and data of a header."""
    step, backend, data = header["step"], header["backend"], header["data"]
    paths, kinds = data["paths"], (step, data["characters"], backend, data["sha256"])
    fits = [type(value) for value in kinds] == [int, int, str, str] and 0 <= step < MAX_INTEGER
    fits = fits and isinstance(paths, list) and all(isinstance(path, str) for path in paths)
    if not (fits and backend.isprintable()):
        raise ConfigError("step, backend or data are of another type than they should be")
    return step, backend, data


def one_line(error: Exception) -> str:
    line = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    return line if len(line) <= MAX_REASON else line[:MAX_REASON] + "…"
