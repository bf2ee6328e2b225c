"""`presets`, `info`, `bench` and `doctor` as a script sees them: output, JSON and exit codes."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mlx_randygpt import settings
from mlx_randygpt.checkpoint import BEST, NEWEST, load_checkpoint, save_checkpoint
from mlx_randygpt.cli import group
from mlx_randygpt.cli.commands.doctor import lines
from mlx_randygpt.cli.commands.presets import PURPOSES
from mlx_randygpt.cli.loading import default_checkpoint
from mlx_randygpt.model import flops_per_token, initial_params
from mlx_randygpt.planning.bench import N_WARMUP, measure_sampling, measure_training
from mlx_randygpt.planning.machine import CHECKS, advice, collect
from mlx_randygpt.planning.plan import Rate
from mlx_randygpt.planning.speed import Speed, estimate, measure
from mlx_randygpt.recipes import PRESETS
from mlx_randygpt.state import TrainState

TEXT = "To be, or not to be,\nthat is the question. \x1b[31m" * 80


def call(*words: str, **environ: str) -> Result:
    return CliRunner().invoke(group, words, auto_envvar_prefix="MLXGPT", env=environ)


def answer(*words: str) -> dict[str, Any]:
    """The one JSON object on stdout."""
    result = call(*words, "--json")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(TEXT)
    words = ["--data", str(folder / "text.txt"), "--out", str(folder / "checkpoints"), "--plain"]
    result = call("train", *words, "--preset", "mini", "--iters", "3", "--backend", "numpy")
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "checkpoint.safetensors"


# presets


def test_classic_counts_are_those_of_the_seeds() -> None:
    rows = {row["name"]: row for row in answer("presets", "--recipe", "classic")["presets"]}
    known = {"mini": 16_832, "small4": 811_776, "small": 1_204_992, "large": 37_948_416}
    assert {name: rows[name]["parameters"] for name in known} == known
    assert rows["small"]["training_bytes"] == 16 * 1_204_992
    assert list(rows) == list(PRESETS)


@pytest.mark.parametrize("recipe", ["classic", "modern"])
def test_piped_presets_are_plain_and_fit_80_columns(recipe: str) -> None:
    result = call("presets", "--recipe", recipe, COLUMNS="40", FORCE_COLOR="1")
    table = result.stdout.splitlines()[: len(PRESETS) + 1]
    assert [row.split()[0] for row in table] == ["Preset", *PRESETS]
    assert max(map(len, table)) <= 80
    assert "\x1b" not in result.stdout
    assert "…" not in result.stdout


def test_checkpoint_size_is_that_of_a_checkpoint(checkpoint: Path) -> None:
    row = answer("presets")["presets"][0]
    file = answer("info", str(checkpoint))
    vocabulary = 4 * 3 * 2 * 32 * (67 - file["vocab_size"])  # bytes by which wte and head differ
    header = file["file_bytes"] - (row["checkpoint_bytes"] - vocabulary)
    assert 0 < header < 8192


def test_presets_name_the_text_that_suits_them_and_a_purpose() -> None:
    rows = {row["name"]: row for row in answer("presets")["presets"]}
    assert PURPOSES.keys() == PRESETS.keys()
    assert rows["small"]["text_bytes"] == {"least": 100e3, "good": 500e3, "most": 2e6}
    assert rows["small"]["purpose"] == "a book; the default"
    shown = call("presets").stdout
    assert re.search(r"^small +100 kB to 2 MB .*a book; the default$", shown, re.MULTILINE)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder of caches."""
    monkeypatch.setenv("MLXGPT_CACHE", str(tmp_path))
    return tmp_path


def test_presets_know_their_minutes_once_doctor_has_measured(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = answer("presets")
    assert before["measured"] is None
    assert {row["minutes"] for row in before["presets"]} == {None}
    assert "1,000 steps: not measured yet; mlxgpt doctor does." in call("presets").stdout
    seconds = dict.fromkeys(PRESETS, 0.18)
    found = Speed("numpy", "2 threads", "2026-01-05", seconds)
    monkeypatch.setattr("mlx_randygpt.planning.speed.measure", lambda backend: found)
    doctor = answer("doctor")
    assert (doctor["speed"]["step_seconds"], doctor["problems"]) == (seconds, {})
    after = answer("presets")
    assert after["measured"] == {"backend": "numpy", "device": "2 threads", "date": "2026-01-05"}
    assert {row["minutes"] for row in after["presets"]} == {3.0}
    shown = call("presets").stdout
    assert re.search(r"^small .* 3.0 minutes +a book; the default$", shown, re.MULTILINE)
    assert "those of mlxgpt doctor, 2026-01-05, NumPy on 2 threads." in shown
    assert {row["minutes"] for row in answer("presets", "--recipe=classic")["presets"]} == {None}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"step_seconds": 1}'])
