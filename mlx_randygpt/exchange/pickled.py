"""Pickles read as plain data: numbers, texts, tuples, lists and dictionaries.

A pickle is a program for a stack machine that may import and call anything. This is a machine that
can do neither: what a file names stays a name, and the one who reads says which of them mean what.
"""

from __future__ import annotations

import pickletools
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_randygpt.exchange import ExchangeError

MOST_BYTES = 1 << 22  # of a pickle, whose tensors lie elsewhere: GPT-2 XL with moments has 400 kB
LARGEST = 1 << 63
CONSTANTS = {
    "NONE": None, "NEWTRUE": True, "NEWFALSE": False,
    "EMPTY_TUPLE": (),
}  # fmt: skip
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MARKED = {"TUPLE", "APPENDS", "SETITEMS"}  # what goes back to the last mark


@dataclass(frozen=True)
class Name:
    """What a pickle would import."""

    name: str  # such as "collections.OrderedDict"


Call = Callable[[str, tuple[Any, ...]], Any]
Refer = Callable[[Any], Any]


def refuse_call(name: str, arguments: tuple[Any, ...]) -> Any:
    """For pickles that call nothing."""
    raise ExchangeError(f"it would run {reprlib.repr(name)}; only plain values are read")


def refuse_reference(key: Any) -> Any:
    """For pickles that hold all they mean."""
    raise ExchangeError("it refers to something outside itself; only plain values are read")


def read_pickle(data: bytes, call: Call = refuse_call, refer: Refer = refuse_reference) -> Any:
    """The value of a pickle; ExchangeError for one that is damaged or more than plain data.

    `call(name, arguments)` is the value of a call that the pickle asks for, `refer(key)` of what
    lies outside it; each raises ExchangeError for what it does not know.
    """
    if len(data) > MOST_BYTES:
        raise ExchangeError(f"its pickle has {len(data):,} bytes; at most {MOST_BYTES:,} are read")
    machine = _Machine(call, refer)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except ExchangeError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ExchangeError(f"its pickle is damaged ({reprlib.repr(str(error))})") from error
    raise ExchangeError("its pickle is damaged (it has no end)")


class _Machine:
    """The stack, the marks on it and the memo."""

    def __init__(self, call: Call, refer: Refer) -> None:
        self._call, self._refer = call, refer
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        """Carry out one opcode; ExchangeError for one that plain data does not need."""
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
            raise ExchangeError(f"its pickle has the opcode {opcode}; plain data has none")

    def pop(self) -> Any:
        """The top of the stack; IndexError where there is nothing above the last mark."""
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise IndexError("the stack is empty")
        return self._stack.pop()

    def _literal(self, value: Any) -> None:
        if isinstance(value, int) and not -LARGEST <= value < LARGEST:
            raise ValueError("a number of more than 64 bits")
        self._stack.append(value)

    def _marked(self, opcode: str) -> None:
        """A tuple, list or dictionary of all that lies above the last mark."""
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
            if not isinstance(key, str | int):  # others may take for ever to compare
                raise TypeError(f"a key that is a {type(key).__name__}")
            into[key] = value

    def _top(self, kind: type) -> Any:
        top = self.pop()
        self._stack.append(top)
        if not isinstance(top, kind):
            raise TypeError(f"{type(top).__name__} where a {kind.__name__} should be")
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
            raise TypeError("a call of what has no name")
        self._stack.append(self._call(function.name, arguments))

    def _op_build(self, _: None) -> None:
        """Attributes of a dictionary, such as the versions in a state_dict, which say nothing of
        what it holds."""
        self.pop()
        self._top(dict)
