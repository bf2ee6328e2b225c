"""The GPU benchmark at tiny sizes on MLX's CPU device: every part runs, every proof holds."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx.core", exc_type=ImportError)

from mlx_randygpt.check import SUBJECTS
from mlx_randygpt.recipes import RECIPES

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu")


@pytest.fixture(scope="module")
def report(text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one call writes, as JSON and as Markdown. The interpreter it is given for PyTorch is
    not there, so that the part is left out whatever is installed."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "text.txt").write_text(text)
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--small", "--device", "cpu"]
    command += ["--torch-python", "no-such-python", "--data", "text.txt"]
    command += ["--json", "gpu.json", "--markdown", "gpu.md"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((folder / "gpu.json").read_text())
    return {**found, "markdown": (folder / "gpu.md").read_text()}


def columns(report: dict[str, Any], part: str, table: str) -> set[str]:
    return set(report["parts"][part]["tables"][table][0])


def test_every_part_ends_well(report: dict[str, Any], gpu: Any) -> None:
    assert report["passed"] is True
    assert list(report["parts"]) == list(gpu.PARTS)
    outcomes = {name: gpu.outcome(part) for name, part in report["parts"].items()}
    proofs = {"gradients": "passed", "tf32": "passed", "resume": "passed"}
    speeds = dict.fromkeys(("device", "training", "decoding", "learning"), "done")
    assert outcomes == proofs | speeds | {"torch": "skipped"}


def test_every_model_is_proven_in_every_type_and_at_the_sizes_of_fused_kernels(
    report: dict[str, Any],
) -> None:
    rows = [
        r for part in ("gradients", "tf32") for r in report["parts"][part]["tables"]["gradients"]
    ]
    for recipe in SUBJECTS:
        for dtype in ("float32", "TF32", "bfloat16"):
            sizes = {r["width_and_context"] for r in rows
                     if r["recipe"] == recipe and r["check"].endswith(dtype)}  # fmt: skip
            assert "128 × 128" in sizes
    assert all(0 <= row["error"] <= row["bound"] for row in rows)
    resumed = report["parts"]["resume"]["tables"]["resume"]
    assert len({(row["recipe"], row["dtype"], row["embedding"]) for row in resumed}) == 4 * len(
        RECIPES
    )


def test_the_tables_hold_what_the_documents_show(report: dict[str, Any]) -> None:
    assert {"float32_tflops", "bfloat16_tflops", "mlx"} < columns(report, "device", "device")
    trained = columns(report, "training", "training")
    assert {"tokens_per_second", "fraction_of_peak", "memory_mb"} < trained
    pieces = {"forward", "forward_and_backward", "optimizer", "attention", "head_and_loss"}
    assert pieces | {"launches", "python"} < columns(report, "training", "profile")
    decoded = report["parts"]["decoding"]["tables"]["decoding"]
    assert [row["streams"] for row in decoded] == [1, 32, 256]
    learned = report["parts"]["learning"]["tables"]["learning"]
    assert learned[-1]["best"] < learned[0]["val_loss"]


def test_the_report_for_people_has_a_section_for_each_part(
    report: dict[str, Any], gpu: Any
) -> None:
    for name in gpu.PARTS:
        assert f"\n## {gpu.TITLES.get(name, name)}: " in report["markdown"]
    assert "no-such-python does not run" in report["markdown"]


def test_all_parts_together_end_within_eight_minutes(gpu: Any) -> None:
    assert sum(part.seconds for part in gpu.PARTS.values()) < 480


def test_a_part_that_is_stopped_keeps_its_rows(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.PARTS, "learning", gpu.Part("gpu_learning", 0, ""))
    stopped = gpu.watched("learning", options())
    assert stopped["error"].startswith("stopped after 0 s")
    assert gpu.outcome(stopped) == "failed"


def test_a_part_that_fails_says_why_in_one_line(gpu: Any, tmp_path: Path) -> None:
    failed = gpu.watched("learning", options(data=str(tmp_path / "absent.txt")))
    assert "absent.txt" in failed["error"]
    assert "\n" not in failed["error"]


def options(**changes: Any) -> Namespace:
    given = {"small": True, "device": "cpu", "torch_python": sys.executable, "data": None}
    return Namespace(**{**given, **changes})


def test_a_proof_that_does_not_hold_fails_the_part(gpu: Any) -> None:
    assert gpu.outcome({"holds": False, "tables": {}}) == "does not hold"
    assert gpu.outcome({"holds": True, "tables": {"t": [{"failed": "no memory"}]}}) == "failed"


@pytest.mark.parametrize(("mode", "tokens"), [("train", 4 * 8), ("decode", 1)])
def test_peers_take_turns_each_in_its_process(mode: str, tokens: int, gpu: Any) -> None:
    gpu_torch = importlib.import_module("gpu_torch")
    given = {"preset": "mini", "batch_size": 4}
    spec = {"mode": mode, "given": given, "vocab_size": 67, "small": True, "device": "cpu"}
    specs = {recipe: {**spec, "recipe": recipe} for recipe in ("modern", "classic")}
    found = gpu_torch.turns(options(), specs, 2)
    assert list(found) == ["modern", "classic"]
    for row in found.values():
        assert row["tokens_per_second"] == pytest.approx(1e3 * tokens / row["ms"], rel=0.01)


def test_a_peer_that_dies_is_an_error_and_not_a_wait(gpu: Any) -> None:
    gpu_torch = importlib.import_module("gpu_torch")
    with pytest.raises(RuntimeError, match="a peer ended with code"):
        gpu_torch.turns(options(), {"broken": {"recipe": "modern", "mode": "none"}}, 1)


def test_the_sizes_are_those_of_the_table(gpu: Any) -> None:
    from mlx_randygpt.model import parameter_count

    speed = importlib.import_module("gpu_training")
    models = [case.settings()[0] for case in speed.cases(small=False)]
    shapes = [(m.n_layer, m.n_head, m.n_embd, m.block_size) for m in models]
    assert shapes == [(6, 8, 128, 64), (6, 6, 384, 256), (12, 12, 768, 1024)]
    assert all(m.block_size % 128 == 0 and m.head_size == 64 for m in models[1:])
    padding = (50304 - 50257) * 768  # beyond the published vocabulary and count
    assert parameter_count(models[2]) == 124_439_808 + padding


def test_what_does_not_fit_into_the_device_is_not_run(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Mac of 8 GB, of which Metal recommends to use 5.3: GPT-2 does not fit."""
    training = importlib.import_module("gpu_training")
    monkeypatch.setattr(training, "here", lambda name: Namespace(memory=5_300_000_000))
    monkeypatch.setattr(training, "built", None)  # nothing is allocated
    ((table, row),) = training.trained(training.GPT2, "float32", 1e12, {"model": "gpt2"}, False)
    assert table == "training"
    assert re.fullmatch(r"needs [\d.]+ GB by plan, the device has 5.3 GB", row["left_out"])
    assert training.lacking(*training.DEFAULT.settings()) == ""
    learning = importlib.import_module("gpu_learning")
    monkeypatch.setattr(training, "here", lambda name: Namespace(memory=10**9))
    (left_out,) = learning.learning(Namespace(data="no such file", small=False))
    assert left_out[0] == "skipped"
    assert "6/6/384 × 256 needs" in left_out[1]["why"]
