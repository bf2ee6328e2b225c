"""Test that exported dialogue models give the same tokens and answers, there and imported again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from exported import conversations, greedy, make, messages

from mlx_randygpt.checkpoint import Checkpoint
from mlx_randygpt.cli import group
from mlx_randygpt.dialogue import Turn, has_dialogue, render, render_prompt
from mlx_randygpt.exchange.export import build_files, export
from mlx_randygpt.exchange.exporters.card import card
from mlx_randygpt.exchange.importing import read_foreign
from mlx_randygpt.tokenizers import END_OF_TURN, stops, tokenizer_from_json

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other libraries
os.environ.setdefault("HF_HUB_OFFLINE", "1")
QUESTIONS = ["The old ship", "é “日🙂” <|end|>", "  a small\ngrey bird "]
N = 60

Make = Callable[..., tuple[Checkpoint, Path]]


@pytest.fixture
def exported(text: str, tiny_model: Any, lively: Any, tmp_path: Path) -> Make:
    """(recipe, kind, format) -> a checkpoint and the folder of its export."""

    def build(recipe: str, kind: str, format: str) -> tuple[Checkpoint, Path]:
        if kind not in ("char", "table"):
            pytest.importorskip("tokenizers")
        if format == "gguf":
            pytest.importorskip("gguf")
        words = text + "é “日🙂”|"
        saved = make(recipe, kind, words, tiny_model, lively, dialogue=True, block_size=400)
        folder = tmp_path / f"{kind} {format}"
        export(saved, format, folder)
        return saved, folder

    return build


def asked(saved: Checkpoint, question: str) -> tuple[list[Turn], Any, list[int]]:
    """Turns, the prompt of our renderer, and our greedy answer to it."""
    tokenizer = tokenizer_from_json(saved.tokenizer)
    turns = [Turn("system", "Sing."), Turn("user", question)]
    prompt = render_prompt(turns, tokenizer)
    return turns, prompt, greedy(saved, prompt, N)


def spelled(saved: Checkpoint, ids: list[int]) -> str:
    tokenizer = tokenizer_from_json(saved.tokenizer)
    return tokenizer.decode([token for token in ids if token not in stops(tokenizer)])


@pytest.mark.parametrize("kind", ["char", "bpe", "wordpiece", "table"])
def test_both_ends_stop_a_text_and_roles_are_never_sampled(exported: Make, kind: str) -> None:
    saved, folder = exported("modern", kind, "hf")
    tokenizer = tokenizer_from_json(saved.tokenizer)
    generation, config = (
        json.loads((folder / name).read_text())
        for name in ("generation_config.json", "config.json")
    )
    ends = list(stops(tokenizer))
    assert generation["eos_token_id"] == config["eos_token_id"] == (ends if ends[1:] else ends[0])
    assert generation["pad_token_id"] == ends[0]
    assert generation["suppress_tokens"] == list(tokenizer.never_sampled())
    assert tokenizer.special("<|user|>") in generation["suppress_tokens"]


@pytest.mark.parametrize("kind", ["char", "bpe", "wordpiece", "table"])
@pytest.mark.parametrize("format", ["hf", "mlx-lm"])
def test_transformers_renders_the_ids_of_our_renderer(
    exported: Make, kind: str, format: str
) -> None:
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    pytest.importorskip("jinja2")
    saved, folder = exported("modern", kind, format)
    ours = tokenizer_from_json(saved.tokenizer)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for turns in conversations(200):
        for prompt, ids in ((False, render(turns, ours).ids), (True, render_prompt(turns, ours))):
            found = theirs.apply_chat_template(
                messages(turns), add_generation_prompt=prompt, return_dict=False
            )
            assert found == ids.tolist(), turns
    spoken = theirs.decode(render([Turn("user", "The old ship")], ours).ids.tolist())
    assert "The old ship" in spoken
    assert theirs.decode(render_prompt([], ours).tolist(), skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "5"},
        {"role": "user", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "5"}]},
    ],
)
def test_the_template_refuses_what_it_cannot_render(exported: Make, message: Any) -> None:
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    pytest.importorskip("jinja2")
    _, folder = exported("modern", "char", "hf")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    with pytest.raises(Exception, match="must be"):
        tokenizer.apply_chat_template([message])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("recipe", ["modern", "portable", "gpt2"])
def test_transformers_gives_our_answer(exported: Make, recipe: str, kind: str) -> None:
    torch = pytest.importorskip("torch", exc_type=ImportError)
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    saved, folder = exported(recipe, kind, "hf")
    trust = {"trust_remote_code": recipe == "modern"}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **trust).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **trust)
    for question in QUESTIONS:
        turns, prompt, ours = asked(saved, question)
        inputs = tokenizer.apply_chat_template(
            messages(turns), add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            found = model.generate(**inputs, max_new_tokens=N, do_sample=False)
        assert found[0, len(prompt) :].tolist() == ours


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_mlx_lm_gives_our_answer(exported: Make, kind: str) -> None:
    mlx_lm = pytest.importorskip("mlx_lm", exc_type=ImportError)
    saved, folder = exported("modern", kind, "mlx-lm")
    never = tokenizer_from_json(saved.tokenizer).never_sampled()
    trusted = {"trust_remote_code": True}
    model, tokenizer = mlx_lm.load(str(folder), tokenizer_config=trusted, **trusted)

    def ban(tokens: Any, logits: Any) -> Any:  # it has no rule of its own
        logits[:, list(never)] = -np.inf
        return logits

    for question in QUESTIONS:
        turns, prompt, ours = asked(saved, question)
        ids = tokenizer.apply_chat_template(messages(turns), add_generation_prompt=True)
        assert ids == prompt.tolist()
        found = mlx_lm.generate(model, tokenizer, ids, max_tokens=N, logits_processors=[ban])
        assert found.strip() == spelled(saved, ours).strip()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("recipe", ["portable", "gpt2"])
def test_llama_cpp_gives_our_answer(exported: Make, recipe: str, kind: str) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    saved, folder = exported(recipe, kind, "gguf")
    params = xllamacpp.CommonParams()
    params.model.path = str(folder / "model.gguf")
    params.n_ctx = 512
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    params.cpuparams.n_threads = 2
    server = xllamacpp.Server(params)
    for question in (QUESTIONS[0], QUESTIONS[1].removesuffix("<|end|>"), QUESTIONS[2]):
        turns, prompt, ours = asked(saved, question)
        answer = server.handle_chat_completions(
            {"messages": messages(turns), "max_tokens": N, "temperature": 0.0}
        )
        assert answer["usage"]["prompt_tokens"] == len(prompt)
        choice = answer["choices"][0]
        assert choice["message"]["content"] == spelled(saved, ours)
        assert choice["finish_reason"] == ("length" if len(ours) == N else "stop")


def test_a_gguf_names_the_end_of_a_turn(exported: Make) -> None:
    gguf = pytest.importorskip("gguf")
    saved, folder = exported("portable", "char", "gguf")
    reader = gguf.GGUFReader(folder / "model.gguf")
    found = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer = tokenizer_from_json(saved.tokenizer)
    assert found["tokenizer.ggml.eos_token_id"] == tokenizer.eos
    assert found["tokenizer.ggml.eot_token_id"] == tokenizer.special(END_OF_TURN)
    assert "<|assistant|>" not in found["tokenizer.chat_template"]  # or it passes for Phi-3's
    modelfile = (folder / "Modelfile").read_text()
    assert (
        'TEMPLATE "{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}<|assistant|>"'
        in modelfile
    )
    assert 'PARAMETER stop "<eos>"\nPARAMETER stop "<|end|>"\n' in modelfile


@pytest.mark.parametrize(
    ("recipe", "kind", "format"),
    [
        ("modern", "char", "hf"),
        ("modern", "table", "hf"),
        ("classic", "bpe", "hf"),
        ("modern", "wordpiece", "mlx-lm"),
        ("portable", "char", "hf"),
        ("portable", "bpe", "gguf"),
        ("gpt2", "char", "hf"),
        ("gpt2", "bpe", "hf"),
        ("portable", "char", "gguf"),
    ],
)
def test_a_model_of_dialogue_survives_export_and_import(
    exported: Make, recipe: str, kind: str, format: str
) -> None:
    saved, folder = exported(recipe, kind, format)
    again, ours = read_foreign(folder).tokenizer, tokenizer_from_json(saved.tokenizer)
    assert has_dialogue(again)
    assert (again.bos, stops(again)) == (ours.bos, stops(ours))
    assert again.never_sampled() == ours.never_sampled()
    if kind in ("char", "table"):
        assert again == ours
    for turns in conversations(50):
        assert render(turns, again).ids.tolist() == render(turns, ours).ids.tolist()


def test_an_import_says_that_one_can_talk_to_it(exported: Make, tmp_path: Path) -> None:
    _, folder = exported("portable", "char", "hf")
    words = ["import", str(folder), "-o", str(tmp_path / "talk.safetensors")]
    done = CliRunner().invoke(group, words)
    assert f"Talk to it: mlxgpt chat --checkpoint {words[-1]}" in done.stdout
    shown = CliRunner().invoke(group, ["info", words[-1], "--json"])
    assert json.loads(shown.stdout)["dialogue"] is True


@pytest.mark.parametrize(
    ("format", "line"),
    [("hf", "apply_chat_template"), ("gguf", "llama-cli"), ("safetensors", "mlxgpt chat")],
)
def test_the_card_says_how_to_talk_to_it(exported: Make, format: str, line: str) -> None:
    saved, _ = exported("portable", "char", "safetensors")
    text = card(saved, format, "x")
    assert line in text
    assert "It answers in dialogues" in text


def test_a_plain_model_keeps_its_template(text: str, tiny_model: Any, lively: Any) -> None:
    saved = make("portable", "char", text, tiny_model, lively)
    files = build_files(saved, "hf", "x")
    settings = json.loads(files["tokenizer_config.json"])
    assert settings["split_special_tokens"] is True
    assert "role" not in settings["chat_template"]
    assert json.loads(files["tokenizer.json"])["normalizer"] is None
