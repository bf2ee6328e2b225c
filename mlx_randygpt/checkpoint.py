"""Checkpoints: one safetensors file that is either complete or absent.

A checkpoint holds NumPy arrays and settings only, so that one backend can resume a run of another.

Tensors: every weight under its published name, moments as `optimizer.m.<name>` and
`optimizer.v.<name>`, all float32. Metadata: `format`, `format_version`, `header` (JSON) and
`sha256` of header and tensors together.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import reprlib
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt import files
from mlx_randygpt.config import LIMITS, ConfigError, ModelConfig, TrainConfig, UserError
from mlx_randygpt.model import parameter_shapes, second_moment_shapes
from mlx_randygpt.progress import Plateau, Progress
from mlx_randygpt.state import Params, TrainState
from mlx_randygpt.tokenizers import tokenizer_from_json
from mlx_randygpt.words import format_bytes, one_line

NEWEST = "checkpoint.safetensors"
PREVIOUS = "checkpoint_previous.safetensors"  # the newest state before that
BEST = "checkpoint_best.safetensors"
FORMAT = "mlx-randygpt"
FORMAT_VERSION = "1"
_MOMENTS = ("m", "v")
MAX_TENSORS = 3 * (4 * LIMITS["n_layer"] + 3) + 1000  # slack for braces inside header strings
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
MAX_INTEGER = 1 << 63
MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library
Parts = list[bytes | memoryview]  # of a file, in order
_T = TypeVar("_T")


class CheckpointError(UserError, ValueError):
    """A checkpoint that cannot be read or written. The message names the file and the reason."""


class UnreadableError(CheckpointError):
    """A checkpoint that the system did not let us read: it can be intact."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything that is needed to resume a run or to generate with its model."""

    model: ModelConfig
    train: TrainConfig
    progress: Progress
    tokenizer: dict[str, Any]  # Tokenizer.to_json()
    data: dict[str, Any]  # paths, length in characters and SHA-256 of the text
    backend: str  # which wrote it, or the format it was imported from
    state: TrainState


class Position(NamedTuple):
    """The place of a state among those of its folder: the highest is the newest."""

    generation: int
    step: int


def position_of(checkpoint: Checkpoint) -> Position:
    """Return the position of a checkpoint."""
    return Position(checkpoint.progress.generation, checkpoint.state.step)


def kept_name(step: int) -> str:
    """Return the file name of a checkpoint that later ones do not replace."""
    return f"checkpoint-{step}.safetensors"


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Replace the file at `path` once the new one is on the disk.

    The newest checkpoint of a run leaves the one before it as PREVIOUS. Raises CheckpointError on a
    full or read-only disk, or if a weight is not finite.
    """
    path = Path(path)
    for name, tensor in _tensors(checkpoint.state).items():
        if not np.isfinite(tensor).all():
            raise CheckpointError(f"{path} is not replaced: {name} is not finite")
    follows = path.name == NEWEST and checkpoint.state.step > 0
    previous = path.with_name(PREVIOUS) if follows else None
    write_atomically(path, serialize(checkpoint), previous)


def serialize(checkpoint: Checkpoint) -> Parts:
    """Return the content of the file in parts, byte for byte what `safetensors.numpy.save` returns.

    That function makes two more copies and holds the GIL; a killed `save_file` leaves odd files.
    """
    pairs = sorted(_tensors(checkpoint.state).items())
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in pairs}
    header = json.dumps(to_strict_json(header_of(checkpoint)), sort_keys=True, allow_nan=False)
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "header": header}
    index: dict[str, Any] = {"__metadata__": metadata | {"sha256": _digest(header, tensors)}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        index[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(index, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *(tensor.data for tensor in tensors.values())]


def is_run_folder(path: Path) -> bool:
    """Return whether `path` is a folder; raise UnreadableError if that is unknown."""
    try:
        return files.is_folder(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def find_checkpoint(folder: Path) -> Path:
    """Return the best checkpoint in a folder, else the newest; CheckpointError if it has neither.

    The best of a run that was only evaluated before its first step does not count.
    """
    best, newest = folder / BEST, folder / NEWEST
    try:
        has_newest = files.exists(newest)
        if files.exists(best) and not (has_newest and peek_step(best) == 0):
            return best
    except OSError as error:
        raise _unreadable(folder, error) from error
    if has_newest:
        return newest
    raise CheckpointError(
        f"there is neither {BEST} nor {NEWEST} in {folder}/; "
        "`mlxgpt train` makes them, or give the path of a checkpoint"
    )


def load_checkpoint(path: str | Path, *, weights_only: bool = False) -> Checkpoint:
    """Read and verify a checkpoint; of a run folder, the best one, else the newest.

    Raises CheckpointError; never returns a part of a checkpoint. With `weights_only` the moments
    are checked but not returned, because generation and evaluation do not need them.
    """
    path = Path(path)
    if is_run_folder(path):
        path = find_checkpoint(path)
    header, tensors = _read(path)
    try:
        model = dataclass_from_json(ModelConfig, header["model"])
        train = dataclass_from_json(TrainConfig, header["train"])
        progress, tokenizer = progress_from_json(header["progress"]), header["tokenizer"]
        step, backend, data = header_facts(header)
        if tokenizer_from_json(tokenizer).vocab_size != model.vocab_size:
            raise ConfigError("the vocabulary sizes of its tokenizer and its model differ")
    except _UNREADABLE as error:
        raise CheckpointError(f"{path} has an unreadable header: {one_line(error)}") from error
    params = {name: tensors.pop(name) for name in parameter_shapes(model) if name in tensors}
    moments: dict[str, Params] = {kind: {} for kind in _MOMENTS}
    for name, tensor in tensors.items():
        kind, _, weight = name.removeprefix("optimizer.").partition(".")
        moments.setdefault(kind, {})[weight] = tensor
    _verify_shapes(path, (model, train), params, moments)
    state = TrainState(step, params, {} if weights_only else moments)
    return Checkpoint(
        model=model,
        train=train,
        progress=progress,
        tokenizer=tokenizer,
        data=data,
        backend=backend,
        state=state,
    )


def write_atomically(path: Path, parts: Parts, previous: Path | None = None) -> None:
    """Replace the file at `path`; with `previous`, its old content stays under that name.

    A missing folder is created. Raises CheckpointError if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replace(path, previous=previous) as file:
            file.writelines(parts)
    except OSError as error:
        reason = error.strerror or str(error)
        size = format_bytes(sum(memoryview(part).nbytes for part in parts))
        raise CheckpointError(f"could not write {path}: {reason}; it needs {size}") from error


