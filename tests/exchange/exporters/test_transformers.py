"""Exports in transformers itself, on PyTorch: logits, generate, padding, beams, training."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import ODD, greedy, make, streamed, windows

from mlx_randygpt.checkpoint import Checkpoint
from mlx_randygpt.exchange.export import export
from mlx_randygpt.state import Array
from mlx_randygpt.tokenizers import tokenizer_from_json

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
torch = pytest.importorskip("torch", exc_type=ImportError)
transformers = pytest.importorskip("transformers", exc_type=ImportError)
pytest.importorskip("tokenizers")
RECIPES = ("classic", "modern", "portable", "gpt2")
WIDER = {"portable": {"block_size": 1024}}  # its export does not slide past its context
CHUNKS = [100, 1, 1, 48, 1, 99]  # of one window


@pytest.fixture(scope="module")
def loaded(
    text: str, tiny_model: Any, lively: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Checkpoint, Any, Any]]:
    """(recipe, tokenizer) -> a checkpoint, and the model and tokenizer of its export."""
    made: dict[tuple[str, str], tuple[Checkpoint, Any, Any]] = {}

    def build(recipe: str, kind: str = "char") -> tuple[Checkpoint, Any, Any]:
        if (recipe, kind) not in made:
            saved = make(recipe, kind, text, tiny_model, lively, **WIDER.get(recipe, {}))
            folder = tmp_path_factory.mktemp(recipe) / f"my {kind} model"
            export(saved, "hf", folder)
            own = recipe not in ("portable", "gpt2")
            made[recipe, kind] = saved, *load(folder, trust_remote_code=own)
        return made[recipe, kind]

    return build


def load(folder: Path, **trust: bool) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **trust).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder, **trust)


def rows(*ids: Array) -> Any:
    """Token ids (B, T) as transformers takes them."""
    return torch.tensor(np.array(ids, np.int64))


def logits(model: Any, ids: Array, **given: Any) -> tuple[Array, Any]:
    with torch.no_grad():
        found = model(rows(ids), **given)
    return found.logits[0].numpy(), found.past_key_values


@pytest.mark.parametrize("kind", ["char", "bpe", "table"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_are_ours_on_1000_tokens(loaded: Any, recipe: str, kind: str, text: str) -> None:
    saved, model, tokenizer = loaded(recipe, kind)
    ids = tokenizer_from_json(saved.tokenizer).encode(text)[:1000]
    assert tokenizer(text)["input_ids"][:1000] == ids.tolist()
    ours = streamed(saved, ids)
    whole = np.concatenate([logits(model, part)[0] for part in windows(saved, ids)])
    assert np.abs(whole - ours).max() < 1e-4  # measured: 2.8e-5 of logits up to 40
    cache, at = None, 0
    for n in CHUNKS if saved.model.position == "learned" else [*CHUNKS, *CHUNKS, 300, 200]:
        found, cache = logits(model, ids[at : at + n], past_key_values=cache, use_cache=True)
        assert np.abs(found - ours[at : at + n]).max() < 1e-4
        at += n


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_generate_writes_what_we_write(
    loaded: Any, recipe: str, kind: str, use_cache: bool, text: str
) -> None:
    saved, model, _ = loaded(recipe, kind)
    ids = tokenizer_from_json(saved.tokenizer).encode(text)
    prompts = (ids[at : at + 30] for at in range(0, 1000, 10))
    texts = ((prompt, greedy(saved, prompt, 200)) for prompt in prompts)
    prompt, ours = next(
        (prompt, ours) for prompt, ours in texts if len(ours) == 200
    )  # no early end
    words = {"max_new_tokens": 200, "do_sample": False, "use_cache": use_cache}
    found = model.generate(rows(prompt), attention_mask=rows(prompt * 0 + 1), **words)
    assert found[0, 30:].tolist() == ours


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("n_beams", [1, 3])
def test_padding_on_the_left_changes_nothing(
    loaded: Any, recipe: str, n_beams: int, text: str
) -> None:
    _, model, tokenizer = loaded(recipe)
    tokenizer.padding_side = "left"
    prompts = [text[:50], text[200:217], text[400:401]]
    words = {"max_new_tokens": 80, "do_sample": False, "num_beams": n_beams}
    together = model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), **words)
    for prompt, found in zip(prompts, together, strict=True):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), **words)[0]
        n = min(len(alone) - len(prompt), 80)
        assert found[50 : 50 + n].tolist() == alone[len(prompt) : len(prompt) + n].tolist()


@pytest.mark.parametrize("recipe", ["classic", "modern"])
def test_loss_is_that_of_the_shifted_logits_and_trains(loaded: Any, recipe: str, text: str) -> None:
    saved, model, _ = loaded(recipe)
    ids = rows(tokenizer_from_json(saved.tokenizer).encode(text)[:200])
    found = model(ids, labels=ids)
    chosen = found.logits[0].log_softmax(-1)[range(199), ids[0, 1:]]
    assert found.loss.item() == pytest.approx(-chosen.mean().item(), rel=1e-5)
    found.loss.backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in model.parameters())
    model.zero_grad()


@pytest.mark.parametrize("n_prompt", [30, 64])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("odd", [{}, {"token_shift": True, "n_embd": 57, "n_head": 3}])
def test_learned_positions_begin_again_as_ours_do(
    text: str,
    tiny_model: Any,
    lively: Any,
    tmp_path: Path,
    odd: dict[str, Any],
    n_prompt: int,
    masked: bool,
) -> None:
    saved = make("classic", "char", text, tiny_model, lively, block_size=64, **odd)
    export(saved, "mlx-lm", tmp_path / "x")
    model, _ = load(tmp_path / "x", trust_remote_code=True)
    ids = tokenizer_from_json(saved.tokenizer).encode(text)
    prompts = rows(ids[:n_prompt], ids[100 : 100 + n_prompt])
    mask = {"attention_mask": torch.ones_like(prompts)} if masked else {}
    found = model.generate(prompts, max_new_tokens=200, do_sample=False, **mask)[:, n_prompt:]
    for prompt, continued in zip(prompts.numpy(), found.tolist(), strict=True):
        ours = greedy(saved, prompt, 200)
        assert continued[: len(ours)] == ours


def test_learned_positions_end_with_a_clear_line(loaded: Any) -> None:
    _, model, _ = loaded("classic")
    with pytest.raises(ValueError, match="position 250 is beyond the 250 that this model"):
        model(rows(np.zeros(251)))
    mask = rows(np.arange(10) > 4)
    with pytest.raises(ValueError, match="only a text without padding goes on"):
        model.generate(rows(np.zeros(10)), attention_mask=mask, max_new_tokens=260)


def test_a_cache_of_another_model_is_refused(loaded: Any) -> None:
    _, model, _ = loaded("modern")
    cache = transformers.DynamicCache()
    cache.update(torch.zeros(1, 4, 3, 16), torch.zeros(1, 4, 3, 16), 0)
    with pytest.raises(ValueError, match="a cache of another model"):
        model(rows(np.zeros(3)), past_key_values=cache)


@pytest.mark.parametrize("recipe", ["classic", "modern"])
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_has_both_names(loaded: Any, recipe: str, name: str, text: str) -> None:
    saved, model, _ = loaded(recipe)
    ids = tokenizer_from_json(saved.tokenizer).encode(text)[:60]
    ours, cache, at = streamed(saved, ids), None, 0
    for n in (20, 1, 39):
        found = model(rows(ids[at : at + n]), use_cache=True, **{name: cache})
        assert np.abs(found.logits[0].detach().numpy() - ours[at : at + n]).max() < 1e-4
        assert found.cache is found.past_key_values
        cache, at = found.get(name, found.cache), at + n
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kv_cache", ()),
        ("head_mask", torch.ones(2, 4)),
        ("token_type_ids", torch.ones(1, 3)),
        ("output_attentions", True),
        ("output_hidden_states", True),
        ("shift_labels", torch.ones(1, 3)),
        ("layer_past", 0),
    ],
)
def test_unknown_arguments_are_refused(loaded: Any, name: str, value: Any) -> None:
    _, model, _ = loaded("modern")
    with pytest.raises(TypeError, match=f"no argument {name}"):
        model(rows(np.zeros(3)), **{name: value})
    model(rows(np.zeros(3)), **{name: None})


def test_arguments_that_contradict_each_other_are_refused(loaded: Any) -> None:
    _, model, _ = loaded("modern")
    ids = rows(np.zeros(3))
    one, two = (model(ids, use_cache=True).cache for _ in range(2))
    with pytest.raises(ValueError, match="two names of one cache"):
        model(ids, cache=one, past_key_values=two)
    model(ids, cache=one, past_key_values=one)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=torch.zeros(1, 3, 64))
    with pytest.raises(ValueError, match="a cache of another model"):
        model(ids, cache=((ids, ids),))


def test_the_loss_of_accumulated_batches_is_divided_by_their_tokens(loaded: Any) -> None:
    _, model, _ = loaded("modern")
    ids = rows(np.arange(20))
    mean, share = (model(ids, labels=ids, num_items_in_batch=n).loss.item() for n in (None, 38))
    assert share == pytest.approx(mean / 2, rel=1e-6)


@pytest.mark.parametrize("kind", ["char", "bpe", "wordpiece"])
def test_the_tokenizer_is_ours(loaded: Any, kind: str, text: str) -> None:
    saved, _, theirs = loaded("modern", kind)
    ours = tokenizer_from_json(saved.tokenizer)
    for sample in (text[:300], ODD, "<eos><bos> is text", "it 's , n't"):
        ids = ours.encode(sample).tolist()
        assert theirs(sample)["input_ids"] == ids
        assert ours.unknown(sample) or theirs.decode(ids) == sample
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eos)


def test_an_export_can_be_saved_and_loaded_again(loaded: Any, tmp_path: Path) -> None:
    saved, model, tokenizer = loaded("modern")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load(tmp_path, trust_remote_code=True)
    ids = np.arange(20)
    np.testing.assert_array_equal(logits(model, ids)[0], logits(again, ids)[0])
    assert saved.model.n_layer == again.config.num_hidden_layers
