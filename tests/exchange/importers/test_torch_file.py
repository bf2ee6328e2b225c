"""Files of torch.save, read without it: the same numbers, and nothing outside the file's own."""

from __future__ import annotations

import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_files import save_torch, tensor

from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.exchange.importers.tensors import as_float32
from mlx_randygpt.exchange.importers.torch_file import TorchFile
from mlx_randygpt.exchange.importing import read_foreign

VALUES = np.arange(24, dtype="<f4").reshape(4, 6)


def read(path: Path) -> Any:
    """The value, with arrays in place of tensors."""
    found = TorchFile(path).value
    return {
        name: as_float32(t.read(), t.kind).reshape(t.shape) for name, t in found.items()
    }  # fmt: skip


def test_tensors_are_those_of_their_storages(tmp_path: Path) -> None:
    views = {
        "whole": tensor("0", VALUES),
        "turned": tensor("0", VALUES, 0, (6, 4), (1, 6)),
        "inner": tensor("0", VALUES, 7, (2, 3), (6, 1)),
        "one": tensor("0", VALUES, 5, (), ()),
        "none": tensor("0", VALUES, 0, (0, 3), (3, 1)),
        "half": tensor("1", VALUES.astype("<f2")),
        "double": tensor("2", VALUES.astype("<f8") / 3),
        "brain": tensor("3", np.array([0x3FC0, 0xC000], "<u2")),  # bfloat16
    }
    save_torch(tmp_path / "a.pt", OrderedDict(views))
    found = read(tmp_path / "a.pt")
    assert np.array_equal(found["whole"], VALUES)
    assert np.array_equal(found["turned"], VALUES.T)
    assert np.array_equal(found["inner"], VALUES[1:3, 1:4])
    assert (found["one"], found["none"].shape) == (5.0, (0, 3))
    assert np.array_equal(found["half"], VALUES)
    assert np.array_equal(found["double"], (VALUES / 3).astype(np.float32))
    assert found["brain"].tolist() == [1.5, -2.0]
    assert all(array.dtype == np.float32 for array in found.values())


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (1, (4, 6), (6, 1)), (0, (4, 6), (7, 1)), (0, (25,), (1,)), (-1, (2,), (1,)),
        (0, (2,), (-1,)), (24, (1,), (1,)), (0, (1 << 40,), (0,)), (0, (5, 6), (0, 0)),
        (0, (2, 2), (1,)), (0, (1,) * 9, (1,) * 9), (0, ("a",), (1,)), (0.5, (1,), (1,)),
        (0, (True,), (1,)),
    ],
)  # fmt: skip
def test_a_view_outside_its_storage_is_refused(
    tmp_path: Path, offset: Any, shape: Any, strides: Any
) -> None:
    save_torch(tmp_path / "a.pt", {"w": tensor("0", VALUES, offset, shape, strides)})
    with pytest.raises(
        ExchangeError, match=r"reaches outside its storage|with an invalid description"
    ):
        TorchFile(tmp_path / "a.pt")


class _Runs:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_code_in_the_file_is_named_and_not_run(tmp_path: Path) -> None:
    save_torch(tmp_path / "a.pt", {"w": tensor("0", VALUES), "x": _Runs(tmp_path / "ran")})
    with pytest.raises(ExchangeError, match=r"a\.pt: it would run '\w+\.mkdir'"):
        TorchFile(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def rewritten(path: Path, change: Callable[[str, bytes], tuple[str, bytes] | None]) -> None:
    """The archive with its entries changed or left out."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries:
            if (kept := change(name, data)) is not None:
                archive.writestr(*kept)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda n, d: None if n.endswith("/0") else (n, d), "lacks the storage '0'"),
        (lambda n, d: (n, d[:-4]) if n.endswith("/0") else (n, d), "has 92 bytes"),
        (lambda n, d: None if n.endswith("pkl") else (n, d), "not a file of torch.save"),
        (lambda n, d: ("../" + n, d), "outside the archive"),
        (lambda n, d: ("/" + n, d), "outside the archive"),
        (lambda n, d: (n.replace("/", "\\"), d), "outside the archive"),
        (lambda n, d: (n, b"big") if n.endswith("order") else (n, d), "other byte order"),
        (lambda n, d: (n, d * 100000) if n.endswith("pkl") else (n, d), "at most"),
        (lambda n, d: (n, b"") if n.endswith("pkl") else (n, d), "pickle is damaged"),
    ],
)
def test_an_archive_that_is_not_whole_is_refused(
    tmp_path: Path, change: Callable[[str, bytes], tuple[str, bytes] | None], reason: str
) -> None:
    path = tmp_path / "a.pt"
    save_torch(path, {"w": tensor("0", VALUES)})
    rewritten(path, change)
    with pytest.raises(ExchangeError, match=reason):
        TorchFile(path)


def test_packed_entries_are_refused_as_they_may_be_bombs(tmp_path: Path) -> None:
    save_torch(tmp_path / "a.pt", {"w": tensor("0", np.zeros(100000, "<f4"))}, packed=True)
    with pytest.raises(ExchangeError, match="is compressed"):
        TorchFile(tmp_path / "a.pt")


def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    save_torch(tmp_path / "a.pt", {"w": tensor("0", VALUES)})
    twice = pytest.warns(UserWarning, match="Duplicate name")
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive, twice:
        archive.writestr("a/data/0", b"\0" * 96)
    with pytest.raises(ExchangeError, match="two entries with the same name"):
        TorchFile(tmp_path / "a.pt")


def test_a_flipped_bit_in_a_storage_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_torch(path, {"w": tensor("0", VALUES)})
    content = bytearray(path.read_bytes())
    content[content.index(VALUES.tobytes()) + 5] ^= 1
    path.write_bytes(content)
    found = TorchFile(path).value["w"]
    with pytest.raises(ExchangeError, match="truncated or damaged"):
        found.read()


@pytest.mark.parametrize("protocol", [None, 2])
def test_torch_itself_agrees(tmp_path: Path, protocol: int | None) -> None:
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(6, 4)
    held = {
        "weight": layer.weight.detach().t(), "bias": layer.bias, "part": layer.weight[1:3],
        "brain": layer.weight.bfloat16(), "half": layer.weight.half(),
    }  # fmt: skip
    more = {} if protocol is None else {"pickle_protocol": protocol}
    torch.save(held, tmp_path / "a.pt", **more)
    for name, values in read(tmp_path / "a.pt").items():
        assert np.array_equal(values, held[name].detach().float().numpy()), name


def test_torch_files_of_before_2020_are_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ExchangeError, match="truncated or damaged"):
        TorchFile(tmp_path / "a.pt")


LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e8002") + bytes(300)
TAR = bytes(257) + b"ustar" + bytes(300)


@pytest.mark.parametrize("content", [LEGACY, LEGACY[:20], TAR], ids=["pickles", "short", "tar"])
@pytest.mark.parametrize("format", ["auto", "nanogpt"])
def test_a_file_of_before_pytorch_1_6_says_how_to_save_it_anew(
    tmp_path: Path, content: bytes, format: str
) -> None:
    (tmp_path / "old.bin").write_bytes(content)
    with pytest.raises(ExchangeError, match=r"before PyTorch 1\.6; save it anew .*torch\.save"):
        read_foreign(tmp_path / "old.bin", format)


@pytest.mark.parametrize("content", [b"", b"\x80", b"\x80\x02" + bytes(400), bytes(262)])
def test_other_files_are_not_called_old(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ExchangeError, match="truncated or damaged"):
        TorchFile(tmp_path / "a.pt")
