"""Read files of `torch.save` without PyTorch and without running any code in them.

A file is a ZIP archive: `NAME/data.pkl` is the pickled structure and `NAME/data/KEY` the bytes of
one storage each. Nothing is unpacked to disk. The first half of this module reads pickles of plain
data, the second half the archive and its tensors.

Python's own `pickle` is not used: it runs the imports of a file, and its C implementation is hard
to bound in its memo and in BUILD. PyTorch, too, reads untrusted files with a restricted machine in
pure Python (`torch/_weights_only_unpickler.py`). In the machine below imports stay names, and the
caller decides which calls are allowed.
"""

from __future__ import annotations

import math
import os
import pickletools
import reprlib
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.exchange.importers.tensors import FLOATS, MAX_AXES, Array, LazyTensor
from mlx_randygpt.words import one_line

MAGIC = b"PK\x03\x04"
LOCAL_BYTES = 30  # header before an entry; ends in the lengths of its name and extra field
MAX_ENTRIES = 1 << 16
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # of PyTorch 0.1.10 to 1.5
TAR, TAR_OFFSET = b"ustar", 257  # before
STORAGES = {  # PyTorch's name -> kind in `tensors`, bytes per number
    "torch.DoubleStorage": ("F64", 8),
    "torch.FloatStorage": ("F32", 4),
    "torch.HalfStorage": ("F16", 2),
    "torch.BFloat16Storage": ("BF16", 2),
    "torch.LongStorage": ("I64", 8),
    "torch.IntStorage": ("I32", 4),
    "torch.ShortStorage": ("I16", 2),
    "torch.CharStorage": ("I8", 1),
    "torch.ByteStorage": ("U8", 1),
    "torch.BoolStorage": ("BOOL", 1),
}
MAX_PICKLE_BYTES = 1 << 22  # of a pickle without its tensors; GPT-2 XL with moments has 400 kB
MAX_INTEGER = 1 << 63
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MARKED = {"TUPLE", "APPENDS", "SETITEMS"}  # take everything above the last mark
_DAMAGED = (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class Name:
    """A name that the pickle would import."""

    name: str  # such as "collections.OrderedDict"


Call = Callable[[str, tuple[Any, ...]], Any]
Refer = Callable[[Any], Any]


def refuse_call(name: str, arguments: tuple[Any, ...]) -> Any:
    """Raise ExchangeError, because calls are not allowed."""
    raise ExchangeError(f"it would run {reprlib.repr(name)}; only plain values are read")


def refuse_reference(key: Any) -> Any:
    """Raise ExchangeError, because references outside the pickle are not allowed."""
    raise ExchangeError("it refers to something outside itself; only plain values are read")


def read_pickle(data: bytes, call: Call = refuse_call, refer: Refer = refuse_reference) -> Any:
    """Return the value of a pickle; raise ExchangeError if it is damaged or not plain data.

    `call(name, arguments)` returns the value of a call in the pickle, `refer(key)` the object of a
    persistent id. Both raise ExchangeError for anything that they do not support.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise ExchangeError(
            f"its pickle has {len(data):,} bytes; at most {MAX_PICKLE_BYTES:,} are read"
        )
    machine = _Machine(call, refer)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except ExchangeError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ExchangeError(f"its pickle is damaged ({one_line(error)})") from error
    raise ExchangeError("its pickle is damaged (it has no end)")


class _Machine:
    """The pickle machine: a stack, the marks on it and the memo."""

    def __init__(self, call: Call, refer: Refer) -> None:
        self._call, self._refer = call, refer
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        """Execute one opcode; raise ExchangeError for one that plain data does not need."""
        if opcode in CONSTANTS:
            self._stack.append(CONSTANTS[opcode])
        elif opcode in LITERALS:
            self._literal(argument)
        elif opcode in TUPLES:
            n = TUPLES[opcode]
            self._stack.append(tuple(self.pop() for _ in range(n))[::-1])
        elif opcode in MARKED:
            self._marked(opcode)
        elif (act := getattr(self, f"_op_{opcode.lower()}", None)) is not None:
            act(argument)
        else:
            raise ExchangeError(
                f"its pickle has the opcode {opcode}, which plain data does not need"
            )

    def pop(self) -> Any:
        """Pop the top of the stack; raise IndexError if nothing is above the last mark."""
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise IndexError("the stack is empty")
        return self._stack.pop()

    def _literal(self, value: Any) -> None:
        if isinstance(value, int) and not -MAX_INTEGER <= value < MAX_INTEGER:
            raise ValueError("a number of more than 64 bits")
        self._stack.append(value)

    def _marked(self, opcode: str) -> None:
        """Build a tuple, list or dictionary from everything above the last mark."""
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        if opcode == "TUPLE":
            self._stack.append(tuple(values))
        elif opcode == "APPENDS":
            self._top(list).extend(values)
        else:
            self._set(values)

    def _set(self, pairs: list[Any]) -> None:
        into = self._top(dict)
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str | int):  # other keys can be arbitrarily slow to compare
                raise TypeError(f"a key that is a {type(key).__name__}")
            into[key] = value

    def _top(self, kind: type) -> Any:
        top = self.pop()
        self._stack.append(top)
        if not isinstance(top, kind):
            raise TypeError(f"a {type(top).__name__} in place of a {kind.__name__}")
        return top

    def _op_proto(self, version: int) -> None: ...

    def _op_frame(self, size: int) -> None: ...

    def _op_mark(self, _: None) -> None:
        self._marks.append(len(self._stack))

    def _op_empty_list(self, _: None) -> None:
        self._stack.append([])

    def _op_empty_dict(self, _: None) -> None:
        self._stack.append({})

    def _op_append(self, _: None) -> None:
        value = self.pop()
        self._top(list).append(value)

    def _op_setitem(self, _: None) -> None:
        value, key = self.pop(), self.pop()
        self._set([key, value])

    def _op_memoize(self, _: None) -> None:
        self._op_binput(len(self._memo))

    def _op_binput(self, index: int) -> None:
        self._memo[index] = self._top(object)

    _op_long_binput = _op_binput

    def _op_binget(self, index: int) -> None:
        self._stack.append(self._memo[index])

    _op_long_binget = _op_binget

    def _op_global(self, name: str) -> None:
        self._stack.append(Name(name.replace(" ", ".")))

    def _op_stack_global(self, _: None) -> None:
        name, module = self.pop(), self.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise TypeError("a name that is not a text")
        self._stack.append(Name(f"{module}.{name}"))

    def _op_binpersid(self, _: None) -> None:
        self._stack.append(self._refer(self.pop()))

    def _op_reduce(self, _: None) -> None:
        arguments, function = self.pop(), self.pop()
        if not (isinstance(function, Name) and isinstance(arguments, tuple)):
            raise TypeError("a call of an object without a name")
        self._stack.append(self._call(function.name, arguments))

    def _op_build(self, _: None) -> None:
        """Ignore the attributes of a dictionary, such as the versions in a state_dict."""
        self.pop()
        self._top(dict)


@dataclass(frozen=True)
class _Storage:
    """A block of numbers in the archive."""

    key: str
    kind: str
    width: int  # bytes of a number
    size: int  # numbers


class TorchFile:
    """An opened archive: its checked entries, and its `value` with tensors as LazyTensor."""

    def __init__(self, path: Path) -> None:
        self._path = path
        refuse_legacy(path)
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
            raise ExchangeError(f"{path} is truncated or damaged ({one_line(error)})") from error
        if order != b"little":
            raise ExchangeError(f"{path} was written on a machine of the other byte order")
        try:
            self.value = read_pickle(data, self._call, self._refer)
        except ExchangeError as error:
            raise ExchangeError(f"{path}: {error}") from error

    def _find_folder(self) -> str:
        """Return the folder inside the archive that holds data.pkl."""
        folders = [name for name in self._entries if name.split("/")[1:] == ["data.pkl"]]
        if len(folders) != 1:
            raise ExchangeError(
                f"{self._path} is a ZIP archive but not a file of torch.save (it has "
                f"{len(folders)} data.pkl)"
            )
        return folders[0].partition("/")[0]

    def _bytes(self, archive: zipfile.ZipFile, name: str) -> bytes | None:
        entry = self._entries.get(f"{self._folder}/{name}")
        if entry is not None and entry.file_size > MAX_PICKLE_BYTES:
            raise ExchangeError(
                f"{self._path}: its {name} has {entry.file_size:,} bytes; "
                f"at most {MAX_PICKLE_BYTES:,} are read"
            )
        return None if entry is None else archive.read(entry)

    def _refer(self, key: Any) -> _Storage:
        """Return the storage of a persistent id: ("storage", type, key, device, size)."""
        if not (isinstance(key, tuple) and len(key) == 5 and key[0] == "storage"):
            raise ExchangeError(f"it refers to {reprlib.repr(key)}, which is not a storage")
        _, kind, name, _, size = key
        if not (isinstance(kind, Name) and isinstance(name, str) and type(size) is int):
            raise ExchangeError("it has a storage with an invalid description")
        if kind.name not in STORAGES:
            raise ExchangeError(f"it has a {reprlib.repr(kind.name)}, which is not supported")
        letters, width = STORAGES[kind.name]
        entry = self._entries.get(f"{self._folder}/data/{name}")
        if entry is None:
            raise ExchangeError(f"it lacks the storage {reprlib.repr(name)}")
        if size < 0 or entry.file_size != size * width:
            raise ExchangeError(
                f"the storage {reprlib.repr(name)} has {entry.file_size:,} bytes, "
                f"expected {size:,} numbers of {width} bytes"
            )
        return _Storage(name, letters, width, size)

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """Return the value of one of the few calls that build tensors; refuse any other."""
        if name == "collections.OrderedDict" and not arguments:
            return {}
        if name == "torch._utils._rebuild_tensor_v2" and len(arguments) >= 4:
            return self._tensor(*arguments[:4])
        if name == "torch._utils._rebuild_parameter" and arguments:
            return arguments[0]
        raise ExchangeError(
            f"it would run {reprlib.repr(name)}; only tensors and plain values are read"
        )

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> LazyTensor:
        """Return a view of a storage; raise ExchangeError if it reaches outside the storage."""
        numbers = [offset, *shape, *strides] if _are_tuples(shape, strides) else [None]
        valid = isinstance(storage, _Storage) and all(type(n) is int and n >= 0 for n in numbers)
        if not valid or len(shape) != len(strides) or len(shape) > MAX_AXES:
            raise ExchangeError("it has a tensor with an invalid description")
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

        return LazyTensor(shape, storage.kind, read)

    def _storage(self, storage: _Storage) -> Array:
        """Read the numbers of a storage and compare them with the archive's checksum."""
        entry = self._entries[f"{self._folder}/data/{storage.key}"]
        try:
            with open(self._path, "rb") as file:
                file.seek(entry.header_offset)
                local = file.read(LOCAL_BYTES)
                file.seek(sum(struct.unpack_from("<HH", local, LOCAL_BYTES - 4)), os.SEEK_CUR)
                raw = file.read(entry.file_size)
        except (ValueError, OSError, struct.error) as error:
            reason = one_line(error)
            raise ExchangeError(f"{self._path} is truncated or damaged ({reason})") from error
        if not local.startswith(MAGIC) or zlib.crc32(raw) != entry.CRC:
            raise ExchangeError(
                f"{self._path} is truncated or damaged (its checksum does not match)"
            )
        return np.frombuffer(raw, FLOATS[storage.kind])


def refuse_legacy(path: Path) -> None:
    """Raise ExchangeError if the file is in a format that torch.save wrote before PyTorch 1.6.

    It was a sequence of pickles that begins with a magic number, before version 0.1.10 a tar.
    """
    try:
        with open(path, "rb") as file:
            first = file.read(TAR_OFFSET + len(TAR))
    except OSError as error:
        raise ExchangeError(f"{path} cannot be read: {error.strerror or error}") from error
    is_pickle = first[:1] == b"\x80" and LEGACY_MAGIC in first[:32]
    if is_pickle or first[TAR_OFFSET:] == TAR:
        raise ExchangeError(
            f"{path} is in the format that torch.save wrote before PyTorch 1.6; save it anew with "
            f"PyTorch: import torch; torch.save(torch.load({path.name!r}, map_location='cpu', "
            "weights_only=True), 'new.bin')"
        )


def _entries(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the entries by name; raise ExchangeError for an archive that torch.save cannot write.

    It has compressed entries (possible ZIP bombs), duplicate names or paths outside the archive.
    """
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        raise ExchangeError(
            f"{path} has {len(entries):,} entries; at most {MAX_ENTRIES:,} are read"
        )
    n_bytes = path.stat().st_size
    for entry in entries:
        name = entry.filename
        if name.startswith("/") or "\\" in name or not {"..", ""}.isdisjoint(name.split("/")[:-1]):
            raise ExchangeError(
                f"{path} has an entry {reprlib.repr(name)}, which is outside the archive"
            )
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ExchangeError(
                f"{path}: {reprlib.repr(name)} is compressed; torch.save does not compress"
            )
    if sum(entry.file_size for entry in entries) > n_bytes:
        raise ExchangeError(f"{path} has entries that are larger than the file")
    by_name = {entry.filename: entry for entry in entries}
    if len(by_name) != len(entries):
        raise ExchangeError(f"{path} has two entries with the same name")
    return by_name


def _are_tuples(*values: Any) -> bool:
    return all(isinstance(value, tuple) for value in values)