def test_a_damaged_measurement_counts_as_none(cache: Path, content: str) -> None:
    (cache / "speed.json").write_text(content)
    assert answer("presets")["measured"] is None


def test_a_step_is_scaled_from_the_measured_width_that_is_nearest() -> None:
    """A width of 128: 1 s, and 0.5 s a layer, for 64 sequences of 64 tokens each."""
    rates = {"small": Rate((1.0, 0.5, 0.0, 0.0), 128, 1.0, ()), "mini": Rate((9,) * 4, 32, 1.0, ())}
    assert estimate("small", rates) == 4.0
    assert estimate("small4", rates) == 3.0
    wide = estimate("flux-large", rates)
    model = lambda name: settings.resolve_new({"preset": name}, 67)[0]  # noqa: E731
    ratio = flops_per_token(model("flux-large")) / flops_per_token(model("small"))
    assert wide == pytest.approx(4.0 * ratio)


def test_short_steps_give_a_time_for_every_preset() -> None:
    """With a clock that is wound by hand: a second for every step."""
    speed = measure("numpy", count(0.0, 0.5).__next__)
    assert speed.step_seconds.keys() == PRESETS.keys()
    assert all(seconds > 0 for seconds in speed.step_seconds.values())
    assert speed.step_seconds["small"] < speed.step_seconds["medium"] < speed.step_seconds["large"]


# info


def test_info_tells_what_the_run_was(checkpoint: Path) -> None:
    found = answer("info", str(checkpoint))
    assert (found["step"], found["train"]["iters"], found["val_step"]) == (3, 3, 3)
    assert found["tokens"] == 3 * 64 * 8
    assert found["best_loss"] <= found["val_loss"]
    assert found["vocab_size"] == len(found["tokenizer"]["chars"]) + 3 == len(set(TEXT)) + 3
    assert found["data"]["characters"] == len(TEXT)
    assert (found["backend"], found["checksum_ok"]) == ("numpy", True)
    assert found["file_bytes"] == checkpoint.stat().st_size


def test_info_shows_a_vocabulary_without_control_characters(checkpoint: Path) -> None:
    result = call("info", str(checkpoint))
    assert result.exit_code == 0
    assert r"'\n\x1b ,.13T[ab" in result.stdout
    assert "\x1b" not in result.stdout


