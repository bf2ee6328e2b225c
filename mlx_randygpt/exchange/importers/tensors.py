"""Tensors of foreign files: their descriptions are checked first, then they are read as float32.

This includes the reader of safetensors files, because the library has no bfloat16 for NumPy, and of
the JSON files beside them.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.config import ModelConfig
from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.files import read_text
from mlx_randygpt.model import parameter_shapes
from mlx_randygpt.state import Params
from mlx_randygpt.words import one_line

Array = NDArray[Any]
FLOATS: dict[str, np.dtype[Any]] = {  # name in safetensors -> type of the stored bytes
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
OTHERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
MAX_HEADER_BYTES = 1 << 23  # bytes of a safetensors header; that of GPT-2 XL has 60 kB
MAX_AXES = 8
MAX_JSON_BYTES = 1 << 26  # bytes of a JSON file; GPT-2's tokenizer.json has 1.4 MB


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is still in its file."""

    shape: tuple[int, ...]
    kind: str  # a key of FLOATS, or another type
    read: Callable[[], Array]  # returns the numbers, as the type in FLOATS


def as_float32(raw: Array, kind: str) -> Array:
    """Convert numbers of type `kind` to float32; values out of range become infinite."""
    if kind == "BF16":  # the upper half of a float32
        return (raw.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(raw, np.float32)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ExchangeError(
                f"{path} has {path.stat().st_size:,} bytes; that is too large for a settings file"
            )
        content = json.loads(read_text(path))
    except OSError as error:
        raise ExchangeError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ExchangeError):
            raise
        raise ExchangeError(f"{path} is not JSON ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise ExchangeError(f"{path} is not a JSON object but {reprlib.repr(content)}")
    return content


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of a safetensors file; offsets are checked, no data is read yet.

    Format: 8 bytes length of the header, the header as JSON, the tensors' bytes.
    """
    try:
        n_bytes = path.stat().st_size
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if n_bytes < 8 or size > n_bytes - 8:
                raise ExchangeError(f"{path} is truncated or not a safetensors file")
            if size > MAX_HEADER_BYTES:
                raise ExchangeError(
                    f"{path} has a header of {size:,} bytes; at most {MAX_HEADER_BYTES:,} are read"
                )
            header = json.loads(file.read(size), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise ExchangeError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ExchangeError):
            raise
        raise ExchangeError(f"{path} has a damaged header ({one_line(error)})") from error
    if not isinstance(header, dict):
        raise ExchangeError(f"{path} has a damaged header (it is not an object)")
    header.pop("__metadata__", None)
    tensors = {
        name: _stored(path, name, entry, 8 + size, n_bytes) for name, entry in header.items()
    }
    _check_layout(path, header, n_bytes - 8 - size)
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs; raise ValueError for a name that occurs twice."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {reprlib.repr(twice)} occurs twice")
    return fields


def _check_layout(path: Path, header: Mapping[str, Any], n_bytes: int) -> None:
    """Raise ExchangeError unless the tensors, in any order, fill the `n_bytes` exactly once."""
    end, before = 0, "the beginning"
    spans = sorted((*entry["data_offsets"], name) for name, entry in header.items())
    for start, stop, name in [*spans, (n_bytes, n_bytes, "the end of the file")]:
        if start != end:
            problem = "overlaps" if start < end else "leaves a gap after"
            raise ExchangeError(
                f"{path} is damaged: {reprlib.repr(name)} begins at byte {start:,} and {problem} "
                f"{reprlib.repr(before)}, which ends at {end:,}"
            )
        end, before = stop, name


def read_shards(folder: Path, index: str) -> dict[str, LazyTensor]:
    """Return the tensors of all files in an index, such as model.safetensors.index.json."""
    file_of = read_json(folder / index).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(n, str) for n in file_of.values()):
        raise ExchangeError(f"{folder / index} has no weight_map from tensors to files")
    files = set(file_of.values())
    for name in files:
        if PurePath(name).name != name or not name.endswith(".safetensors"):
            raise ExchangeError(
                f"{folder / index} names {reprlib.repr(name)}; "
                "that is not a safetensors file beside it"
            )
    tensors = {name: read_safetensors(folder / name) for name in sorted(files)}
    for tensor, name in file_of.items():
        if tensor not in tensors[name]:
            raise ExchangeError(f"{folder / name} lacks the tensor {reprlib.repr(tensor)}")
    return {tensor: tensors[name][tensor] for tensor, name in file_of.items()}


def params_of(
    source: Path,
    model: ModelConfig,
    tensors: Mapping[str, LazyTensor],
    transposed: Container[str] = (),
) -> Params:
    """Return the weights of the model, float32 and finite; see `read_float32`."""
    return read_float32(source, parameter_shapes(model), tensors, transposed)


def read_float32(
    source: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, LazyTensor],
    transposed: Container[str] = (),
) -> Params:
    """Return the tensors that `shapes` names, float32 and finite.

    All shapes are checked before any tensor is read. Those in `transposed` are stored as (in, out).
    """
    for name, shape in shapes.items():
        if name not in tensors:
            raise ExchangeError(f"{source} lacks the tensor {name}")
        expected = shape[::-1] if name in transposed else shape
        if tensors[name].shape != expected:
            raise ExchangeError(
                f"{source}: {name} has the shape {reprlib.repr(tensors[name].shape)}, "
                f"expected {expected}"
            )
        if tensors[name].kind not in FLOATS:
            raise ExchangeError(
                f"{source}: {name} has the type {reprlib.repr(tensors[name].kind)}; "
                f"weights are {', '.join(FLOATS)}"
            )
    return {name: finite(source, name, _read(tensors[name], name in transposed)) for name in shapes}


def finite(source: Path, name: str, values: Array) -> Array:
    """Return the values; raise ExchangeError if one of them is not finite."""
    if not np.isfinite(values).all():
        raise ExchangeError(f"{source}: {name} is not finite; the file is damaged")
    return values


def refuse_others(source: Path, names: Iterable[str]) -> None:
    """Raise ExchangeError if there are tensors that the model does not have."""
    if others := sorted(names):
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise ExchangeError(
            f"{source} has the tensor {reprlib.repr(others[0])}{more}, which this model "
            "does not have"
        )


def _read(stored: LazyTensor, transpose: bool) -> Array:
    values = as_float32(stored.read(), stored.kind).reshape(stored.shape)
    return np.ascontiguousarray(values.T) if transpose else values


def _stored(path: Path, name: str, entry: Any, start: int, n_bytes: int) -> LazyTensor:
    """Return the tensor that an entry of a header describes."""
    fields = entry if isinstance(entry, dict) else {}
    kind, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (isinstance(kind, str) and _are_counts(shape) and _are_counts(span)):
        raise ExchangeError(
            f"{path} has a damaged header: {reprlib.repr(name)} has an invalid description"
        )
    width = FLOATS[kind].itemsize if kind in FLOATS else OTHERS.get(kind)
    n = math.prod(shape)
    is_inside = len(span) == 2 and 0 <= span[0] <= span[1] <= n_bytes - start
    if not is_inside or (width is not None and span[1] - span[0] != n * width):
        raise ExchangeError(
            f"{path} is truncated or damaged: {reprlib.repr(name)} is declared at "
            f"{reprlib.repr(span)} of {n_bytes - start:,} bytes"
        )

    def read() -> Array:
        return np.fromfile(path, FLOATS[kind], n, offset=start + span[0])

    return LazyTensor(tuple(shape), kind, read)


def _are_counts(values: object) -> TypeGuard[list[int]]:
    if not isinstance(values, list) or len(values) > MAX_AXES:
        return False
    return all(type(n) is int and n >= 0 for n in values)
