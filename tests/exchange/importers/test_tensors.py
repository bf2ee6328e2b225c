"""Tensors of safetensors files: what the library writes is read, what a file says of itself is
checked before anything is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.exchange.importers.tensors import (
    MAX_HEADER_BYTES,
    as_float32,
    read_json,
    read_safetensors,
    read_shards,
)

VALUES = np.linspace(-2, 2, 12).reshape(3, 4)


def raw(path: Path, header: Any, data: bytes = bytes(48), size: int | None = None) -> Path:
    """A file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2"])
def test_what_the_library_writes_is_read_as_float32(tmp_path: Path, dtype: str) -> None:
    held = {"a": VALUES.astype(dtype), "b": VALUES.astype(dtype)[0], "c": np.zeros((0, 2), dtype)}
    safetensors.numpy.save_file(held, tmp_path / "m.safetensors", {"format": "pt"})
    found = read_safetensors(tmp_path / "m.safetensors")
    assert found.keys() == held.keys()
    for name, stored in found.items():
        values = as_float32(stored.read(), stored.kind).reshape(stored.shape)
        assert values.dtype == np.float32
        assert np.array_equal(values, held[name].astype(np.float32))


def test_bfloat16_is_the_upper_half_of_float32() -> None:
    whole = np.array([1.0, -2.5, 3.1415927, 1e30, -1e-30], np.float32)
    upper = (whole.view(np.uint32) >> 16).astype("<u2")
    assert np.array_equal(
        as_float32(upper, "BF16"), (whole.view(np.uint32) & 0xFFFF0000).view("f4")
    )


def test_a_double_that_float32_cannot_hold_becomes_infinite() -> None:
    assert np.isinf(as_float32(np.array([1e300]), "F64")).all()


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48], **changes}}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (entry(shape=[3, 5]), "is declared at"),
        (entry(data_offsets=[0, 52]), "is declared at"),
        (entry(data_offsets=[4, 52]), "is declared at"),
        (entry(data_offsets=[48, 0]), "is declared at"),
        (entry(data_offsets=[0]), "is declared at"),
        (entry(data_offsets=[-48, 0]), "has an invalid description"),
        (entry(shape=[1 << 44, 1]), "is declared at"),
        (entry(shape=[10**4000] * 8), "is declared at"),
        (entry(shape=[1] * 9), "has an invalid description"),
        (entry(shape=[3.0, 4]), "has an invalid description"),
        (entry(dtype=4), "has an invalid description"),
        ({"w": [1]}, "has an invalid description"),
        ([1], "not an object"),
        (b"{", "damaged header"),
        (b"[" * 100000, "damaged header"),
        (b"\xff\xfe", "damaged header"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, reason: str) -> None:
    with pytest.raises(ExchangeError, match=reason) as caught:
        read_safetensors(raw(tmp_path / "m.safetensors", header))
    assert "\n" not in str(caught.value)


def two(first: list[int], second: list[int], n: int = 3) -> dict[str, Any]:
    """Two vectors of float32 at these bytes."""
    spans = {"a": first, "b": second}
    return {name: {"dtype": "F32", "shape": [n], "data_offsets": at} for name, at in spans.items()}


TWICE = b'{"a":{"dtype":"F32","shape":[7],"data_offsets":[0,28]}'
TWICE += b"," + TWICE[1:] + b"}"


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (two([0, 12], [0, 12]), "overlaps"),
        (two([0, 12], [8, 20]), "overlaps"),
        (two([8, 20], [0, 12]), "overlaps"),
        (two([0, 12], [16, 28]), "leaves a gap"),
        (two([4, 16], [16, 28]), "leaves a gap"),
        (two([0, 12], [12, 24]), "leaves a gap"),  # at the end
        (TWICE, "the name 'a' occurs twice"),
        (b'{"a":{"dtype":"F32","dtype":"I32","shape":[7],"data_offsets":[0,28]}}', "occurs twice"),
    ],
)
def test_tensors_fill_the_file_once(tmp_path: Path, header: Any, reason: str) -> None:
    with pytest.raises(ExchangeError, match=reason) as caught:
        read_safetensors(raw(tmp_path / "m.safetensors", header, bytes(28)))
    assert "\n" not in str(caught.value)


def test_tensors_may_be_listed_in_any_order(tmp_path: Path) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [12, 12]}
    header = two([12, 24], [0, 12]) | {"empty": empty}
    data = np.arange(6, dtype="<f4").tobytes()
    found = read_safetensors(raw(tmp_path / "m.safetensors", header, data))
    assert found["a"].read().tolist() == [3, 4, 5]
    assert found["empty"].read().tolist() == []


@pytest.mark.parametrize("size", [1 << 62, 10_000, 49])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(ExchangeError, match="truncated"):
        read_safetensors(raw(tmp_path / "m.safetensors", b"", bytes(48), size))


def test_a_header_of_megabytes_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "m.safetensors", "wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)  # a hole
    with pytest.raises(ExchangeError, match=f"at most {MAX_HEADER_BYTES:,}"):
        read_safetensors(tmp_path / "m.safetensors")


def test_shards_are_one_set_of_tensors(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        safetensors.numpy.save_file(
            {name: np.full(2, value, "f4")}, tmp_path / f"{name}.safetensors"
        )
    places = {"a": "a.safetensors", "b": "b.safetensors"}
    (tmp_path / "i.json").write_text(json.dumps({"weight_map": places}))
    found = read_shards(tmp_path, "i.json")
    assert {name: stored.read().tolist() for name, stored in found.items()} == {
        "a": [1, 1], "b": [2, 2],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("places", "reason"),
    [
        ({"a": "../a.safetensors"}, "not a safetensors file beside it"),
        ({"a": "/etc/passwd"}, "not a safetensors file beside it"),
        ({"a": "a.txt"}, "not a safetensors file beside it"),
        ({"a": "gone.safetensors"}, "No such file"),
        ({"b": "a.safetensors"}, "lacks the tensor 'b'"),
        ({"a": 1}, "no weight_map"),
        ([1], "no weight_map"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, places: Any, reason: str) -> None:
    safetensors.numpy.save_file({"a": np.zeros(2, "f4")}, tmp_path / "a.safetensors")
    (tmp_path / "i.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ExchangeError, match=reason):
        read_shards(tmp_path, "i.json")


@pytest.mark.parametrize("content", ["", "{", "[1]", "nul", "[" * 100000, "\udcff"])
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "c.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ExchangeError, match=r"c\.json is not (a JSON object|JSON)"):
        read_json(tmp_path / "c.json")
