"""A run's folder that cannot be read or reached for a moment, or that somebody has prepared."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_randygpt import files
from mlx_randygpt.checkpoint import (
    BEST,
    NEWEST,
    PREVIOUS,
    CheckpointError,
    kept_name,
    load_checkpoint,
    peek_position,
    peek_step,
)
from mlx_randygpt.cli import group
from mlx_randygpt.cli.training.folder import (
    LOCK,
    LOGS,
    FolderError,
    LogFile,
    RunFolder,
    newest_checkpoint,
    refuse_checkpoints,
)

SIZES = ["--n-layer=1", "--n-head=1", "--n-embd=8", "--block-size=8", "--batch-size=2"]
DENIED = [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE, errno.ENOMEM]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a newest and a best checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text").write_text("to be or not to be\n" * 100)
    words = ["train", "--plain", "--backend=numpy", "--iters=4", "--eval-every=2", *SIZES]
    words += ["--data", str(folder / "text"), "--out", str(folder / "out")]
    assert CliRunner().invoke(group, words).exit_code == 0
    return folder / "out"


def train(out: Path, *words: str) -> Any:
    """Call `mlxgpt train` for a few steps into `out`."""
    text = out.parent / "text"
    text.write_text("to be or not to be\n" * 100)
    fixed = ["train", "--plain", "--backend=numpy", "--iters=2", *SIZES, "--data", str(text)]
    return CliRunner().invoke(group, [*fixed, "--out", str(out), *words])


@pytest.mark.parametrize("code", DENIED)
def test_a_folder_that_cannot_be_reached_was_neither_moved_nor_removed(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunFolder(tmp_path / "run") as folder:
        folder.begin("iters = 1\n", fresh=True)

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(Path, "stat", refuse)
            patch.setattr(os, "stat", refuse)
            assert folder.locate() == tmp_path / "run"
        assert (folder.news, folder.locate()) == ([], tmp_path / "run")


def test_a_folder_that_cannot_be_made_again_yet_is_made_later_with_all_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunFolder(tmp_path / "run") as folder:
        folder.begin("iters = 1\n", fresh=True)
        metrics = folder.logs._files[0]
        metrics.add({"step": 1})
        folder.logs.flush()
        metrics.add({"step": 2})
        shutil.rmtree(folder.path)

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(files, "replace", refuse)
            folder.locate()
            folder.logs.flush()
        folder.locate()
        assert "was removed" in folder.news[-1]
    assert (tmp_path / "run" / LOGS[0]).read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("code", DENIED)
@pytest.mark.parametrize("name", [NEWEST, BEST])
def test_what_cannot_be_read_is_not_damaged(
    trained: Path, code: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Any, *rest: Any, **named: Any) -> int:
        if Path(os.fsdecode(path)).name == name:
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=f"could not read .*{name}: ") as raised:
        newest_checkpoint(trained)
    assert os.strerror(code) in str(raised.value)
    assert "damaged" not in str(raised.value)


@contextmanager
def descriptors_left(n: int) -> Iterator[None]:
    """Let this process open n more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, soft), hard))
    taken: list[int] = []
    with suppress(OSError):
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    try:
        for _ in range(n):
            os.close(taken.pop())
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("n", range(4))
def test_without_descriptors_no_older_state_is_taken(trained: Path, n: int) -> None:
    load_checkpoint(trained / NEWEST)  # what it imports
    with descriptors_left(n):
        try:
            steps, problem = newest_checkpoint(trained)[0].state.step, ""
        except (CheckpointError, FolderError) as error:
            steps, problem = 4, str(error)
    assert steps == 4
    assert "damaged" not in problem
    assert not problem or "Too many open files" in problem


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(FolderError, match="cannot be read: Permission denied"):
        refuse_checkpoints(trained)


WORSE = ["--iters=5", "--lr=50", "--warmup=0"]


@pytest.mark.parametrize("words", [["--iters=4"], WORSE])
@pytest.mark.parametrize("file", [[], [f"out/{NEWEST}"]])
def test_a_best_checkpoint_that_was_still_to_come_is_written_on_resume(
    tmp_path: Path,
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: list[str],
    words: list[str],
) -> None:
    """As after a kill between a kept checkpoint and the best one of its step."""
    shutil.copytree(trained, out := tmp_path / "out")
    assert load_checkpoint(out / NEWEST).progress.best_step == peek_step(out / NEWEST) == 4
    (out / BEST).unlink()
    monkeypatch.chdir(tmp_path)
    assert train(out, "--resume", *file, *words).exit_code == 0
    assert peek_step(out / BEST) == 4


