"""Exports as files: what is in them, what is refused, and that nothing is lost on the way."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner, Result
from exported import ODD, make

from mlx_randygpt import files as durable_files
from mlx_randygpt.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mlx_randygpt.cli import group
from mlx_randygpt.data.files import sample_corpus_path
from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.exchange.export import build_files, export
from mlx_randygpt.exchange.exporters.card import TESTED, card, licences
from mlx_randygpt.exchange.exporters.tokenizer import token_names, tokenizer_json
from mlx_randygpt.tokenizers import tokenizer_from_json

ROOT = Path(__file__).parents[2]

Make = Callable[..., Checkpoint]
KINDS = ("char", "bpe", "wordpiece")
PLAIN = ("char", "table")  # they need no library


@pytest.fixture(scope="module")
def model(text: str, tiny_model: Any, lively: Any) -> Make:
    """(recipe="modern", kind="char", **changes) -> a checkpoint with moments."""

    def build(recipe: str = "modern", kind: str = "char", **changes: Any) -> Checkpoint:
        if kind not in PLAIN:
            pytest.importorskip("tokenizers")
        return make(recipe, kind, text, tiny_model, lively, **changes)

    return build


def call(*words: object) -> Result:
    return CliRunner().invoke(group, [*map(str, words)], auto_envvar_prefix="MLXGPT")


def weights_of(files: dict[str, bytes]) -> dict[str, Any]:
    return safetensors.numpy.load(files["model.safetensors"])


# hf and mlx-lm


@pytest.mark.parametrize("recipe", ["classic", "modern"])
def test_hf_and_mlx_lm_hold_the_weights_under_their_published_names(
    model: Make, recipe: str
) -> None:
    saved = model(recipe)
    hf, mlx_lm = (build_files(saved, kind, "x") for kind in ("hf", "mlx-lm"))
    assert {**hf, "README.md": b""} == {**mlx_lm, "README.md": b""}
    found = weights_of(hf)
    assert found.keys() == saved.state.params.keys()
    assert all((found[name] == w).all() for name, w in saved.state.params.items())


def test_config_holds_every_field_of_the_model(model: Make) -> None:
    saved = model()
    config = json.loads(build_files(saved, "hf", "x")["config.json"])
    assert {name: config[name] for name in vars(saved.model)} == vars(saved.model)
    files = build_files(saved, "hf", "x")
    named = [config["model_file"], *(f"{v.split('.')[0]}.py" for v in config["auto_map"].values())]
    assert {*named, "mlx_model.py"} == {name for name in files if name.endswith(".py")}


def test_gpt2_is_stored_as_gpt2_stores_it(model: Make) -> None:
    saved = model("gpt2", bias=False)
    files = build_files(saved, "hf", "x")
    assert not [name for name in files if name.endswith(".py")]
    found, ours = weights_of(files), saved.state.params
    name = "h.1.mlp.c_fc.weight"
    np.testing.assert_array_equal(found[name], ours[name].T)
    np.testing.assert_array_equal(found["wte.weight"], ours["wte.weight"])
    assert not found["h.1.mlp.c_fc.bias"].any()
    assert len(found) == 2 + 2 * 12 + 2


def test_mlx_lm_has_no_exact_gelu(model: Make) -> None:
    saved = model("gpt2", activation="gelu")
    assert json.loads(build_files(saved, "hf", "x")["config.json"])["activation_function"] == "gelu"
    with pytest.raises(ExchangeError, match="tanh GELU only"):
        build_files(saved, "mlx-lm", "x")


# tokenizer.json


@pytest.mark.parametrize("kind", [*KINDS, "table"])
def test_tokenizer_json_reads_and_spells_as_ours(model: Make, kind: str, text: str) -> None:
    library = pytest.importorskip("tokenizers")
    ours = tokenizer_from_json(model(kind=kind).tokenizer)
    theirs = library.Tokenizer.from_str(json.dumps(tokenizer_json(ours)))
    theirs.encode_special_tokens = True  # what split_special_tokens asks of transformers
    for sample in (text[:500], ODD, "<eos> is text, <unk> too", "\r\n\n", "", "Ω"):
        ids = ours.encode(sample).tolist()
        assert theirs.encode(sample, add_special_tokens=False).ids == ids
        if not ours.unknown(sample):
            assert theirs.decode(ids) == sample


def test_a_table_from_elsewhere_ends_no_text(model: Make) -> None:
    files = build_files(model("gpt2", "table"), "hf", "x")
    settings = json.loads(files["tokenizer_config.json"])
    assert not {"bos_token", "eos_token", "pad_token", "unk_token"} & settings.keys()
    for name in ("config.json", "generation_config.json"):
        assert json.loads(files[name])["eos_token_id"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_ends_of_a_text_are_named(model: Make, kind: str) -> None:
    saved = model(kind=kind)
    files = build_files(saved, "hf", "x")
    settings = json.loads(files["tokenizer_config.json"])
    tokenizer = tokenizer_from_json(saved.tokenizer)
    names = token_names(json.loads(files["tokenizer.json"]))
    assert sorted(names) == list(range(tokenizer.vocab_size))
    assert settings["eos_token"] == names[tokenizer.eos] == "<eos>"
    generation = json.loads(files["generation_config.json"])
    assert generation["eos_token_id"] == tokenizer.eos
    assert generation["suppress_tokens"] == list(tokenizer.never_sampled())


# safetensors


def test_weights_alone_are_a_checkpoint_still(model: Make, tmp_path: Path) -> None:
    saved = model()
    export(saved, "safetensors", tmp_path / "small")
    path = tmp_path / "small" / "model.safetensors"
    again = load_checkpoint(path)
    assert again.model == saved.model
    assert again.state.moments == {"m": {}, "v": {}}
    assert all((again.state.params[n] == w).all() for n, w in saved.state.params.items())
    assert again.data["paths"] == ["my notes.txt"]
    assert "/home/me" not in path.read_bytes().decode("latin-1")
    sampled = call("sample", "--checkpoint", path, "--backend", "numpy", "--max-tokens", 5)
    assert sampled.exit_code == 0
    assert call("info", path).exit_code == 0


# the card


def test_the_card_tells_the_run(model: Make) -> None:
    text = card(model(), "hf", "tales")
    for fact in ("# tales", "1.5000 nats", "1.2500 at step 5", "1,234", "seed 42", "my notes.txt"):
        assert fact in text
    assert "ab" * 32 in text
    assert "- my notes.txt: unknown: add it" in text


def test_a_model_from_elsewhere_is_told_as_such(model: Make) -> None:
    saved = model()
    source = {"format": "gpt2", "source": "/home/me/their gpt2"}
    foreign = replace(saved, data={**saved.data, "imported": source})
    text = card(foreign, "hf", "x")
    assert "from another program (gpt2, their gpt2)" in text
    assert "seed 42" not in text
    files = build_files(foreign, "safetensors", "x")
    assert not [name for name, content in files.items() if b"/home/me" in content]


@pytest.mark.parametrize("recipe", ["modern", "gpt2"])
def test_the_card_lists_the_versions_that_the_docs_name(model: Make, recipe: str) -> None:
    text, docs = card(model(recipe), "hf", "x"), (ROOT / "docs/exchange.md").read_text()
    for library, versions in TESTED.items():
        assert f"{library} (tested with {versions})" in text
        assert f"{library} {versions}" in docs


def test_the_card_knows_the_licences_of_the_library() -> None:
    known = {"paths": [str(sample_corpus_path()), "/x/text8.txt"], "sha256": ""}
    assert licences(known) == [
        "sample.txt: MIT, part of mlx-randygpt",
        "text8.txt: CC BY-SA 3.0 and GFDL (Wikipedia), if it is the corpus `text8`",
    ]


def test_a_run_that_was_never_evaluated_has_a_card(model: Make) -> None:
    saved = model()
    fresh = replace(saved, progress=type(saved.progress)(), data={**saved.data, "paths": []})
    text = card(fresh, "hf", "x")
    assert "not evaluated" in text
    assert "nan" not in text


# the folder


@pytest.fixture
def checkpoint(model: Make, tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "a model.safetensors", model())
    return tmp_path / "a model.safetensors"


def test_export_says_what_it_wrote(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "my model"
    result = call("export", checkpoint, "--format", "hf", "-o", out, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["path"] == str(out)
    assert answer["files"] == {p.name: p.stat().st_size for p in out.iterdir()}
    assert answer["bytes"] == sum(answer["files"].values())
    assert [p.name for p in out.parent.iterdir()] == ["my model"]


def test_a_folder_is_replaced_only_when_asked(checkpoint: Path, tmp_path: Path) -> None:
    words = ["export", checkpoint, "--format", "safetensors", "-o", tmp_path / "x"]
    (tmp_path / "x").mkdir()
    assert call(*words).exit_code == 0  # it was empty
    refused = call(*words)
    assert refused.exit_code == 1
    assert "--overwrite" in refused.stderr
    assert call(*words, "--overwrite").exit_code == 0


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_what_is_no_export_is_never_replaced(
    checkpoint: Path, tmp_path: Path, overwrite: tuple[str, ...]
) -> None:
    words = ["export", checkpoint, "--format", "hf", *overwrite, "-o"]
    into_home, into_file = call(*words, tmp_path), call(*words, checkpoint)
    assert (into_home.exit_code, into_file.exit_code) == (1, 1)
    assert "a model.safetensors" in into_home.stderr
    assert "is a file; give a folder" in into_file.stderr
    load_checkpoint(checkpoint)


def test_an_export_that_fails_leaves_what_was_there(
    model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(model(), "safetensors", tmp_path / "x")
    before = (tmp_path / "x" / "model.safetensors").read_bytes()
    full = OSError(errno.ENOSPC, "No space left on device")

    def fails(folder: Path) -> None:
        raise full

    monkeypatch.setattr(durable_files, "sync_folder", fails)
    with pytest.raises(ExchangeError, match=r"No space left on device; it needs 0\.\d MB"):
        export(model("classic"), "hf", tmp_path / "x", overwrite=True)
    assert (tmp_path / "x" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_weights_that_are_not_finite_are_refused(model: Make) -> None:
    saved = model()
    saved.state.params["wte.weight"][0, 0] = np.nan
    with pytest.raises(ExchangeError, match=r"wte\.weight is not finite"):
        build_files(saved, "hf", "x")


def test_mistakes_are_one_line(checkpoint: Path, tmp_path: Path) -> None:
    missing = call("export", tmp_path / "none.safetensors", "--format", "hf", "-o", tmp_path / "y")
    assert missing.exit_code == 1
    assert missing.stderr.count("\n") == 1
    assert "none.safetensors" in missing.stderr
    unknown = call("export", checkpoint, "--format", "onnx", "-o", tmp_path / "y")
    assert unknown.exit_code == 2
    assert call("export", checkpoint, "--format", "hf").exit_code == 2
    assert not (tmp_path / "y").exists()


# gguf


@pytest.mark.parametrize(
    ("recipe", "kind", "changes", "reason"),
    [
        ("modern", "bpe", {}, "this model's QK-norm; a model trained with --recipe portable fits"),
        ("classic", "char", {}, "this model's learned positions"),
        ("portable", "char", {"token_shift": True}, "this model's token shift"),
        ("portable", "char", {"n_embd": 60}, "this model's heads of odd width 15"),
        ("portable", "wordpiece", {}, "this model has WordPiece"),
        ("gpt2", "table", {}, "table of characters has none"),
        ("gpt2", "wordpiece", {}, "this model has WordPiece"),
        ("gpt2", "bpe", {"activation": "gelu"}, "has the tanh GELU"),
    ],
)
def test_gguf_says_why_a_model_does_not_fit(
    model: Make, recipe: str, kind: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ExchangeError, match=reason):
        build_files(model(recipe, kind, **changes), "gguf", "x")


@pytest.mark.parametrize("bias", [True, False])
def test_gguf_holds_what_llama_cpp_needs(model: Make, tmp_path: Path, bias: bool) -> None:
    gguf = pytest.importorskip("gguf")
    saved = model("gpt2", "bpe", bias=bias)
    export(saved, "gguf", tmp_path / "x")
    reader = gguf.GGUFReader(tmp_path / "x" / "model.gguf")
    found = {name: field.contents() for name, field in reader.fields.items()}
    names = {"context_length": 250, "embedding_length": 64, "feed_forward_length": 256}
    names |= {"block_count": 2, "attention.head_count": 4}
    assert {name: found[f"gpt2.{name}"] for name in names} == names
    assert found["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert (found["general.architecture"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    tokenizer = tokenizer_from_json(saved.tokenizer)
    content = saved.tokenizer["tokenizer"]
    assert found["tokenizer.ggml.tokens"] == [*dict(sorted(token_names(content).items())).values()]
    assert found["tokenizer.ggml.merges"] == [" ".join(m) for m in content["model"]["merges"]]
    assert found["tokenizer.ggml.eos_token_id"] == tokenizer.eos
    assert [found["tokenizer.ggml.token_type"][i] for i in (tokenizer.eos, 99)] == [3, 1]


def test_gguf_holds_every_weight(model: Make, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    saved = model("gpt2", "bpe")
    export(saved, "gguf", tmp_path / "x")
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "x" / "model.gguf").tensors}
    ours = saved.state.params
    assert len(tensors) == len(ours) == 28
    for theirs, name in (
        ("token_embd.weight", "wte.weight"), ("position_embd.weight", "wpe.weight"),
        ("output_norm.bias", "ln_f.bias"), ("blk.1.attn_norm.weight", "h.1.ln_1.weight"),
        ("blk.0.attn_qkv.weight", "h.0.attn.c_attn.weight"),
        ("blk.1.attn_output.bias", "h.1.attn.c_proj.bias"),
        ("blk.0.ffn_norm.bias", "h.0.ln_2.bias"), ("blk.1.ffn_up.weight", "h.1.mlp.c_fc.weight"),
        ("blk.1.ffn_down.weight", "h.1.mlp.c_proj.weight"),
    ):  # fmt: skip
        np.testing.assert_array_equal(tensors[theirs], ours[name])


def test_gguf_marks_special_tokens_alone_as_control(model: Make, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    saved = model("gpt2", "bpe")
    content = json.loads(json.dumps(saved.tokenizer))
    first = len(content["tokenizer"]["model"]["vocab"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for i, special in enumerate((False, True)):
        token = {"id": first + i, "content": f"<{special}>", **flags, "special": special}
        content["tokenizer"]["added_tokens"].append(token)
    rng = np.random.default_rng(1)
    weights = dict(saved.state.params)
    more = rng.standard_normal((2, saved.model.n_embd)).astype(np.float32)
    weights["wte.weight"] = np.concatenate([weights["wte.weight"], more])
    sizes = replace(saved.model, vocab_size=first + 2)
    state = replace(saved.state, params=weights)
    export(replace(saved, model=sizes, tokenizer=content, state=state), "gguf", tmp_path / "x")
    reader = gguf.GGUFReader(tmp_path / "x" / "model.gguf")
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    assert kinds[first:] == [gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL]
    assert kinds[:3] == [gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.NORMAL]