def _tensors(state: TrainState) -> Params:
    tensors = dict(state.params)
    for kind in _MOMENTS:
        tensors |= {f"optimizer.{kind}.{n}": a for n, a in state.moments.get(kind, {}).items()}
    return tensors


def header_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return everything except the arrays, for JSON."""
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
    """Return the step in a checkpoint's header; CheckpointError if it cannot be read."""
    return peek_position(path).step


def peek_position(path: Path) -> Position:
    """Return the position in a checkpoint's header; CheckpointError if it cannot be read."""
    with _opened(path) as (_, _, metadata):
        header = json.loads(metadata["header"])
        return Position(int(header["progress"].get("generation", 0)), int(header["step"]))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, dict[str, list[int]], dict[str, str]]]:
    """Yield a file at its first tensor, the shapes of its tensors in order, and its metadata.

    Errors in the block too become a CheckpointError.
    """
    try:
        with _open_regular(path) as file:
            index = _read_index(file)
            metadata = index.pop("__metadata__", {})
            _verify_format(path, metadata)
            yield file, _in_order(index, file), metadata
    except IsADirectoryError as error:
        raise CheckpointError(
            f"{path} is a folder; name the file, such as {path / NEWEST}"
        ) from error
    except FileNotFoundError as error:
        raise CheckpointError(f"could not read {path}: {error.strerror or error}") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    except CheckpointError:
        raise
    except _UNREADABLE as error:
        reason = one_line(error)
        raise CheckpointError(
            f"{path} is not a checkpoint of mlxgpt, or is truncated or damaged ({reason})"
        ) from error


def _unreadable(path: Path, error: OSError) -> UnreadableError:
    return UnreadableError(f"could not read {path}: {error.strerror or error}")


def _open_regular(path: Path) -> BinaryIO:
    """Open a regular file; it is read, not mapped.

    A map that another process truncates would end this process with SIGBUS.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe never blocks
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise CheckpointError(f"{path} is a pipe or a device; a checkpoint is a regular file")
    return open(descriptor, "rb")


def _read_index(file: BinaryIO) -> dict[str, Any]:
    """Return the index of a safetensors file; raise one of _UNREADABLE if it has none.

    More tensors than any model has are refused because reading takes 1 kB for each.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > min(_n_bytes_left(file), MAX_HEADER_BYTES):
        raise ValueError(f"its header should have {length} bytes")
    text = file.read(length)
    n_objects = text.count(b"{")  # the index has one per tensor
    if n_objects > MAX_TENSORS:
        raise ValueError(f"it has {n_objects} tensors; no model has more than {MAX_TENSORS}")
    return dict(json.loads(text))


def _in_order(index: dict[str, Any], file: BinaryIO) -> dict[str, list[int]]:
    """Return the shapes of the tensors in the order of the file, which they have to fill."""
    end = 0
    shapes = {}
    for name, entry in sorted(index.items(), key=lambda item: list(item[1]["data_offsets"])):
        shape, span = entry["shape"], entry["data_offsets"]
        if entry["dtype"] != "F32":
            raise ValueError(f"{reprlib.repr(name)} is {reprlib.repr(entry['dtype'])}, not 'F32'")
        if not all(type(n) is int and n >= 0 for n in (*shape, *span)):
            raise ValueError(f"the place of {reprlib.repr(name)} is {reprlib.repr(entry)}")
        if span != [end, end + 4 * math.prod(shape)]:
            raise ValueError(f"{reprlib.repr(name)} should be at {end}, not at {span}")
        end, shapes[name] = span[1], shape
    if end != _n_bytes_left(file):
        raise ValueError(f"its tensors should have {end} bytes, not {_n_bytes_left(file)}")
    return shapes


