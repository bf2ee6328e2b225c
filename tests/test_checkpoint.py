"""A checkpoint is whole or refused, and the old file lives until the new one is safe."""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from mlx_randygpt import checkpoint as module
from mlx_randygpt import files
from mlx_randygpt.checkpoint import (
    BEST,
    NEWEST,
    PREVIOUS,
    Checkpoint,
    CheckpointError,
    Progress,
    dataclass_from_json,
    load_checkpoint,
    save_checkpoint,
)
from mlx_randygpt.config import ConfigError, ModelConfig, TrainConfig
from mlx_randygpt.model import second_moment_shapes
from mlx_randygpt.progress import Plateau
from mlx_randygpt.recipes import RECIPES
from mlx_randygpt.state import Params, TrainState, rng
from mlx_randygpt.tokenizers.chars import CharTokenizer
from mlx_randygpt.training.saving import CheckpointWriter

Make = Callable[..., Checkpoint]


@pytest.fixture
def make(
    tiny_model: Callable[..., ModelConfig],
    tiny_train: Callable[..., TrainConfig],
    lively: Callable[..., Params],
) -> Make:
    """(step=7) -> a checkpoint with something in every field."""

    def build(step: int = 7) -> Checkpoint:
        model = tiny_model("modern", n_layer=1, n_embd=8, n_head=2)
        params = lively(model, seed=step)
        train = tiny_train("modern", save_every="5m", prompt="naïve\n")
        shapes = second_moment_shapes(model, train)
        v = {n: params[n][tuple(map(slice, shape))] ** 2 for n, shape in shapes.items()}
        state = TrainState(step, params, {"m": lively(model, seed=step + 1), "v": v})
        progress = Progress(900, 1.5, 2.25, 6, 2.5, 7, Plateau(2.25, 1, 2))
        tokenizer = CharTokenizer("abcdefghijklmnopqrstuvwxyé").to_json()
        data = {"paths": ["/tmp/é.txt"], "characters": 99, "sha256": "f" * 64}
        return Checkpoint(model, train, progress, tokenizer, data, "numpy", state)

    return build


def test_a_round_trip_changes_no_bit(make: Make, tmp_path: Path) -> None:
    saved = make()
    save_checkpoint(tmp_path / "c", saved)
    loaded = load_checkpoint(tmp_path / "c")
    assert replace(loaded, state=saved.state) == saved
    assert loaded.state.step == saved.state.step
    np.testing.assert_equal(loaded.state.params, saved.state.params)
    np.testing.assert_equal(loaded.state.moments, saved.state.moments)


def test_the_file_is_what_safetensors_writes(make: Make) -> None:
    """But for the order of the metadata, which there is another one each time."""
    content = b"".join(module.serialize(make()))
    tensors = module._tensors(make().state)
    end = 8 + int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8:end])["__metadata__"]
    theirs = safetensors.numpy.save(tensors, metadata)
    assert content[:8] == theirs[:8]
    assert content[end:] == theirs[end:]
    ours_in_order, theirs_in_order = (json.loads(c[8:end]) for c in (content, theirs))
    assert list(ours_in_order.items()) == list(theirs_in_order.items())
    assert sorted(content[8:end]) == sorted(theirs[8:end])  # not a space more


def test_no_tensor_is_copied_for_its_file(make: Make) -> None:
    state = make().state
    tensors = module._tensors(state)
    parts = module.serialize(replace(make(), state=state))[2:]
    assert len(parts) == len(tensors)
    for part, name in zip(parts, sorted(tensors), strict=True):
        assert np.shares_memory(np.asarray(part), tensors[name])


def test_a_run_without_any_evaluation_is_read_back(make: Make, tmp_path: Path) -> None:
    saved = replace(make(), progress=Progress())
    save_checkpoint(tmp_path / "c", saved)
    read = load_checkpoint(tmp_path / "c").progress
    np.testing.assert_equal(asdict(read), asdict(Progress()))  # inf and nan included


def test_a_path_can_be_text_and_a_folder_stands_for_its_best(make: Make, tmp_path: Path) -> None:
    save_checkpoint(str(tmp_path / NEWEST), make(8))
    assert load_checkpoint(str(tmp_path)).state.step == 8
    save_checkpoint(tmp_path / BEST, make(7))
    assert load_checkpoint(tmp_path).state.step == load_checkpoint(str(tmp_path)).state.step == 7
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=f"{BEST}.* {NEWEST}"):
        load_checkpoint(empty)


