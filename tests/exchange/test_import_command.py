"""`mlxgpt import` as a user sees it: what comes in can be evaluated, sampled and trained, and what
does not leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from foreign_files import gpt2, gpt2_folder, lively, nanogpt, randy_arrays, randy_bin, randy_model

from mlx_randygpt.checkpoint import load_checkpoint
from mlx_randygpt.cli import group
from mlx_randygpt.exchange import IMPORT_FORMATS, importing

pytest.importorskip("tokenizers")

TABLE = gpt2(activation="gelu", vocab_size=24)
TEXT = "bcd fed\nbad cab\n" * 40


def call(*words: object) -> Result:
    return CliRunner().invoke(group, [str(word) for word in words], auto_envvar_prefix="MLXGPT")


def answer(*words: object) -> dict[str, Any]:
    """The one JSON object on stdout."""
    result = call(*words, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """A model of each kind, and the text they are asked about."""
    (tmp_path / "text.txt").write_text(TEXT)
    for name in ("nano", "randy"):
        (tmp_path / name).mkdir()
    moments = [randy_arrays(randy_model(), 4)] * 2
    moments[1] = {name: values**2 for name, values in moments[0].items()}
    first = randy_arrays(randy_model())
    return {
        "gpt2": gpt2_folder(tmp_path / "gpt2", gpt2(), lively(gpt2())),
        "nanogpt": nanogpt(tmp_path / "nano" / "ckpt.pt", TABLE, lively(TABLE)),
        "randygpt": randy_bin(tmp_path / "randy" / "c.bin", 3, first, moments),
    }


@pytest.mark.parametrize("kind", ["gpt2", "nanogpt", "randygpt"])
def test_what_comes_in_is_a_checkpoint_like_ours(
    tmp_path: Path, sources: dict[str, Path], kind: str
) -> None:
    out = tmp_path / "in" / "model.safetensors"
    told = answer("import", sources[kind], "-o", out)
    saved = load_checkpoint(out)
    assert (told["format"], told["path"], told["step"]) == (kind, str(out), saved.state.step)
    assert told["moments"] == any(saved.state.moments.values())
    assert saved.data["imported"] == {"format": kind, "source": str(sources[kind])}
    score = answer(
        "eval", "--checkpoint", out, "--data", tmp_path / "text.txt", "--split", "all",
        "--backend", "numpy",
    )  # fmt: skip
    assert score["tokens"] > 300
    assert answer("info", out)["parameters"] == told["parameters"]
    assert f"{kind}, {sources[kind]}" in call("info", out).stdout
    written = answer("sample", "--checkpoint", out, "--max-tokens", 8, "--backend", "numpy")
    assert 0 < written["tokens"] <= 8


@pytest.mark.parametrize("kind", ["gpt2", "nanogpt", "randygpt"])
def test_what_comes_in_can_be_trained(tmp_path: Path, sources: dict[str, Path], kind: str) -> None:
    out = tmp_path / "model.safetensors"
    assert call("import", sources[kind], "-o", out).exit_code == 0
    done = call(
        "train", "--init-from", out, "--data", tmp_path / "text.txt", "--out", tmp_path / "run",
        "--iters", 2, "--batch-size", 2, "--lr", 1e-3, "--backend", "numpy", "--sample-every", 0,
        "--threads", 1,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert load_checkpoint(tmp_path / "run" / "checkpoint.safetensors").state.step == 2
    assert 'tokenizer = "table"' not in (tmp_path / "run" / "config.toml").read_text()


def test_randygpts_own_run_goes_on(tmp_path: Path, sources: dict[str, Path]) -> None:
    out = tmp_path / "model.safetensors"
    assert call("import", sources["randygpt"], "-o", out).exit_code == 0
    done = call(
        "train", "--resume", out, "--data", tmp_path / "text.txt", "--out", tmp_path / "run",
        "--iters", 72, "--batch-size", 2, "--backend", "numpy", "--sample-every", 0,
        "--threads", 1,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert load_checkpoint(tmp_path / "run" / "checkpoint.safetensors").state.step == 72


def test_notes_go_to_stderr_and_into_the_json(tmp_path: Path, sources: dict[str, Path]) -> None:
    result = call("import", sources["nanogpt"], "-o", tmp_path / "a.safetensors")
    assert "does not record its GELU" in result.stderr
    assert result.stdout.startswith("✓ ")
    told = answer("import", sources["nanogpt"], "-o", tmp_path / "b.safetensors")
    assert any("GELU" in note for note in told["notes"])


def test_a_checkpoint_that_is_there_stays_unless_overwritten(
    tmp_path: Path, sources: dict[str, Path]
) -> None:
    out = tmp_path / "a.safetensors"
    out.write_text("mine")
    refused = call("import", sources["nanogpt"], "-o", out)
    assert refused.exit_code == 1
    assert refused.stderr == f"Error: {out} exists already; --overwrite replaces it\n"
    assert out.read_text() == "mine"
    assert call("import", sources["nanogpt"], "-o", out, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["text.txt"], "is neither a GGUF file, a .bin file of randyGPT nor a file of torch.save"),
        (["nano/meta.pkl"], "is neither a GGUF file, a .bin file of randyGPT nor"),
        (["randy"], "holds neither a config.json, a ckpt.pt nor a model.gguf"),
        (["text.txt", "--format", "gpt2"], "is a file; gpt2 is a folder"),
        (["text.txt", "--format", "nanogpt"], "is truncated or damaged"),
        (["gpt2", "--activation", "gelu"], "--activation is for nanogpt"),
        (["nano", "--n-head", "2"], "--n-head is for randygpt"),
        (["nano", "--vocab", "text.txt"], "text.txt is not JSON"),
        (["gpt2", "--vocab", "nowhere"], "cannot be read"),
        (["nano", "--format", "gpt2"], "config.json cannot be read"),
    ],
)
def test_what_cannot_come_in_is_one_line_and_leaves_nothing(
    tmp_path: Path, sources: dict[str, Path], words: list[str], reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    refused = call("import", *words, "-o", "out.safetensors")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("Error: ")
    assert refused.stderr.count("\n") == 1
    assert reason in refused.stderr
    assert not Path("out.safetensors").exists()


def test_every_listed_format_has_a_reader() -> None:
    assert {*importing._FOLDER_READERS, "gguf", "nanogpt", "randygpt"} == {*IMPORT_FORMATS}


def test_a_table_of_characters_goes_out_again(tmp_path: Path, sources: dict[str, Path]) -> None:
    out = tmp_path / "a.safetensors"
    assert call("import", sources["nanogpt"], "-o", out).exit_code == 0
    assert call("export", out, "--format", "safetensors", "-o", tmp_path / "w").exit_code == 0
    kept = load_checkpoint(tmp_path / "w" / "model.safetensors")
    assert kept.tokenizer["type"] == "table"
    assert call("export", out, "--format", "hf", "-o", tmp_path / "hf").exit_code == 0
    spelled = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())["model"]["vocab"]
    assert [name for name, _ in sorted(spelled.items(), key=lambda pair: pair[1])] == (
        kept.tokenizer["symbols"]
    )


def test_an_empty_prompt_is_a_newline_to_a_table(tmp_path: Path, sources: dict[str, Path]) -> None:
    out = tmp_path / "a.safetensors"
    assert call("import", sources["nanogpt"], "-o", out).exit_code == 0
    written = [
        answer(
            "sample", "--checkpoint", out, "--prompt", prompt, "--max-tokens", 9, "--backend",
            "numpy", "--show-probs",
        )["text"]
        for prompt in ("", "\n")
    ]  # fmt: skip
    assert written[0] == written[1]
    assert len(written[0]) == 9