def _n_bytes_left(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size - file.tell()


def _read_tensor(file: BinaryIO, shape: list[int]) -> NDArray[np.float32]:
    tensor = np.empty(shape, "<f4")
    rest = tensor.reshape(-1).view(np.uint8).data
    while rest:
        n = file.readinto(rest)  # type: ignore[attr-defined]
        if not n:
            raise ValueError("it ended while it was read")
        rest = rest[n:]
    return tensor


def _read(path: Path) -> tuple[dict[str, Any], Params]:
    """Return header and tensors of a file, after checking its checksum."""
    with _opened(path) as (file, shapes, metadata):
        tensors = {name: _read_tensor(file, shape) for name, shape in shapes.items()}
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
    path: Path, configs: tuple[ModelConfig, TrainConfig], params: Params, moments: dict[str, Params]
) -> None:
    shapes = parameter_shapes(configs[0])
    if missing := shapes.keys() - params.keys():
        raise CheckpointError(f"{path} lacks the weight {min(missing)}")
    if unknown := moments.keys() - set(_MOMENTS):
        raise CheckpointError(
            f"{path} has tensors of an unknown kind, {reprlib.repr(min(unknown))}"
        )
    for kind, arrays in {"": params, **moments}.items():
        expected = shapes | (second_moment_shapes(*configs) if kind == "v" else {})
        for name, array in arrays.items():
            if array.dtype != np.float32 or expected.get(name) != array.shape:
                raise CheckpointError(
                    f"{path}: {reprlib.repr(name)} is {array.dtype} {array.shape}, expected "
                    f"float32 {expected.get(name, 'no such weight')}"
                )


def _digest(header: str, tensors: Params) -> str:
    digest = hashlib.sha256(header.encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        line = f"\n{name} {array.dtype.str} {array.shape}\n"
        digest.update(line.encode("utf-8", "surrogatepass"))  # a damaged name can be anything
        digest.update(array.data)
    return digest.hexdigest()


def to_strict_json(value: Any) -> Any:
    """Replace numbers that are not finite by None, because JSON has no notation for them."""
    if isinstance(value, dict):
        return {key: to_strict_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_strict_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def drop_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """Drop null fields so that the dataclass defaults apply."""
    return {name: value for name, value in values.items() if value is not None}


def dataclass_from_json(kind: type[_T], values: object) -> _T:
    """Build a settings record from JSON; raise ConfigError for an unknown field or a wrong type."""
    if not isinstance(values, dict):
        raise ConfigError(f"{kind.__name__} is {reprlib.repr(values)}, not an object")
    types = get_type_hints(kind)
    for name, value in values.items():
        if name not in types:
            raise ConfigError(f"{kind.__name__} has no field {reprlib.repr(name)}")
        allowed = get_args(types[name]) or (types[name],)
        if type(value) not in allowed and not (type(value) is int and float in allowed):
            expected = " or ".join(t.__name__ for t in allowed)
            raise ConfigError(f"{name}={reprlib.repr(value)} is not {expected}")
        limit = math.inf if type(value) is float else MAX_INTEGER
        if type(value) in (int, float) and not abs(value) < limit:
            raise ConfigError(f"{name}={reprlib.repr(value)} does not fit into 64 bits")
    return kind(**values)


def progress_from_json(values: object) -> Progress:
    """Build the progress of a run from JSON; raise ConfigError if a value is invalid."""
    if not isinstance(values, dict) or not isinstance(values.get("plateau"), dict):
        raise ConfigError("progress is not an object with a plateau")
    plateau = dataclass_from_json(Plateau, drop_nulls(values["plateau"]))
    rest = {name: value for name, value in drop_nulls(values).items() if name != "plateau"}
    progress = replace(dataclass_from_json(Progress, rest), plateau=plateau)
    of_plateau = (plateau.evaluations_without_best, plateau.reductions)
    of_run = (progress.rollbacks, progress.generation, progress.tokens, progress.best_step)
    if min(*of_plateau, *of_run, progress.eval_step + 1) < 0:
        raise ConfigError("progress has a count below 0")
    return progress


def header_facts(header: dict[str, Any]) -> tuple[int, str, dict[str, Any]]:
    """Return step, backend and data of a header; raise ConfigError if one has a wrong type."""
    step, backend, data = header["step"], header["backend"], header["data"]
    paths, values = data["paths"], (step, data["characters"], backend, data["sha256"])
    valid = [type(value) for value in values] == [int, int, str, str] and 0 <= step < MAX_INTEGER
    valid = valid and isinstance(paths, list) and all(isinstance(path, str) for path in paths)
    if not (valid and backend.isprintable()):
        raise ConfigError("step, backend or data are of the wrong type")
    return step, backend, data