@pytest.mark.parametrize(
    ("name", "in_recipe", "without"), [("muon_beta2", 0.95, 0), ("order", "passes", "random")]
)
def test_a_run_without_a_newer_field_trains_as_it_did(
    name: str, in_recipe: object, without: object
) -> None:
    fields = asdict(TrainConfig(**RECIPES["modern"]["train"]))
    assert fields.pop(name) == in_recipe
    assert getattr(module.dataclass_from_json(TrainConfig, fields), name) == without


def test_weights_only_leaves_the_moments_on_the_disk(make: Make, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", make())
    state = load_checkpoint(tmp_path / "c", weights_only=True).state
    assert state.moments == {}
    np.testing.assert_equal(state.params, make().state.params)


@pytest.mark.parametrize("call", ["os.replace", "mlx_randygpt.files.flush"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    call: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save_checkpoint(tmp_path / "c", make(7))
    monkeypatch.setattr(call, refuse)
    with pytest.raises(CheckpointError, match=r"c: No space left on device; it needs \d\d\.\d kB"):
        save_checkpoint(tmp_path / "c", make(8))
    assert os.listdir(tmp_path) == ["c"]
    assert load_checkpoint(tmp_path / "c").state.step == 7


def test_a_file_is_flushed_then_renamed_then_its_folder_flushed(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    flush, rename = files.flush, os.replace

    def record_flush(descriptor: int) -> None:
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        n_bytes = os.fstat(descriptor).st_size if is_file else 0
        calls.append(f"flush {n_bytes} bytes" if is_file else "flush folder")
        flush(descriptor)

    monkeypatch.setattr(files, "flush", record_flush)
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), rename(a, b)))
    save_checkpoint(tmp_path / "c", make())
    size = (tmp_path / "c").stat().st_size
    assert calls == [f"flush {size} bytes", "rename", "flush folder"]


def test_a_drive_with_a_cache_of_its_own_is_flushed_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On macOS `fsync` stops at the drive; F_FULLFSYNC does not. Where it fails, fsync is left."""
    asked: list[int] = []

    def refuse(descriptor: int, command: int) -> None:
        asked.append(command)
        raise OSError(errno.ENOTSUP, "no such thing here")

    monkeypatch.setattr("fcntl.F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr("fcntl.fcntl", refuse)
    monkeypatch.setattr(os, "fsync", asked.append)
    with open(tmp_path / "file", "wb") as file:
        files.flush(file.fileno())
        assert asked == [51, file.fileno()]


def test_a_folder_that_is_gone_is_made_again(make: Make, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "gone" / "c", make(7))
    assert load_checkpoint(tmp_path / "gone" / "c").state.step == 7


def test_a_file_in_the_folder_s_place_is_named(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file/c: File exists; it needs"):
        save_checkpoint(tmp_path / "file" / "c", make())


def test_the_newest_leaves_the_one_before_it(make: Make, tmp_path: Path) -> None:
    for step in (0, 3, 5, 8):
        save_checkpoint(tmp_path / NEWEST, make(step))
    assert load_checkpoint(tmp_path / NEWEST).state.step == 8
    assert load_checkpoint(tmp_path / PREVIOUS).state.step == 5
    assert sorted(os.listdir(tmp_path)) == [NEWEST, PREVIOUS]


def test_a_save_cut_off_between_its_names_leaves_both_files(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path / NEWEST, make(step))
    os.replace(tmp_path / NEWEST, tmp_path / PREVIOUS)
    os.link(tmp_path / PREVIOUS, tmp_path / NEWEST)  # as after a crash before the last rename
    save_checkpoint(tmp_path / NEWEST, make(3))
    steps = [load_checkpoint(tmp_path / name).state.step for name in (PREVIOUS, NEWEST)]
    assert steps == [2, 3]
    assert sorted(os.listdir(tmp_path)) == [NEWEST, PREVIOUS]


def test_without_hard_links_the_one_before_it_is_moved(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2):
        save_checkpoint(tmp_path / NEWEST, make(step))
    assert load_checkpoint(tmp_path / PREVIOUS).state.step == 1
    assert load_checkpoint(tmp_path / NEWEST).state.step == 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["params", "m", "v"])
def test_what_is_not_finite_never_replaces_a_file(
    kind: str, value: float, make: Make, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "c", make(7))
    bad = make(8)
    group = bad.state.params if kind == "params" else bad.state.moments[kind]
    group["wte.weight"][3, 2] = value
    with pytest.raises(CheckpointError, match=r"c is not replaced: \S*wte.weight is not finite"):
        save_checkpoint(tmp_path / "c", bad)
    assert load_checkpoint(tmp_path / "c").state.step == 7


def refused(path: Path) -> str:
    """Why it cannot be read: one line that names it."""
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    assert "panic" not in message.lower()
    return message


@pytest.mark.parametrize("part", range(20))
def test_a_truncated_file_is_refused(part: int, make: Make, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", make())
    content = (tmp_path / "c").read_bytes()
    cuts = [0, 1, 7, 8, 9, 500, *np.linspace(1000, len(content) - 1, 14, dtype=int)]
    (tmp_path / "c").write_bytes(content[: cuts[part]])
    refused(tmp_path / "c")


@pytest.mark.parametrize("place", ["anywhere", "header"])
def test_a_flipped_bit_is_refused_or_changes_nothing(
    place: str, make: Make, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "c", make())
    content, intact = (tmp_path / "c").read_bytes(), make()
    end = len(content) if place == "anywhere" else 8 + int.from_bytes(content[:8], "little")
    for bit in rng(3, "check").integers(0, 8 * end, 100):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "c").write_bytes(damaged)
        try:
            loaded = load_checkpoint(tmp_path / "c")
        except CheckpointError:
            refused(tmp_path / "c")
        else:
            np.testing.assert_equal(asdict(loaded), asdict(intact))


def test_a_file_that_shrinks_while_it_is_read_is_refused(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapped file would end the process with SIGBUS."""
    save_checkpoint(path := tmp_path / "a.safetensors", make(1))
    verify = module._verify_format

    def verify_and_cut(path: Path, metadata: dict[str, str]) -> None:
        verify(path, metadata)
        os.truncate(path, path.stat().st_size // 2)

    monkeypatch.setattr(module, "_verify_format", verify_and_cut)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_checkpoint(path)


def test_bytes_at_the_end_are_refused(make: Make, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", make())
    with open(tmp_path / "c", "ab") as file:
        file.write(b"\0")
    assert "truncated or damaged" in refused(tmp_path / "c")


def test_another_version_is_named(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FORMAT_VERSION", "2")
    save_checkpoint(tmp_path / "c", make())
    monkeypatch.undo()
    assert "format '2'; this version of mlxgpt reads format '1'" in refused(tmp_path / "c")


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, tmp_path / "other")
    (tmp_path / "text").write_text("To be, or not to be, that is the question.")
    assert "a safetensors file but not a checkpoint" in refused(tmp_path / "other")
    assert "not a checkpoint of mlxgpt, or is truncated or damaged" in refused(tmp_path / "text")
    assert "No such file" in refused(tmp_path / "missing")
    assert "there is neither checkpoint_best.safetensors nor" in refused(tmp_path)


def rewritten(path: Path, change: Callable[[dict[str, Any], Params], None]) -> None:
    """The file with another header and other tensors, under a checksum that holds."""
    tensors = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, framework="np") as file:
        metadata = file.metadata()
    header = json.loads(metadata["header"])
    change(header, tensors)
    metadata["header"] = json.dumps(header, sort_keys=True)
    metadata["sha256"] = module._digest(metadata["header"], tensors)
    safetensors.numpy.save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h, _: h["model"].update(n_head=5), "try 4"),
        (lambda h, _: h["model"].update(colour=1), "no field 'colour'"),
        (lambda h, _: h["train"].update(lr="fast"), "unreadable header"),
        (lambda h, _: h["progress"].pop("plateau"), "unreadable header"),
        *[
            (lambda h, _, key=key: h.pop(key), "unreadable header")
            for key in ("step", "model", "train", "progress", "tokenizer", "data", "backend")
        ],
        (lambda _, t: t.pop("wte.weight"), "lacks the weight wte.weight"),
        (lambda _, t: t.update(extra=t["wte.weight"]), "unknown kind"),
        (lambda _, t: t.update({"wte.weight": t["wte.weight"][1:]}), r"expected float32 \(29, 8\)"),
        (lambda _, t: t.update({"wte.weight": np.zeros((29, 8))}), "is 'F64'"),
    ],
)
def test_contents_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Any], Params], None], reason: str, make: Make, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "c", make())
    rewritten(tmp_path / "c", change)
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(tmp_path / "c")
    refused(tmp_path / "c")


