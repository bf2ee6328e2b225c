"""Real commands on a disk without space, or killed while they write: the older file survives."""

from __future__ import annotations

import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_randygpt import files
from mlx_randygpt.checkpoint import NEWEST
from mlx_randygpt.cli import group

PROGRAM = [sys.executable, "-m", "mlx_randygpt"]
SIZES = ["--n-layer=1", "--n-head=1", "--n-embd=8", "--block-size=8", "--batch-size=2"]
ROOM = 64  # bytes that a file can have on the full disk; every output here is longer
COMMANDS = {  # what it writes: its words
    "picture.svg": ["plot", "out", "-o", "picture.svg"],
    "picture.html": ["plot", "out", "-o", "picture.html"],
    "page.html": ["inspect", "out", "-o", "page.html", "--data", "text"],
    "exported/README.md": ["export", "out", "-o", "exported", "--overwrite"],
    "model.safetensors": ["import", "hf", "-o", "model.safetensors", "--overwrite"],
    "talk.json": ["chat", "--checkpoint", "out", "--backend=numpy", "--max-tokens=400"],
    "cache": ["data", "prepare", "--data", "long"],
}
KILLED = ["model.safetensors", "exported/README.md", "picture.svg", "cache"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, an export of it, and texts."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text").write_text("to be or not to be\n" * 100)
    (folder / "long").write_text("to be or not to be, that is it\n" * 600_000)  # 19 MB: cached
    words = ["train", "--plain", "--backend=numpy", "--iters=4", "--eval-every=2", *SIZES]
    words += ["--data", str(folder / "text"), "--out", str(folder / "out")]
    assert CliRunner().invoke(group, words).exit_code == 0
    words = ["export", str(folder / "out"), "-o", str(folder / "hf")]
    assert CliRunner().invoke(group, words).exit_code == 0
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A folder of its own, with older outputs."""
    for name in ("text", "long", "out", "hf"):
        (tmp_path / name).symlink_to(made / name)
    (tmp_path / "exported").mkdir()
    for name in COMMANDS:
        if name != "cache":
            (tmp_path / name).write_text("older")
    return tmp_path


def fill_disk() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))


def start(place: Path, name: str, **options: object) -> subprocess.Popen[str]:
    """Start the command that writes the file `name`."""
    pipe = subprocess.PIPE
    environ = os.environ | {"MLXGPT_CACHE": str(place / "cache"), "MLXGPT_TEST_FOLDER": str(place)}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(place), *sys.path]))
    words = [*PROGRAM, *COMMANDS[name]]
    popen = functools.partial(subprocess.Popen, text=True, cwd=place, env=environ)
    return popen(words, stdin=pipe, stdout=pipe, stderr=pipe, **options)  # type: ignore[call-overload,no-any-return]


def contents(place: Path) -> dict[str, bytes]:
    """Return the files of the folder itself; those of the run are only linked to."""
    files = (path for path in place.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(place)): path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_spares_the_older_file(place: Path, name: str) -> None:
    before = contents(place)
    process = start(place, name, preexec_fn=fill_disk)
    _, errors = process.communicate("to be\n/save talk.json\n" if name == "talk.json" else "")
    reasons = [line for line in errors.splitlines() if "File too large" in line]
    assert len(reasons) == 1, errors
    assert "Traceback" not in errors
    assert "unexpected" not in errors
    assert process.returncode == (0 if name == "talk.json" else 1), errors  # a chat goes on
    assert contents(place) == before


STOP = """
import os
from pathlib import Path
from mlx_randygpt import files
def stop(path):  # the content is there, its name is not
    print("stopped", flush=True)
    os.read(0, 1)
files.flush = stop
files._flush_path = stop
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_the_next_command_sweeps_what_a_killed_one_left_and_spares_the_living(
    place: Path, name: str
) -> None:
    before = contents(place)
    (place / "sitecustomize.py").write_text(STOP)
    writers = [start(place, name) for _ in range(2)]
    for writer in writers:
        assert writer.stdout
        assert writer.stdout.readline() == "stopped\n"
    (place / "sitecustomize.py").unlink()
    killed, living = writers
    killed.kill()
    killed.communicate()
    assert len(temporary_files(place)) == 2
    third = start(place, name)
    _, errors = third.communicate("")
    assert third.returncode == 0, errors
    assert len(temporary_files(place)) == 1
    living.kill()
    living.communicate()
    for cached in place.glob("cache/[!.]*"):
        cached.unlink()  # or there would be nothing to write
    last = start(place, name)
    _, errors = last.communicate("")
    assert last.returncode == 0, errors
    assert temporary_files(place) == []
    assert contents(place) != before


def temporary_files(place: Path) -> list[Path]:
    return sorted(place.rglob(".*.tmp"))


@pytest.mark.slow
def test_a_writer_in_another_pid_namespace_is_spared(tmp_path: Path) -> None:
    """There the number of a process says nothing about it; its lock does."""
    unshare = ["unshare", "--fork", "--pid", "--kill-child"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("this user cannot make a pid namespace")
    code = (
        "import sys\nfrom pathlib import Path\nfrom mlx_randygpt import files\n"
        "with files.replace(Path(sys.argv[1])) as file:\n"
        "    print('open', flush=True)\n    sys.stdin.read()\n"
    )
    command = [*unshare, sys.executable, "-c", code, str(tmp_path / NEWEST)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as writer:
        assert writer.stdout
        writer.stdout.readline()
        files.sweep(tmp_path)
        assert len(temporary_files(tmp_path)) == 1
        writer.communicate()
    assert os.listdir(tmp_path) == [NEWEST]
