"""`mlxgpt train` as a person meets it: a clear line for each mistake, and settings that add up."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from mlx_randygpt.checkpoint import BEST, NEWEST, PREVIOUS, load_checkpoint
from mlx_randygpt.cli import group
from mlx_randygpt.cli.errors import Command

SMALL = ["--n-layer=1", "--n-head=2", "--n-embd=8", "--block-size=8", "--batch-size=4"]
MINE = ["--data", "text.txt", "--backend", "numpy"]


def call(*words: str, env: dict[str, str] | None = None) -> Result:
    """`mlxgpt train --plain WORDS`, in this process."""
    command = ["train", "--plain", *words]
    return CliRunner().invoke(group, command, auto_envvar_prefix="MLXGPT", env=env)


def trained(*words: str, env: dict[str, str] | None = None) -> Result:
    """A small run on text.txt that must succeed; options that are given twice: the last counts."""
    result = call(*MINE, *SMALL, "--iters=3", *words, env=env)
    assert result.exit_code == 0, result.output
    return result


def failed(result: Result, code: int = 1) -> str:
    """The only line of stderr that says what was wrong (click adds its usage to code 2)."""
    lines = result.stderr.splitlines()
    errors = [line for line in lines if line.startswith("Error: ")]
    assert result.exit_code == code, result.output
    assert len(errors) == 1
    assert code == 2 or lines == errors
    assert "Traceback" not in result.output
    assert "--debug shows where" not in errors[0]
    return errors[0].removeprefix("Error: ")


@pytest.fixture(autouse=True)
def folder(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with text.txt in it."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(text)
    return tmp_path


@pytest.fixture
def run() -> Iterator[Path]:
    """A finished run of three steps in ./checkpoints, whose files the test must not change."""
    trained()
    files = {path: path.read_bytes() for path in Path("checkpoints").glob("*.safetensors")}
    assert {path.name for path in files} - {PREVIOUS} == {NEWEST, BEST}
    yield Path("checkpoints")
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file: 'a.txt'"),
        (b"", "a.txt is empty"),
        (b"too short", "the text has 9 characters"),
        (b"text\0text" * 99, r"a.txt is binary, not text: a NUL byte at offset 4 \(line 1\)"),
        (b"line\ncaf\xe9 " * 99, r"a.txt is not UTF-8 text: byte 0xe9 at offset 8 \(line 2\)"),
        ("text".encode("utf-16"), "a.txt is UTF-16"),
    ],
)
def test_texts_that_cannot_be_trained_on(content: bytes | None, reason: str) -> None:
    if content is not None:
        Path("a.txt").write_bytes(content)
    message = failed(call("--data", "a.txt", "--backend", "numpy", *SMALL))
    assert re.match(reason, message)
    assert not list(Path("checkpoints").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--n-embd=9", "n_embd=9 is not divisible by n_head=2; try 1"),
        *[
            (f"--{name}=0", f"{name.replace('-', '_')}=0 is too small; it must be at least 1")
            for name in ("iters", "batch-size", "grad-accum", "log-every", "n-layer", "n-head")
        ],
        *[(f"--{name}=-7", f"{name.replace('-', '_')}=-7") for name in ("block-size", "n-embd")],
        *[(f"--{name}=-7", f"{name.replace('-', '_')}=-7") for name in ("eval-every", "warmup")],
        *[(f"--{name}=-7", f"{name}=-7") for name in ("seed", "threads", "patience")],
        ("--lr=0", "lr=0.0 trains nothing"),
        ("--lr=nan", "lr=nan is not a finite number"),
        ("--lr=-0.1", "lr=-0.1 is not a finite number of at least 0"),
        ("--min-lr=1", "min_lr=1.0 is above lr="),
        ("--dropout=1", "dropout=1.0 is not in [0, 1)"),
        ("--save-every=soon", "save_every='soon' is neither steps (1000) nor a time (60s, 5m)"),
        ("--block-size=1000", "a context of 1000 needs at least"),
        ("--dtype=bfloat16", "--dtype bfloat16 needs MLX"),
        ("--resume=nowhere.safetensors", "could not read nowhere.safetensors: No such file"),
        ("--resume=text.txt", "text.txt is not a checkpoint of mlxgpt"),
        ("--resume=.", "there is no checkpoint in .; leave --resume out"),
        ("--resume", "there is no checkpoint in checkpoints; leave --resume out"),
        ("--init-from=text.txt", "text.txt is not a checkpoint of mlxgpt"),
        ("--out=text.txt", "--out text.txt cannot be written: it is a file, not a folder"),
        ("--out=text.txt/sub", "--out text.txt/sub cannot be written: Not a directory"),
    ],
)
def test_settings_that_do_not_fit(option: str, reason: str) -> None:
    assert reason in failed(call(*MINE, *SMALL, option))
    assert not list(Path().rglob("*.safetensors"))


@pytest.mark.parametrize(
    "words",
    [
        ["--iters=ten"], ["--lr=fast"], ["--optimizer=sgd"], ["--preset=huge"], ["--backend=cuda"],
        ["--schedule=step"], ["--recipe=ancient"], ["--colour=red"], ["stray"],
        ["--resume", "--overwrite"], ["--resume", "--init-from=x"], ["--config=none.toml"],
    ],
)  # fmt: skip
def test_wrong_usage_is_code_2(words: list[str]) -> None:
    failed(call(*MINE, *SMALL, *words), code=2)
    assert not Path("checkpoints").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("iters = ", "not a TOML file"),
        ("colour = 1", "colour is not an option of `mlxgpt train`"),
        ('config = "x.toml"', "config is not an option"),
        ('iters = "ten"', "iters = 'ten': it should be int"),
        ("iters = true", "iters = True: it should be int"),
        ("iters = 2.5", "iters = 2.5: it should be int"),
        ("data = [1]", "it should be str"),
        ("[model]\nn_embd = 8", "model is not an option"),
    ],
)
def test_a_config_file_that_does_not_fit_is_code_2(content: str, reason: str) -> None:
    Path("c.toml").write_text(content)
    assert reason in failed(call(*MINE, "--config=c.toml"), code=2)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "already holds a checkpoint (checkpoint.safetensors); --resume continues that run"),
        (["--resume", "--n-embd=16"], "Checkpoint n_embd 8 != model n_embd 16"),
        (["--resume", "--preset=tiny"], "Checkpoint n_layer 1 != model n_layer 2"),
        (["--resume", "--recipe=classic"], "Checkpoint recipe modern != recipe classic"),
        (["--resume", "--optimizer=adamw"], "Checkpoint optimizer muon != optimizer adamw"),
        (["--resume", "--data=other.txt"], "Checkpoint vocab_size 49 != model vocab_size 10"),
        (["--resume", "--data=swapped.txt"], "the checkpoint's characters are not those"),
        (["--resume", "--data=none.txt"], "no such file: 'none.txt'"),
        (["--resume", "--lr=-1"], "lr=-1.0 is not a finite number"),
    ],
)
def test_a_run_is_never_lost_to_another(
    words: list[str], reason: str, run: Path, text: str
) -> None:
    Path("other.txt").write_text("abcdefg" * 99)
    Path("swapped.txt").write_text(text.replace("z", "ž"))
    size = load_checkpoint(run / NEWEST).model.vocab_size
    data = [] if any(word.startswith("--data") for word in words) else MINE[:2]
    sizes = SMALL if not words else []
    message = failed(call("--backend=numpy", *data, *sizes, "--iters=9", *words))
    assert reason.replace("49", str(size)) in message


def test_a_bare_resume_takes_the_newest_valid_and_says_what_it_skipped() -> None:
    trained("--save-every=1", "--eval-every=2")
    newest = Path("checkpoints") / NEWEST
    newest.write_bytes(newest.read_bytes()[:-9])
    result = call("--resume", "--iters=5")
    assert result.exit_code == 0
    assert (
        f"Skipped: {newest} is not a checkpoint of mlxgpt, or is truncated or damaged"
        in result.stdout
    )
    assert load_checkpoint(newest).state.step == 5


def test_where_no_checkpoint_is_valid_none_is_written_over() -> None:
    trained()
    files = list(Path("checkpoints").glob("*.safetensors"))
    for path in files:
        path.write_bytes(path.read_bytes()[:-9])
    before = [path.read_bytes() for path in files]
    message = failed(call("--resume", "--iters=5"))
    assert message.startswith("no checkpoint in checkpoints can be read: ")
    assert [path.read_bytes() for path in files] == before


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
@pytest.mark.parametrize("words", [["--resume=PATH"], ["--overwrite", "--init-from=PATH"]])
def test_a_damaged_checkpoint_stops_the_run_and_stays(damage: str, words: list[str]) -> None:
    trained()
    path = Path("checkpoints") / NEWEST
    content = bytearray(path.read_bytes())
    content[-99] ^= 4
    path.write_bytes(content[:-9] if damage == "truncated" else content)
    before = path.read_bytes()
    words = [word.replace("PATH", str(path)) for word in words]
    assert str(path) in failed(call(*MINE, "--iters=9", *words))
    assert path.read_bytes() == before


def test_a_folder_in_use_is_left_alone(run: Path) -> None:
    with open(run / ".lock", "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4321\n")
        lock.flush()
        message = failed(call(*MINE, "--resume", "--iters=9"))
    assert "checkpoints is in use by another run (process 4321)" in message
    assert load_checkpoint(run / NEWEST).state.step == 3


def test_a_library_that_is_not_there_is_no_silent_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_randygpt.backends.mlx_device", lambda: (None, "MLX is not installed"))
    message = failed(call("--data", "text.txt", "--backend", "mlx", *SMALL))
    assert message == "MLX cannot run here: MLX is not installed; --backend numpy can"
    assert "(MLX is not installed)" in trained("--backend", "auto").stdout


def test_a_full_disk_is_told_and_costs_the_exit_code(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mlx_randygpt.files.flush", refuse)
    result = call(*MINE, "--resume", "--iters=5")
    assert "the last state is not on the disk: could not write" in failed(result)
    assert "✗ Could not save checkpoints/checkpoint.safetensors: " in result.stdout
    assert "No space left on device" in result.stdout
    assert not list(run.glob(".*.tmp"))


def test_a_run_that_diverges_says_so_in_one_line() -> None:
    command = [sys.executable, "-m", "mlx_randygpt", "train", *MINE, *SMALL, "--recipe=classic"]
    command += ["--lr=1e30", "--warmup=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert "--lr" in done.stderr
    assert load_checkpoint(Path("checkpoints") / NEWEST).state.step == 0


def test_a_target_that_is_reached_is_no_mistake(run: Path) -> None:
    for target in ("3", "2"):
        result = call(*MINE, "--resume", f"--iters={target}")
        assert result.exit_code == 0
        line = f"Already at iteration 3 (target {target}). Nothing to train.\n"
        assert (result.stdout, result.stderr) == (line, "")


def test_a_target_that_is_reached_is_told_with_what_was_damaged() -> None:
    trained()
    best = Path("checkpoints") / BEST
    best.write_bytes(b"")
    result = call(*MINE, "--resume", "--iters=3")
    skipped, reached = result.stdout.splitlines()
    assert skipped.startswith(f"Skipped: {best} ")
    assert reached.startswith("Already at iteration 3")


def test_overwrite_starts_anew_and_resume_goes_on() -> None:
    trained()
    first = load_checkpoint(Path("checkpoints") / NEWEST)
    trained("--overwrite", "--seed=7")
    assert load_checkpoint(Path("checkpoints") / NEWEST).train.seed == 7
    trained("--overwrite")
    again = load_checkpoint(Path("checkpoints") / NEWEST)
    np.testing.assert_equal(asdict(again.state), asdict(first.state))
    assert call("--resume", "--iters=5").exit_code == 0  # text and sizes are those of the run
    assert load_checkpoint(Path("checkpoints") / NEWEST).state.step == 5


def test_init_from_begins_at_zero_with_the_others_weights(run: Path) -> None:
    trained("--out=tuned", f"--init-from={run / NEWEST}", "--iters=1", "--lr=1e-30")
    base, tuned = load_checkpoint(run / NEWEST), load_checkpoint(Path("tuned") / NEWEST)
    assert (tuned.state.step, base.state.step) == (1, 3)
    assert tuned.tokenizer == base.tokenizer
    for name, w in base.state.params.items():
        np.testing.assert_allclose(tuned.state.params[name], w, rtol=1e-6)


# Settings


def settings(out: str = "checkpoints") -> dict[str, Any]:
    return tomllib.loads((Path(out) / "config.toml").read_text())


def test_precedence_is_command_line_environment_config_recipe() -> None:
    Path("c.toml").write_text("lr = 0.03\niters = 5\neval-every = 2\n")
    env = {"MLXGPT_TRAIN_ITERS": "4", "MLXGPT_TRAIN_LR": "0.02"}
    result = call(*MINE, *SMALL, "--config=c.toml", "--lr=0.01", env=env)
    assert result.exit_code == 0, result.output
    found = settings()
    assert (found["lr"], found["iters"], found["eval_every"]) == (0.01, 4, 2)
    assert (found["schedule"], found["optimizer"], found["save_every"]) == ("linear", "muon", "60s")


def test_on_resume_the_checkpoint_comes_between_config_and_recipe() -> None:
    trained("--lr=0.01", "--eval-every=7", "--patience=9")
    Path("c.toml").write_text("patience = 8\nlog_every = 2\n")
    env = {"MLXGPT_TRAIN_ITERS": "4", "MLXGPT_TRAIN_LOG_EVERY": "3"}
    result = call("--resume", "--config=c.toml", "--save-every=9", env=env)
    assert result.exit_code == 0, result.output
    found = load_checkpoint(Path("checkpoints") / NEWEST).train
    assert (found.lr, found.eval_every, found.patience, found.log_every, found.save_every) == (
        0.01, 7, 8, 3, "9",
    )  # fmt: skip


def test_a_preset_gives_sizes_and_options_override_them() -> None:
    result = call(*MINE, "--preset=mini", "--n-embd=16", "--iters=1", "--recipe=classic")
    assert result.exit_code == 0, result.output
    model = load_checkpoint(Path("checkpoints") / NEWEST).model
    sizes = (model.n_layer, model.n_head, model.n_embd, model.block_size, model.position)
    assert sizes == (1, 4, 16, 8, "learned")


def test_another_optimizer_brings_its_own_rates() -> None:
    trained("--optimizer=adamw")
    found = load_checkpoint(Path("checkpoints") / NEWEST).train
    assert (found.lr, found.weight_decay, found.beta2) == (3e-3, 0.1, 0.99)


@pytest.mark.parametrize("prompt", ["the", 'a "quoted"\nline\t\\', "naïve 🐉", "\x7f"])
def test_config_toml_repeats_the_run(prompt: str) -> None:
    trained("--save-every=5m", "--dropout=0.1", f"--prompt={prompt}", "--seed=3", "--out=first")
    assert settings("first")["prompt"] == prompt
    result = call("--config=first/config.toml", "--out=second")
    assert result.exit_code == 0, result.output
    one, two = (load_checkpoint(Path(out) / NEWEST) for out in ("first", "second"))
    np.testing.assert_equal(asdict(one.state), asdict(two.state))
    assert (one.train, one.model) == (two.train, two.model)


def test_metrics_are_one_object_a_line() -> None:
    trained("--eval-every=2")
    rows = [json.loads(line) for line in Path("checkpoints/metrics.jsonl").read_text().splitlines()]
    both = {"step", "bits_per_byte", "seconds"}
    step = both | {"loss", "lr", "grad_norm", "tokens", "tokens_per_second"}
    evaluation = both | {"val_loss", "perplexity"}
    assert [(set(row), row["step"]) for row in rows] == [
        (evaluation, 0), (step, 1), (step, 2), (evaluation, 2), (step, 3), (evaluation, 3),
    ]  # fmt: skip
    assert [row["tokens"] for row in rows if "tokens" in row] == [32, 64, 96]


def test_metrics_go_on_after_a_resume_and_begin_anew_after_overwrite() -> None:
    def steps() -> list[int]:
        lines = Path("checkpoints/metrics.jsonl").read_text().splitlines()
        return [row["step"] for row in map(json.loads, lines) if "loss" in row]

    trained("--log-every=2", "--iters=4")
    assert steps() == [2, 4]
    call("--resume", "--iters=8")
    assert steps() == [2, 4, 6, 8]
    trained("--overwrite")
    assert steps() == [1, 2, 3]


def test_the_text_is_found_when_nobody_names_it(text: str) -> None:
    Path("train.txt").write_text(text)
    result = call("--backend=numpy", *SMALL, "--iters=1")
    assert result.exit_code == 0, result.output
    assert result.stderr == "Text: train.txt\n"


def test_piped_output_is_plain_and_tells_how_to_go_on() -> None:
    result = trained("--eval-every=2")
    assert "\x1b" not in result.stdout
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    for start in ("eval 0 | val loss", "step 3/3 | loss", "eval 3 |", "sample 3", "Let it write: "):
        assert any(line.startswith(start) for line in lines), start
    assert f"✓ Saved checkpoints/{NEWEST} (iter 3)" in lines
    assert any(line.startswith(f"✓ Saved checkpoints/{BEST} (best loss ") for line in lines)


def test_an_extended_trapezoid_ends_as_a_longer_one() -> None:
    trapezoid = ["--schedule=trapezoid", "--dropout=0.2", "--warmup=5"]
    trained(*trapezoid, "--iters=40", "--out=straight")
    trained(*trapezoid, "--iters=20", "--out=extended")
    assert load_checkpoint(Path("extended/checkpoint-12.safetensors")).state.step == 12
    result = call("--resume", "--backend=numpy", "--iters=40", "--out=extended")
    assert "going on from step 12, where the decay had not begun" in result.stdout
    ends = [load_checkpoint(Path(run, NEWEST)).state for run in ("straight", "extended")]
    np.testing.assert_equal(ends[0].params, ends[1].params)
    np.testing.assert_equal(ends[0].moments, ends[1].moments)


def test_a_trapezoid_without_its_kept_checkpoint_says_what_it_does() -> None:
    trained("--schedule=trapezoid", "--iters=20", "--warmup=5")
    Path("checkpoints/checkpoint-12.safetensors").unlink()
    result = call("--resume", "--iters=40")
    assert result.exit_code == 0
    assert "no checkpoint from before the decay was kept: the rate goes back up" in result.stdout


def test_output_that_goes_away_stops_the_run_and_saves_it() -> None:
    command = [sys.executable, "-m", "mlx_randygpt", "train", *MINE, *SMALL, "--plain"]
    command += ["--iters=100000", "--eval-every=0", "--sample-every=0", "--save-every=1h"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith(b"step "):
            pass
        process.stdout.close()  # as `| head` does
        assert process.wait(60) == 1
    assert load_checkpoint(Path("checkpoints") / NEWEST).state.step > 1


def test_a_terminal_without_the_letters_is_no_reason_to_stop() -> None:
    command = [sys.executable, "-m", "mlx_randygpt", "train", *MINE, *SMALL, "--iters=3"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=True
    )
    assert b"? Saved checkpoints/checkpoint.safetensors (iter 3)" in done.stdout


def test_a_branch_goes_on_and_the_better_model_is_kept() -> None:
    trained("--iters=40", "--keep-every=10", "--eval-every=5")
    best = load_checkpoint(Path("checkpoints") / BEST)
    result = call("--resume=checkpoints/checkpoint-10.safetensors", "--iters=20")
    assert f"it is kept as checkpoints/checkpoint_best-{best.state.step}" in result.stdout
    kept = load_checkpoint(Path(f"checkpoints/checkpoint_best-{best.state.step}.safetensors"))
    assert kept.progress.best_loss == best.progress.best_loss
    assert call("--resume", "--iters=25").exit_code == 0
    assert load_checkpoint(Path("checkpoints") / NEWEST).state.step == 25


def test_samples_are_kept_with_their_steps_over_a_resume() -> None:
    def samples() -> list[Any]:
        lines = Path("checkpoints/samples.jsonl").read_text().splitlines()
        return [(row["step"], row["prompt"], bool(row["text"])) for row in map(json.loads, lines)]

    trained("--sample-every=2", "--iters=4", "--prompt=The")
    assert samples() == [(2, "The", True), (4, "The", True)]
    with open("checkpoints/samples.jsonl", "a") as file:
        file.write('{"step": 5, "pro' + "x" * 9000)
    call("--resume", "--iters=6", "--sample-every=2")
    assert [step for step, _, _ in samples()] == [2, 4, 6]
    trained("--overwrite", "--iters=3")
    assert [step for step, _, _ in samples()] == [3]


def test_a_torn_line_of_metrics_is_cut_off_on_resume() -> None:
    trained()
    metrics = Path("checkpoints/metrics.jsonl")
    metrics.write_text(metrics.read_text() + '{"step": 3, "lo')
    call("--resume", "--iters=5")
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps[-2:] == [5, 5]


def test_resuming_a_file_goes_on_in_its_folder() -> None:
    trained("--out=runs/a")
    assert call("--resume=runs/a/checkpoint.safetensors", "--iters=5").exit_code == 0
    assert load_checkpoint(Path("runs/a") / NEWEST).state.step == 5
    assert not Path("checkpoints").exists()


@pytest.mark.parametrize(
    "says",
    [
        "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed "
        "buffer size of 8 bytes.",
        "[METAL] Command buffer execution failed: Insufficient Memory "
        "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).",
        "cudaMallocAsync(&data, size, stream) failed: out of memory",
        "[malloc] Unable to allocate 99 bytes.",
    ],
)
def test_a_device_without_room_is_one_line(says: str) -> None:
    """MLX has no type of its own for it."""

    @click.command(cls=Command)
    def full() -> None:
        raise RuntimeError(says)

    done = CliRunner().invoke(full)
    assert done.exit_code == 1
    assert done.output.startswith(f"Error: out of memory ({says}); try a smaller --batch-size")


def test_documents_of_a_text_with_a_weight_that_are_too_short_are_reported() -> None:
    rows = ({"text": "short" if i % 2 else f"a document of some length {i}"} for i in range(20))
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ("--data=rows.jsonl:0.3", *MINE, *SMALL, "--iters=1", "--respect-documents")
    assert "10 of 21 documents are left out" in call(*words).stdout


def test_half_characters_are_reported_and_not_said_to_fit(folder: Path) -> None:
    (folder / "half.jsonl").write_text(json.dumps({"text": "some text \ud83d " * 50}))
    out = call("--data=half.jsonl", "--backend=numpy", *SMALL, "--iters=1").stdout
    assert "50 characters are not in the vocabulary and were dropped" in out
    assert "loses none" not in out