@dataclass(frozen=True)
class Limit:
    steps: int | None = None


@pytest.mark.parametrize("steps", [3, None])
def test_an_optional_field_takes_its_type_or_null(steps: int | None) -> None:
    assert dataclass_from_json(Limit, {"steps": steps}) == Limit(steps)


@pytest.mark.parametrize("steps", ["3", 1.5, True])
def test_an_optional_field_refuses_other_types(steps: object) -> None:
    with pytest.raises(ConfigError, match="is not int or NoneType"):
        dataclass_from_json(Limit, {"steps": steps})


class SlowDisk:
    """A `save` that waits until it may, and remembers what it wrote."""

    def __init__(self) -> None:
        self.started, self.may_write = threading.Event(), threading.Event()
        self.written: list[tuple[str, int]] = []

    def __call__(self, path: Path, checkpoint: Checkpoint) -> None:
        self.started.set()
        assert self.may_write.wait(30)
        self.written.append((path.name, checkpoint.state.step))


def test_of_several_snapshots_the_newest_is_written(make: Make, tmp_path: Path) -> None:
    disk = SlowDisk()
    writer = CheckpointWriter(disk)
    writer.submit(tmp_path / "c", make(1))
    assert disk.started.wait(30)  # 1 is being written; the others queue up behind it
    for step in (2, 3):
        writer.submit(tmp_path / "c", make(step))
    writer.submit(tmp_path / BEST, make(2))
    assert writer.finished() == []
    disk.may_write.set()
    saved = writer.close()
    assert disk.written == [("c", 1), ("c", 3), (BEST, 2)]
    assert [(Path(s.path).name, s.step, s.error) for s in saved] == [
        ("c", 1, ""),
        ("c", 3, ""),
        (BEST, 2, ""),
    ]


