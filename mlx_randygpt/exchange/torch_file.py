"""Files of `torch.save`, read without PyTorch and without running what they say.

Owns the ZIP archive, what its pickle calls tensors, and the bytes they lie in. A file is
`NAME/data.pkl`, the structure, and `NAME/data/KEY`, a storage each; nothing is unpacked to disk.
"""

from __future__ import annotations

import math
import os
import reprlib
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.exchange.pickled import MOST_BYTES, Name, read_pickle
from mlx_randygpt.exchange.tensors import FLOATS, MOST_AXES, Array, Stored

MAGIC = b"PK\x03\x04"
LOCAL_BYTES = 30  # before each entry; its last four are the lengths of a name and more
MOST_ENTRIES = 1 << 16
STORAGES = {  # PyTorch's name, the kind in `tensors`, bytes of a number
    "torch.DoubleStorage": ("F64", 8), "torch.FloatStorage": ("F32", 4),
    "torch.HalfStorage": ("F16", 2), "torch.BFloat16Storage": ("BF16", 2),
    "torch.LongStorage": ("I64", 8), "torch.IntStorage": ("I32", 4),
    "torch.ShortStorage": ("I16", 2), "torch.CharStorage": ("I8", 1),
    "torch.ByteStorage": ("U8", 1), "torch.BoolStorage": ("BOOL", 1),
}  # fmt: skip
_DAMAGED = (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class _Storage:
    """A run of numbers in the archive."""

    key: str
    kind: str
    width: int  # bytes of a number
    size: int  # numbers


class TorchFile:
    """The archive: its entries, checked, and its `value`, in which tensors are `Stored`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self._entries = _entries(path, archive)
                self._folder = self._find_folder()
                order = self._bytes(archive, "byteorder") or b"little"
                data = self._bytes(archive, "data.pkl") or b""
        except OSError as error:
            raise ExchangeError(f"{path} cannot be read: {error.strerror or error}") from error
        except ExchangeError:
            raise
        except (ValueError, OverflowError, *_DAMAGED) as error:
            raise ExchangeError(f"{path} is truncated or damaged ({_short(error)})") from error
        if order != b"little":
            raise ExchangeError(f"{path} was written on a machine of the other byte order")
        try:
            self.value = read_pickle(data, self._call, self._refer)
        except ExchangeError as error:
            raise ExchangeError(f"{path}: {error}") from error

    def _find_folder(self) -> str:
        """The folder inside the archive that holds data.pkl."""
        found = [name for name in self._entries if name.split("/")[1:] == ["data.pkl"]]
        if len(found) != 1:
            raise ExchangeError(
                f"{self._path} is a ZIP archive but not a file of torch.save (it has "
                f"{len(found)} data.pkl)"
            )
        return found[0].partition("/")[0]

    def _bytes(self, archive: zipfile.ZipFile, name: str) -> bytes | None:
        entry = self._entries.get(f"{self._folder}/{name}")
        if entry is not None and entry.file_size > MOST_BYTES:
            raise ExchangeError(
                f"{self._path}: its {name} has {entry.file_size:,} bytes; "
                f"at most {MOST_BYTES:,} are read"
            )
        return None if entry is None else archive.read(entry)

    def _refer(self, key: Any) -> _Storage:
        """The storage of a persistent id: ("storage", type, key, device, size)."""
        if not (isinstance(key, tuple) and len(key) == 5 and key[0] == "storage"):
            raise ExchangeError(f"it refers to {reprlib.repr(key)}, which is no storage")
        _, kind, name, _, size = key
        if not (isinstance(kind, Name) and isinstance(name, str) and type(size) is int):
            raise ExchangeError("it has a storage that is not described")
        if kind.name not in STORAGES:
            raise ExchangeError(f"it has a {reprlib.repr(kind.name)}, which is not read")
        letters, width = STORAGES[kind.name]
        entry = self._entries.get(f"{self._folder}/data/{name}")
        if entry is None:
            raise ExchangeError(f"it lacks the storage {reprlib.repr(name)}")
        if size < 0 or entry.file_size != size * width:
            raise ExchangeError(
                f"the storage {reprlib.repr(name)} has {entry.file_size:,} bytes, "
                f"where {size:,} numbers of {width} bytes should be"
            )
        return _Storage(name, letters, width, size)

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """The few calls that tensors are made of; no other is known by its name."""
        if name == "collections.OrderedDict" and not arguments:
            return {}
        if name == "torch._utils._rebuild_tensor_v2" and len(arguments) >= 4:
            return self._tensor(*arguments[:4])
        if name == "torch._utils._rebuild_parameter" and arguments:
            return arguments[0]
        raise ExchangeError(
            f"it would run {reprlib.repr(name)}; only tensors and plain values are read"
        )

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> Stored:
        """A view of a storage; ExchangeError for one that reaches outside it."""
        numbers = [offset, *shape, *strides] if _are_tuples(shape, strides) else [None]
        sound = isinstance(storage, _Storage) and all(type(n) is int and n >= 0 for n in numbers)
        if not sound or len(shape) != len(strides) or len(shape) > MOST_AXES:
            raise ExchangeError("it has a tensor that is not described")
        n = math.prod(shape)
        last = offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
        if n > storage.size or (n and last >= storage.size):
            raise ExchangeError(
                f"a tensor of shape {shape} reaches outside its storage of {storage.size:,} numbers"
            )

        def read() -> Array:
            values = self._storage(storage)
            bytes_apart = [step * storage.width for step in strides]
            view = np.lib.stride_tricks.as_strided(values[offset:], shape, bytes_apart)
            return np.ascontiguousarray(view).reshape(-1)

        return Stored(shape, storage.kind, read)

    def _storage(self, storage: _Storage) -> Array:
        """The numbers of a storage; the archive's checksum of them is compared."""
        entry = self._entries[f"{self._folder}/data/{storage.key}"]
        try:
            with open(self._path, "rb") as file:
                file.seek(entry.header_offset)
                local = file.read(LOCAL_BYTES)
                file.seek(sum(struct.unpack_from("<HH", local, LOCAL_BYTES - 4)), os.SEEK_CUR)
                raw = file.read(entry.file_size)
        except (ValueError, OSError, struct.error) as error:
            reason = _short(error)
            raise ExchangeError(f"{self._path} is truncated or damaged ({reason})") from error
        if not local.startswith(MAGIC) or zlib.crc32(raw) != entry.CRC:
            raise ExchangeError(f"{self._path} is truncated or damaged (its checksums do not hold)")
        return np.frombuffer(raw, FLOATS[storage.kind])


def _entries(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The entries by name. What torch.save never writes is refused: packed ones, which may be
    bombs, two of one name, and names that lead elsewhere."""
    listed = archive.infolist()
    if len(listed) > MOST_ENTRIES:
        raise ExchangeError(
            f"{path} has {len(listed):,} entries; at most {MOST_ENTRIES:,} are read"
        )
    n_bytes = path.stat().st_size
    for entry in listed:
        name = entry.filename
        if name.startswith("/") or "\\" in name or not {"..", ""}.isdisjoint(name.split("/")[:-1]):
            raise ExchangeError(f"{path} has an entry {reprlib.repr(name)}, which leads elsewhere")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ExchangeError(f"{path}: {reprlib.repr(name)} is packed; torch.save packs nothing")
    if sum(entry.file_size for entry in listed) > n_bytes:
        raise ExchangeError(f"{path} says of its entries that they are larger than the file")
    found = {entry.filename: entry for entry in listed}
    if len(found) != len(listed):
        raise ExchangeError(f"{path} has two entries of one name")
    return found


def _are_tuples(*values: Any) -> bool:
    return all(isinstance(value, tuple) for value in values)


def _short(error: Exception) -> str:
    return reprlib.repr(" ".join(str(error).split()))