def test_the_clock_does_not_decide_which_state_is_the_newest(tmp_path: Path, trained: Path) -> None:
    """A kill came before the newest file, and a clock had been set back before the best one."""
    shutil.copytree(trained, out := tmp_path / "out")
    shutil.copy2(out / PREVIOUS, out / NEWEST)
    os.utime(out / BEST, (0, 0))
    assert newest_checkpoint(out)[0].state.step == peek_step(out / BEST) == 4


@pytest.mark.parametrize("time", [0, 2_000_000_000])
def test_a_run_that_went_back_goes_on_from_where_it_is(tmp_path: Path, time: int) -> None:
    """States that it went back behind are older, whatever the clock said."""
    out = tmp_path / "out"
    assert train(out, "--iters=6", "--keep-every=2").exit_code == 0
    assert train(out, "--resume", str(out / kept_name(2)), "--iters=3").exit_code == 0
    for path in out.glob("checkpoint*"):
        os.utime(path, (1_000_000_000, time if path.name == NEWEST else 1_000_000_000))
    assert peek_step(out / kept_name(6)) == 6
    assert newest_checkpoint(out)[0].state.step == 3
    assert train(out, "--resume", "--iters=5").exit_code == 0
    assert peek_position(out / NEWEST) == (1, 5)


def test_a_best_checkpoint_that_was_set_aside_in_vain_comes_back(
    tmp_path: Path, trained: Path
) -> None:
    """As after a kill of a run that went back, before it has saved anything."""
    shutil.copytree(trained, out := tmp_path / "out")
    assert train(out, "--resume", *WORSE).exit_code == 0
    (out / BEST).rename(out / "checkpoint_best-4.safetensors")
    assert train(out, "--resume", *WORSE, "--iters=6").exit_code == 0
    assert peek_step(out / BEST) == 4
    assert not (out / "checkpoint_best-4.safetensors").exists()


def test_a_run_that_begins_again_is_newer_than_what_it_replaces(
    tmp_path: Path, trained: Path
) -> None:
    shutil.copytree(trained, out := tmp_path / "out")
    assert train(out, "--overwrite", "--iters=2").exit_code == 0
    shutil.copy2(trained / NEWEST, out / NEWEST)  # as after a kill before its first one
    assert newest_checkpoint(out)[0].state.step == peek_step(out / BEST) == 2


def test_a_read_that_is_cut_short_loses_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b'{"step": 1}\n{"step": 2}\n'
    (path := tmp_path / "metrics.jsonl").write_bytes(content + b'{"st')
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, n, at: pread(file, (n + 1) // 2, at))
    LogFile(path, fresh=False).close()
    assert path.read_bytes() == content


READ_ONLY = """mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@" """


@pytest.mark.slow
def test_a_read_only_file_system_can_be_read_from_and_is_not_written_to(
    tmp_path: Path, trained: Path
) -> None:
    shutil.copytree(trained, out := tmp_path / "disk" / "out")
    command = ["unshare", "--mount", "sh", "-c", READ_ONLY, str(out.parent)]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], check=False).returncode:
        pytest.skip("this user cannot mount")
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def call(*words: str) -> tuple[int, str]:
        program = [*command, sys.executable, "-m", "mlx_randygpt", *words]
        done = subprocess.run(program, capture_output=True, text=True, env=environ, check=False)
        return done.returncode, done.stderr

    before = {path: path.read_bytes() for path in out.iterdir()}
    reading = ["info", str(out)], ["runs", str(out)], ["eval", "--checkpoint", str(out)]
    writing = ["train", "--resume", "--out", str(out)], ["plot", str(out), "-o", str(out / "x.svg")]
    for words in reading:
        assert call(*words)[0] == 0, words
    for words in writing:
        code, errors = call(*words)
        assert (code, errors.count("\n")) == (1, 1), errors
        assert "Read-only file system" in errors
    assert {path: path.read_bytes() for path in out.iterdir()} == before


# Links and foreign content


