"""Values that no option may accept, tried on every option of every command as click lists them:
nan and infinity as numbers, the empty path, and sizes of zero; and `~` and byte order marks.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from mlx_randygpt import files
from mlx_randygpt.checkpoint import NEWEST
from mlx_randygpt.cli import COMMANDS, group

TRAIN = "train --data=text.txt --preset=mini --backend=numpy --plain --iters=1"
BASES = {  # what a command needs before it looks at the option
    "train": TRAIN,
    "find-lr": "find-lr --data=text.txt --backend=numpy",
    "eval": f"eval --checkpoint=run/{NEWEST}",
    "data fetch": "data fetch text8",
    "import": "import exported --output=new",
    "plan": "plan --device=h100",
    "plot": "plot run",
    "export": "export --output=new",
    "sample": f"sample --checkpoint=run/{NEWEST} --backend=numpy --check",
    "serve": f"serve --checkpoint=run/{NEWEST} --backend=numpy --check",
    "chat": f"chat --checkpoint=run/{NEWEST} --backend=numpy",
    "inspect": f"inspect run/{NEWEST}",
    "launch": "launch -- train",
}
NEEDS = {"--lora-alpha": f"--init-from=run/{NEWEST} --lora-rank=2"}


def leaves() -> Iterator[tuple[str, click.Command]]:
    """Yield every command that can be run, with its words."""
    for name in COMMANDS:
        command = group.get_command(click.Context(group), name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from ((f"{name} {inner}", each) for inner, each in command.commands.items())
        else:
            yield name, command


PARAMS = [(words, param) for words, command in leaves() for param in command.params]
FLOATS = [
    (words, max(param.opts, key=len))
    for words, param in PARAMS
    if isinstance(param.type, click.types.FloatParamType)
]
PATHS = [(words, param) for words, param in PARAMS if isinstance(param.type, click.Path)]
READ = [(words, param) for words, param in PATHS if param.name not in ("output", "out")]


def call(*words: str, **environ: str) -> Result:
    return CliRunner().invoke(group, words, auto_envvar_prefix="MLXGPT", env=environ)


def words_with(command: str, param: click.Parameter, value: str) -> list[str]:
    """The words of a call that gives one parameter this value."""
    head, option = command.split(), f"{max(param.opts, key=len)}="
    rest = BASES.get(command, command).split()[len(head) :]
    if isinstance(param, click.Argument):
        return [*head, value, *(word for word in rest if word.startswith("-"))]
    return [*head, option + value, *(word for word in rest if not word.startswith(option))]


def refusal(result: Result) -> str:
    """The line that refuses; fail if the command went on."""
    assert result.exit_code in (1, 2), result.output
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("Error: "))
    assert "unexpected" not in line
    return line


@pytest.fixture(scope="module")
def run(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and a run of it."""
    folder = tmp_path_factory.mktemp("values")
    (folder / "text.txt").write_text(text)
    os.mkfifo(folder / "pipe")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = call(*TRAIN.split(), "--out=run")
        assert result.exit_code == 0, result.output
        assert call("export", f"run/{NEWEST}", "--output=exported").exit_code == 0
    return folder


@pytest.fixture(autouse=True)
def inside(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)


def test_the_walk_finds_options_of_every_kind() -> None:
    assert {"--lr", "--length-penalty", "--smooth", "--link", "--from"} <= {o for _, o in FLOATS}
    names = {(words, param.name) for words, param in PATHS}
    assert {("train", "data"), ("train", "resume"), ("data prepare", "tokenizer")} <= names
    assert {("info", "path"), ("plot", "runs"), ("launch", "hostfile"), ("eval", "config")} <= names
    words = {name for _, name in names} | {"PATH", "FILE", "DIR"}
    others = [param for _, param in PARAMS if not isinstance(param.type, click.Path)]
    assert not [p for p in others if {p.name, *(p.metavar or "").strip("[]").split()} & words]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(("command", "option"), FLOATS)
def test_no_number_is_nan_or_infinite(command: str, option: str, value: str) -> None:
    words = f"{BASES.get(command, command)} {NEEDS.get(option, '')} {option}={value}"
    line = refusal(call(*words.split()))
    assert value in line
    assert option in line or option.strip("-").replace("-", "_") in line