def test_what_is_written_is_not_kept(make: Make, tmp_path: Path) -> None:
    writer = CheckpointWriter()
    copy = make()
    gone = threading.Event()
    weakref.finalize(copy, gone.set)
    writer.submit(tmp_path / "c", copy)
    del copy
    assert gone.wait(30)  # before another comes, or the log of this one is asked for
    assert [saved.step for saved in writer.close()] == [7]


def test_a_failed_write_is_reported_and_the_next_one_tried(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    writer = CheckpointWriter()
    writer.submit(tmp_path / "file" / "c", make(1))
    writer.submit(tmp_path / "c", make(2))
    results = writer.close()
    assert {saved.error for saved in results if saved.path == str(tmp_path / "c")} == {""}
    failed = [saved.error for saved in results if saved.path != str(tmp_path / "c")]
    assert failed
    assert all("File exists" in error for error in failed)
    assert load_checkpoint(tmp_path / "c").state.step == 2


def test_a_failed_write_is_tried_again_and_told_once(make: Make, tmp_path: Path) -> None:
    tries: list[int] = []

    def disk(path: Path, checkpoint: Checkpoint) -> None:
        tries.append(checkpoint.state.step)
        if len(tries) < 4:
            raise CheckpointError("no space")

    writer = CheckpointWriter(disk, retry_seconds=0.001)
    writer.submit(tmp_path / "c", make(5))
    while len(tries) < 4:
        threading.Event().wait(0.001)
    assert [saved.error for saved in writer.close()] == ["no space", ""]
    assert tries == [5] * 4


def test_what_fails_to_the_end_is_told_at_the_end(make: Make, tmp_path: Path) -> None:
    def disk(path: Path, checkpoint: Checkpoint) -> None:
        raise CheckpointError("no space")

    writer = CheckpointWriter(disk)
    writer.submit(tmp_path / "c", make(5))
    assert writer.close()[-1].error == "no space"


def test_close_waits_for_everything_and_twice_does_no_harm(make: Make, tmp_path: Path) -> None:
    writer = CheckpointWriter()
    for name in "abc":
        writer.submit(tmp_path / name, make())
    assert len(writer.close()) == 3
    assert writer.close() == []
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]
