"""Foreign files that were damaged: refused in one line, or read as what they still say.

Bytes are flipped, cut out, doubled and overwritten at places that a seed decides. What PyTorch
writes carries checksums, so there a damaged file is refused or gives the same weights.
MLXGPT_FUZZ_CASES=10000 is the long run.
"""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from foreign_files import (
    gpt2,
    gpt2_folder,
    lively,
    nanogpt,
    randy_arrays,
    randy_bin,
    randy_model,
)

from mlx_randygpt import files as durable_files
from mlx_randygpt.checkpoint import load_checkpoint, save_checkpoint
from mlx_randygpt.config import UserError
from mlx_randygpt.exchange.importers.imported_model import ImportedModel
from mlx_randygpt.exchange.importing import read_foreign

pytest.importorskip("tokenizers")

CASES = int(os.environ.get("MLXGPT_FUZZ_CASES", "50"))
MOST_MEMORY = 1 << 26  # bytes; the models here have 100 kB
LARGE = (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0\0\0\0")
TABLE = gpt2(activation="gelu", vocab_size=24)


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here has to outlive a power cut."""
    monkeypatch.setattr(durable_files, "flush", lambda number: None)
    monkeypatch.setattr(durable_files, "sync_folder", lambda folder: None)


def damaged(content: bytes, random: Random, reach: int) -> bytes:
    """The content with a few changes in its first `reach` bytes, or last."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 5))):
        at = random.randrange(min(reach, len(changed)))
        at = at if random.random() < 0.7 else len(changed) - 1 - at
        match random.randrange(6):
            case 0:
                changed[at] ^= 1 << random.randrange(8)
            case 1:
                changed[at] = random.randrange(256)
            case 2:
                changed[at : at + 4] = random.choice(LARGE)
            case 3:
                del changed[at : at + random.choice((1, 4, 100, 1 << 20))]
            case 4:
                changed[at:at] = changed[at : at + random.choice((1, 8, 64))]
            case 5:
                changed[at : at + 1] = random.choice((b"9", b"-", b'"', b"{", b"R", b"\0"))
        if not changed:
            break
    return bytes(changed)


def judge(read: Callable[[], ImportedModel], out: Path) -> ImportedModel | None:
    """What is still read, whole enough to be a checkpoint; None where it is refused in one line."""
    found, told = None, ""
    tracemalloc.start()
    try:
        found = read()
        save_checkpoint(out, found.checkpoint())
        load_checkpoint(out)
    except UserError as error:
        told = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MOST_MEMORY
    assert "\n" not in told
    return None if told else found


def fuzz(
    path: Path, read: Callable[[], ImportedModel], reach: int, seed: int
) -> list[ImportedModel]:
    """What is read of the damaged file, over all cases in which it is not refused."""
    whole, left = path.read_bytes(), []
    for case in range(CASES):
        path.write_bytes(damaged(whole, Random(1000 * seed + case), reach))
        if (found := judge(read, path.with_name("out"))) is not None:
            left.append(found)
    path.write_bytes(whole)
    assert judge(read, path.with_name("out")) is not None
    assert len(left) < CASES
    return left


def same(found: ImportedModel, params: Any) -> bool:
    return all(np.array_equal(found.params[name], w) for name, w in params.items())


@pytest.mark.parametrize("reach", [3000, 30000])
def test_nanogpts_file_is_refused_or_the_same(tmp_path: Path, reach: int) -> None:
    params = lively(TABLE)
    path = nanogpt(tmp_path / "ckpt.pt", TABLE, params)
    left = fuzz(path, lambda: read_foreign(path, "nanogpt"), reach, 1)
    assert all(same(found, params) and found.model == TABLE for found in left)


def test_nanogpts_table_is_refused_or_a_table(tmp_path: Path) -> None:
    path = nanogpt(tmp_path / "ckpt.pt", TABLE, lively(TABLE))
    fuzz(tmp_path / "meta.pkl", lambda: read_foreign(path), 10000, 2)


def test_safetensors_are_refused_or_the_same(tmp_path: Path) -> None:
    model = gpt2(vocab_size=261)
    params = lively(model)
    folder = gpt2_folder(tmp_path / "gpt2", model, params)
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    content = (folder / "model.safetensors").read_bytes()
    left = []
    for case in range(CASES):  # the header alone: there is no checksum of the numbers
        head = damaged(content[: 8 + header], Random(3000 + case), 8 + header)
        (folder / "model.safetensors").write_bytes(head + content[8 + header :])
        if (found := judge(lambda: read_foreign(folder), tmp_path / "out")) is not None:
            left.append(found)
    assert len(left) < CASES
    assert all(same(found, params) for found in left)


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "merges.txt"])
def test_the_texts_of_a_folder_are_refused_or_read(tmp_path: Path, name: str) -> None:
    model = gpt2(vocab_size=261)
    params = lively(model)
    folder = gpt2_folder(tmp_path / "gpt2", model, params)
    left = fuzz(folder / name, lambda: read_foreign(folder), 2000, 4)
    assert all(same(found, params) for found in left)


def test_a_tokenizer_json_is_refused_or_read(tmp_path: Path) -> None:
    import json

    folder = gpt2_folder(tmp_path / "gpt2", gpt2(vocab_size=261), lively(gpt2(vocab_size=261)))
    known = read_foreign(folder).tokenizer.to_json()["tokenizer"]
    (folder / "tokenizer.json").write_text(json.dumps(known), encoding="utf-8")
    fuzz(folder / "tokenizer.json", lambda: read_foreign(folder), 3000, 5)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_randygpts_header_is_refused_or_the_same(tmp_path: Path, version: int) -> None:
    arrays = randy_arrays(randy_model())
    path = randy_bin(tmp_path / "c.bin", version, arrays)
    whole = path.read_bytes()
    params = read_foreign(path).params if version == 2 else None
    for case in range(CASES):
        path.write_bytes(damaged(whole[:24], Random(6000 + case), 24) + whole[24:])
        found = judge(lambda: read_foreign(path), tmp_path / "out")
        assert found is None or params is None or same(found, params)


@pytest.mark.parametrize("kind", ["nanogpt", "gpt2", "randygpt"])
def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, kind: str) -> None:
    made = {
        "nanogpt": lambda: nanogpt(tmp_path / "ckpt.pt", TABLE, lively(TABLE)),
        "gpt2": lambda: gpt2_folder(tmp_path, gpt2(), lively(gpt2())) / "model.safetensors",
        "randygpt": lambda: randy_bin(tmp_path / "c.bin", 2, randy_arrays(randy_model())),
    }
    path = made[kind]()
    whole = path.read_bytes()
    for n in np.linspace(0, len(whole) - 1, 40).astype(int).tolist():
        path.write_bytes(whole[:n])
        assert judge(lambda: read_foreign(path), tmp_path / "out") is None, n