@pytest.mark.parametrize(("command", "param"), PATHS, ids=lambda x: getattr(x, "name", x))
def test_no_path_is_empty(command: str, param: click.Parameter) -> None:
    result = call(*words_with(command, param, ""))
    assert (result.exit_code, "'' is empty; give a path" in refusal(result)) == (2, True)


@pytest.mark.parametrize(("command", "param"), READ, ids=lambda x: getattr(x, "name", x))
def test_no_command_waits_for_ever_for_the_writer_of_a_pipe(
    command: str, param: click.Parameter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "WRITER_SECONDS", 0)
    signal.alarm(30)  # ends a read that waits
    try:
        line = refusal(call(*words_with(command, param, "pipe")))
    finally:
        signal.alarm(0)
    assert "pipe" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (TRAIN, "vocab_size=0 is too small"),
        ("find-lr --data=text.txt", "vocab_size=0 is too small"),
        ("data prepare --data=text.txt", "vocab_size=0 is too small"),
        ("data prepare --data=text.txt --tokenizer=bpe", "vocab_size=0 is too small"),
        ("data prepare --data=text.txt --tokenizer=t.json", "vocab_size=0 is too small"),
        (f"{TRAIN} --out=run --resume --iters=9", "vocab_size 0; its weights need"),
        (f"{TRAIN} --out=new --init-from=run/{NEWEST}", "vocab_size 0; its weights need"),
        ("plan", "0 is not in the range x>=1"),
    ],
)
def test_a_vocabulary_of_nothing_is_refused(words: str, message: str) -> None:
    assert message in refusal(call(*words.split(), "--vocab-size=0"))


@pytest.mark.parametrize("bias", ["a=nan", "a=inf", "a=-inf", "#1=nan"])
def test_a_bias_is_finite(bias: str) -> None:
    words = f"sample --checkpoint=run/{NEWEST} --backend=numpy --logit-bias={bias}"
    assert "is not in [-100, 100]" in refusal(call(*words.split()))


def test_a_width_of_one_is_refused_as_such() -> None:
    line = refusal(call(*TRAIN.split(), "--n-embd=1", "--n-head=1"))
    assert "n_embd=1 is too small; rotary positions turn pairs, so it must be at least 2" in line


def test_a_home_folder_is_meant_wherever_a_path_is_given(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(run))
    Path("home.toml").write_text('data = ["~/text.txt"]\nout = "~/by-file"\n', "utf-8-sig")
    words = ["train", "--preset=mini", "--backend=numpy", "--plain", "--iters=1"]
    for more, environ in (
        (["--config=~/home.toml"], {}),
        (["--data=~/text.txt", "--out=~/by-words"], {}),
        (["--data=~/text.txt"], {"MLXGPT_TRAIN_OUT": "~/by-variable"}),
    ):
        result = call(*words, *more, **environ)
        assert result.exit_code == 0, result.output
    for name in ("by-file", "by-words", "by-variable"):
        assert (run / name / NEWEST).is_file()
    assert not Path("~").exists()
    result = call(*words, "--iters=2", f"--resume=~/by-file/{NEWEST}")
    assert result.exit_code == 0, result.output


def test_a_path_in_a_file_without_a_meaning_is_one_line() -> None:
    Path("nul.toml").write_text('out = "a\\u0000b"')
    assert "holds a NUL character" in refusal(call(*TRAIN.split(), "--config=nul.toml"))


def test_the_home_of_nobody_does_not_exist() -> None:
    assert "does not exist" in refusal(call(*TRAIN.split(), "--config=~nobodyofthatname/a.toml"))


def test_a_text_that_is_gone_reads_as_a_sentence(run: Path) -> None:
    (run / "text.txt").rename(run / "texts.txt")
    try:
        line = refusal(call("train", "--resume", "--out=run", "--iters=9", "--backend=numpy"))
    finally:
        (run / "texts.txt").rename(run / "text.txt")
    assert line.endswith(f"is it {run.resolve() / 'texts.txt'}?); give it with --data")
