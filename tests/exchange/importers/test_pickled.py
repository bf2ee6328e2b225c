"""Pickles are read as data: what would run code is refused by name, and nothing runs."""

from __future__ import annotations

import os
import pickle
import pickletools
from collections import OrderedDict
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.exchange.importers.torch_file import MAX_PICKLE_BYTES, read_pickle

NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text() | st.integers(-9, 9), inner)
        | st.tuples(inner, inner) | st.lists(inner).map(tuple)
    ),
    max_leaves=20,
)  # fmt: skip


@given(value=PLAIN, protocol=st.sampled_from([2, 3, 4, 5]))
def test_plain_data_comes_back(value: Any, protocol: int) -> None:
    assert read_pickle(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("optimized", [False, True])
def test_shared_parts_stay_shared(optimized: bool) -> None:
    part: list[Any] = [1]
    data = pickle.dumps([part, part], 4)
    found = read_pickle(pickletools.optimize(data) if optimized else data)
    assert found[0] is found[1]


class _Runs:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], tuple(self.call[1:])


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_a_pickle_with_code_runs_nothing(tmp_path: Path, protocol: int) -> None:
    witness = tmp_path / "ran"
    data = pickle.dumps({"model": _Runs(os.mkdir, str(witness))}, protocol)
    with pytest.raises(ExchangeError):
        read_pickle(data)
    pickle.loads(data)
    assert witness.exists()  # it would have


@pytest.mark.parametrize("call", [(eval, "1"), (os.system, "true"), (getattr, "a", "b")])
def test_what_would_run_is_named(call: Any) -> None:
    with pytest.raises(ExchangeError, match=rf"would run '\w+\.{call[0].__name__}'"):
        read_pickle(pickle.dumps(_Runs(*call), 4))


def test_objects_of_classes_are_refused() -> None:
    with pytest.raises(ExchangeError, match=r"NEWOBJ|would run"):
        read_pickle(pickle.dumps(Path("a"), 2))
    with pytest.raises(ExchangeError, match=r"would run 'collections\.OrderedDict'"):
        read_pickle(pickle.dumps(OrderedDict(a=1), 2))


def test_what_lies_outside_is_asked_for() -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, found: Any) -> Any:
            return ("outside", str(found)) if isinstance(found, float) else None

    stream = BytesIO()
    Pickler(stream, 2).dump([1.5])
    assert read_pickle(stream.getvalue(), refer=lambda key: key) == [("outside", "1.5")]
    with pytest.raises(ExchangeError, match="outside itself"):
        read_pickle(stream.getvalue())


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x80\x02", b"\x80\x02.", b".", b"abc", b"\x80\x02]", b"\x80\x02}(K\x01u.",
        b"\x80\x02h\x07.", b"\x80\x02K\x01K\x02a.", b"\x80\x02(.", b"\x80\x02t.", b"\x80\x02(e.",
        b"\x80\x02X\xff\xff\xff\x7fab.",  # a text of 2 GB
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fab.",  # one of 8 EB
        b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".",  # a number of 255 bytes
        b"\x80\x02}]K\x01s.",  # a list as a key
        b"\x80\x02K\x01R.", b"\x80\x02K\x01)R.", b"\x80\x02K\x01}b.", b"\x80\x02K\x01K\x01\x93.",
    ],
)  # fmt: skip
def test_a_damaged_pickle_is_refused(data: bytes) -> None:
    with pytest.raises(ExchangeError, match="pickle") as caught:
        read_pickle(data)
    assert "\n" not in str(caught.value)


def test_a_memo_of_four_billion_entries_allocates_none() -> None:
    data = b"\x80\x02]r\xff\xff\xff\xff."  # LONG_BINPUT 4294967295
    assert read_pickle(data) == []


def test_tuples_that_double_cost_no_time() -> None:
    doubling = b"\x80\x02)" + b"q\x00h\x00\x86" * 200 + b"."  # 2²⁰⁰ leaves
    assert isinstance(read_pickle(doubling), tuple)
    with pytest.raises(ExchangeError, match="a key that is a tuple"):
        read_pickle(b"\x80\x02})" + b"q\x00h\x00\x86" * 200 + b"K\x01s.")


def test_a_pickle_of_megabytes_is_refused() -> None:
    with pytest.raises(ExchangeError, match=f"at most {MAX_PICKLE_BYTES:,}"):
        read_pickle(b"\x80\x02" + b"N0" * MAX_PICKLE_BYTES + b"N.")
