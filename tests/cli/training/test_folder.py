"""The output folder of a run: refused without a trace, followed where it is moved, one writer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_randygpt.cli.training.folder import FolderError, FolderInUse, RunFolder


def test_a_refused_run_leaves_no_folder_behind(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "new" / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_begin_leaves_no_folder_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk, once the lock is there."""

    def refuse(self: Path, *, missing_ok: bool) -> None:
        raise OSError(28, "No space left on device", str(self))

    with RunFolder(tmp_path / "run") as folder, monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(FolderError, match="No space"):
            folder.begin("iters = 1\n", fresh=True)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_run_takes_away_only_what_it_made(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with RunFolder(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_that_has_begun_stays(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as folder:
        folder.begin("iters = 1\n", fresh=True)
    assert (tmp_path / "run" / "config.toml").read_text() == "iters = 1\n"


def test_a_lock_taken_away_between_opening_and_locking_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlx_randygpt.cli.training.folder as module

    real, stolen = module.fcntl.flock, list[int]()

    def flock(file: object, how: int) -> None:
        if not stolen:
            (tmp_path / ".lock").unlink()  # by the run that held it, as it ends
            stolen.append(1)
        real(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(module.fcntl, "flock", flock)
    with RunFolder(tmp_path), pytest.raises(FolderInUse), RunFolder(tmp_path):
        pass


def test_a_folder_that_is_moved_is_followed(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    with RunFolder(old) as folder:
        folder.begin("", fresh=True)
        old.rename(new)
        assert folder.locate() == new
        assert folder.news == [f"{old} was moved; this run continues in {new}."]
        assert not old.exists()


def test_a_moved_folder_behind_a_link_of_its_old_name_keeps_that_name(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    with RunFolder(old) as folder:
        old.rename(new)
        old.symlink_to(new)
        assert (folder.locate(), folder.news) == (old, [])


def test_a_moved_folder_is_followed_past_a_link_to_another(tmp_path: Path) -> None:
    old, new, other = tmp_path / "old", tmp_path / "new", tmp_path / "other"
    with RunFolder(old) as folder:
        folder.begin("", fresh=True)
        old.rename(new)
        other.mkdir()
        old.symlink_to(other)
        assert folder.locate() == new
    assert list(other.iterdir()) == []


def test_the_name_of_a_moved_folder_is_free_for_another_run(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    with RunFolder(old) as folder:
        old.rename(new)
        with RunFolder(old) as other:
            assert folder.locate() == new
            assert other.locate() == old
        with pytest.raises(FolderInUse), RunFolder(new):
            pass


def test_a_removed_folder_is_made_again_and_is_still_one_runs_own(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as folder:
        folder.begin("iters = 1\n", fresh=True)
        shutil.rmtree(folder.path)
        assert folder.locate() == tmp_path / "run"
        assert (folder.path / "config.toml").exists()
        assert "was removed" in folder.news[0]
        with pytest.raises(FolderInUse), RunFolder(tmp_path / "run"):
            pass


def test_a_removed_folder_that_another_run_has_made_is_left_to_it(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as folder:
        shutil.rmtree(folder.path)
        with RunFolder(tmp_path / "run"):
            assert folder.locate() == tmp_path / f"run-{os.getpid()}"


@pytest.mark.parametrize("take", [Path.touch, lambda path: path.symlink_to("nowhere")])
def test_a_removed_folder_whose_name_is_taken_is_made_again_beside_it(
    tmp_path: Path, take: Callable[[Path], None]
) -> None:
    with RunFolder(old := tmp_path / "run") as folder:
        folder.begin("iters = 1\n", fresh=True)
        shutil.rmtree(old)
        take(old)
        assert folder.locate() == (new := tmp_path / f"run-{os.getpid()}")
        assert folder.news == [f"{old} was removed; this run continues in {new}, created again."]
    assert (new / "config.toml").exists()
    assert not old.is_dir()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(FolderError, match="it is a file, not a folder"),
        RunFolder(tmp_path / "file"),
    ):
        pass