def test_info_takes_the_best_checkpoint_first(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    assert answer("info")["path"] == "checkpoints/checkpoint_best.safetensors"


def test_info_of_nothing_fails_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("info")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "mlxgpt train" in result.stderr


@pytest.mark.parametrize("at", [-1, 4000, 9])
def test_info_of_a_flipped_bit_fails_with_one_line(
    checkpoint: Path, tmp_path: Path, at: int
) -> None:
    content = bytearray(checkpoint.read_bytes())
    content[at] ^= 1
    (tmp_path / "damaged").write_bytes(content)
    result = call("info", str(tmp_path / "damaged"), "--json")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "damaged" in result.stderr


# bench


@pytest.mark.parametrize("mode", ["train", "sample"])
@pytest.mark.parametrize("recipe", ["classic", "modern"])
def test_bench_gives_positive_numbers(mode: str, recipe: str) -> None:
    size = ["--preset", "mini", "--recipe", recipe, "--batch-size", "3", "--iters", "12"]
    found = answer("bench", mode, *size, "--backend", "numpy", "--threads", "1")
    numbers = ("tokens_per_second", "step_ms", "peak_memory_mb", "parameters", "flops_fraction")
    assert all(found[name] > 0 for name in numbers)
    per_step = 3 * 8 if mode == "train" else 3
    assert found["tokens_per_second"] == pytest.approx(1e3 * per_step / found["step_ms"])
    assert (found["backend"], found["device"], found["mode"]) == ("numpy", "1 thread", mode)
    assert (found["recipe"], found["preset"], found["block_size"]) == (recipe, "mini", 8)


def test_bench_sample_is_warm_and_says_how_it_decodes() -> None:
    found = answer("bench", "sample", "--preset", "mini", "--iters", "2", "--backend", "numpy")
    compiled = importlib.util.find_spec("numba") is not None
    assert found["decoding"] == ("compiled by numba" if compiled else "NumPy without numba")
    assert "Decoding" in call("bench", "sample", "--preset", "mini", "--iters", "2").stdout


def test_bench_sweeps_over_the_numbers_of_streams() -> None:
    size = ["--preset", "mini", "--iters", "2", "--backend", "numpy", "--streams", "5"]
    found = answer("bench", "sample", *size)
    assert [each["batch_size"] for each in found["sweep"]] == [1, 2, 4, 5]
    assert {**found, "sweep": 0} == {**found["sweep"][-1], "sweep": 0}
    lines = call("bench", "sample", *size).stdout.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["1", "2", "4", "5"]


@pytest.mark.parametrize("wrong", [["train"], ["sample", "--batch-size", "2"]])
def test_a_sweep_is_for_sampling_alone(wrong: list[str]) -> None:
    result = call("bench", *wrong, "--streams", "2")
    assert result.exit_code == 2
    assert "--streams is for `bench sample`, without --batch-size" in result.stderr


def test_bench_refuses_no_steps_with_one_line() -> None:
    result = call("bench", "--preset", "mini", "--iters", "0")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "iters=0" in result.stderr


@pytest.mark.parametrize("measure", [measure_training, measure_sampling])
def test_the_median_leaves_out_warmup_and_outliers(measure: Any) -> None:
    from mlx_randygpt.backends import make_backend

    model, train = settings.resolve_new({"preset": "mini", "batch_size": 2}, 67)
    state = TrainState(0, initial_params(model, train.seed), {})
    backend = make_backend("numpy", model, train, state)
    steps = [9.0] * N_WARMUP + [0.5, 7.0, 0.5]
    times = iter([time for seconds in steps for time in (0.0, seconds)])
    assert measure(backend, model, train, 3, lambda: next(times)).step_ms == 500.0


# doctor


def test_doctor_describes_this_machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = answer("doctor")
    assert found["speed"]["step_seconds"].keys() == PRESETS.keys()
    monkeypatch.setitem(CHECKS, "speed", lambda: found["speed"])
    assert found["problems"] == {}
    assert found["packages"]["numpy"]
    assert found["cores_present"] >= found["cores"] > 0
    assert found["numpy_gflops"] > 0
    assert found["kernels"].keys() in ({"absent"}, {"tested"})
    assert call("doctor").exit_code == 0


def test_doctor_shows_the_kernels_and_both_times() -> None:
    def kernel_lines(**kernels: Any) -> list[str]:
        facts = collect(dict.fromkeys(CHECKS, lambda: None)) | {"kernels": kernels}
        return [value for name, value in lines(facts) if name == "Kernels"]

    slow = {"kernel": "attention", "problem": "it is slower, 2.000 ms instead of 1.500"}
    fast = {"kernel": "norm + token shift", "problem": "", "seconds": 0.001, "plain_seconds": 0.003}
    assert kernel_lines(tested=[fast, slow]) == [
        "norm + token shift: on, 1.000 ms instead of 3.000",
        "attention: off, it is slower, 2.000 ms instead of 1.500",
    ]
    assert kernel_lines(absent="MLX has no Metal GPU here") == ["none: MLX has no Metal GPU here"]


def test_doctor_survives_checks_that_fail() -> None:
    def broken() -> None:
        raise OSError("no such device")

    found = collect(dict.fromkeys(CHECKS, broken))
    assert found["problems"].keys() == CHECKS.keys()
    assert advice(found) == []
    assert ("Failed", "cpu: OSError: no such device") in list(lines(found))


MACHINE: dict[str, Any] = {
    "packages": {"mlx": None}, "system": "Linux", "machine": "x86_64", "cores": 8,
    "cores_present": 8, "blas": [{"name": "openblas"}], "numpy_gflops": 240.0,
    "mlx": {"device": None, "absent": "MLX is not installed"}, "mlx_gflops": None,
    "nvidia_smi": None, "environment": {}, "macos": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"system": "Darwin", "machine": "arm64"}, "pip install mlx"),
        ({"mlx": {"device": "CPU", "has_gpu": False}, "mlx_gflops": 8.0}, "libopenblas"),
        ({"nvidia_smi": "/usr/bin/nvidia-smi"}, "cuda13"),
        (
            {"packages": {"mlx": "0.32.4"}, "mlx": {"absent": "MLX lacks its library"}},
            "its library.",
        ),
        ({"blas": [{"name": "blas"}]}, "no optimised BLAS"),
        ({"environment": {"OMP_NUM_THREADS": "1"}}, "--threads"),
        ({"cores": 2}, "2 of 8 cores"),
        ({"packages": {"mlx": None, "numba": None}}, "pip install numba"),
    ],
)
def test_doctor_says_what_to_change_where_it_applies(changes: dict[str, Any], word: str) -> None:
    assert advice(MACHINE) == []
    (line,) = advice(MACHINE | changes)
    assert word in line


def test_the_best_checkpoint_is_taken_once_it_has_learned(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run stopped before its second evaluation has an untrained best."""
    monkeypatch.chdir(tmp_path)
    trained = load_checkpoint(checkpoint)
    untrained = replace(trained, state=replace(trained.state, step=0))
    folder = Path("checkpoints")
    save_checkpoint(folder / BEST, untrained)
    assert default_checkpoint(None) == folder / BEST
    save_checkpoint(folder / NEWEST, trained)
    assert default_checkpoint(None) == folder / NEWEST
    save_checkpoint(folder / BEST, trained)
    assert default_checkpoint(None) == folder / BEST
    assert default_checkpoint(Path("mine")) == Path("mine")