def test_another_name_of_a_checkpoint_keeps_its_content(tmp_path: Path, trained: Path) -> None:
    shutil.copytree(trained, out := tmp_path / "out")
    os.link(out / NEWEST, other := tmp_path / "other")
    content = other.read_bytes()
    assert train(out, "--resume", "--iters=6").exit_code == 0
    assert peek_step(out / NEWEST) == 6
    assert other.read_bytes() == content


VICTIM = "kept for years\n"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    (path := tmp_path / "victim").write_text(VICTIM)
    return path


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", [LOCK, *LOGS, "config.toml", ".checkpoint.safetensors.1.tmp"])
@pytest.mark.parametrize("fresh", [True, False])
def test_no_link_in_the_folder_leads_to_another_file(
    tmp_path: Path, trained: Path, victim: Path, name: str, link: Callable[..., None], fresh: bool
) -> None:
    out = tmp_path / "out"
    if fresh:
        out.mkdir()
    else:
        shutil.copytree(trained, out)
        (out / name).unlink(missing_ok=True)
    link(victim, out / name)
    done = train(out, *([] if fresh else ["--resume", "--iters=6"]))
    if name in LOGS and link is os.link and not fresh:
        assert victim.read_text().startswith(VICTIM)  # the log that it is by both its names
    else:
        assert victim.read_text() == VICTIM
    assert done.exit_code in (0, 1)
    assert "Traceback" not in done.output
    if done.exit_code:
        assert done.output.count("\n") == 1


@pytest.mark.parametrize("content", ["notes\n", "12 monkeys", "1" * 5000])
def test_a_lock_that_holds_more_than_a_number_is_not_emptied(tmp_path: Path, content: str) -> None:
    (out := tmp_path / "out").mkdir()
    (out / LOCK).write_text(content)
    done = train(out)
    assert done.exit_code == 1
    assert "not the number of a process" in done.output
    assert (out / LOCK).read_text() == content


@pytest.mark.parametrize("content", ["", "123\n", "123"])
def test_a_lock_of_a_dead_process_is_taken(tmp_path: Path, content: str) -> None:
    (out := tmp_path / "out").mkdir()
    (out / LOCK).write_text(content)
    with RunFolder(out):
        assert (out / LOCK).read_text() == f"{os.getpid()}\n"
    assert (out / LOCK).read_text() == ""


@pytest.mark.parametrize("name", [LOCK, *LOGS, NEWEST])
@pytest.mark.parametrize("resume", [True, False])
def test_a_pipe_is_refused_at_once(tmp_path: Path, trained: Path, name: str, resume: bool) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    (out / name).unlink(missing_ok=True)
    os.mkfifo(out / name)
    done = train(out, "--resume" if resume else "--overwrite", "--iters=6")
    assert done.exit_code in (0, 1)
    assert "Traceback" not in done.output


@pytest.mark.parametrize("command", [["sample", "--checkpoint"], ["info"], ["train", "--resume"]])
def test_a_pipe_is_no_checkpoint(tmp_path: Path, command: list[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    done = CliRunner().invoke(group, [*command, str(tmp_path / "pipe")])
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert "regular file" in done.output


# Logs on the disk


def test_a_flush_that_the_disk_refused_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = LogFile(tmp_path / "log", fresh=True)
    log.add({"a": 1})
    log.sync()
    log.add({"b": 2})

    def refuse(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(files, "flush", refuse)
        with pytest.raises(OSError, match="Input/output"):
            log.sync()
    written = list[bytes]()
    with monkeypatch.context() as patch:
        patch.setattr(type(log), "flush", lambda self: written.append(b"".join(self._waiting)))
        log.sync()
    assert written == [b'{"b": 2}\n']
    log.close()
    assert (tmp_path / "log").read_text() == '{"a": 1}\n{"b": 2}\n'


@pytest.mark.parametrize("torn", ["", "{", "x" * (3 << 20)])
@pytest.mark.parametrize("whole", ["", '{"a": 1}\n'])
def test_a_torn_line_of_any_length_is_removed(tmp_path: Path, whole: str, torn: str) -> None:
    (tmp_path / "log").write_text(whole + torn)
    LogFile(tmp_path / "log", fresh=False).close()
    assert (tmp_path / "log").read_text() == whole


def test_only_this_user_reads_the_samples(trained: Path) -> None:
    assert (trained / "samples.jsonl").stat().st_mode & 0o777 == 0o600
