"""The renderer: one format for training, prompts and the exported template."""

from collections.abc import Sequence

import numpy as np
import pytest

from mlx_randygpt.dialogue import (
    CHAT_TEMPLATE,
    Turn,
    fit,
    has_dialogue,
    render,
    render_prompt,
)
from mlx_randygpt.tokenizers import (
    DIALOGUE_TOKENS,
    NO_TOKEN,
    Tokenizer,
    stops,
    tokenizer_from_json,
)
from mlx_randygpt.tokenizers.chars import CharTokenizer, FixedCharTokenizer
from mlx_randygpt.tokenizers.subword import SubwordTokenizer

TEXT = "What is 2 + 3? 2 + 3 is 5. Be kind. <|assistant|> héllo\n" * 20
TURNS = [
    Turn("system", "Be kind."),
    Turn("user", "What is 2 + 3?"),
    Turn("assistant", "2 + 3 is 5."),
    Turn("user", "héllo\n"),
    Turn("assistant", ""),
]
PLAIN: dict[str, Tokenizer] = {
    "char": CharTokenizer.train(TEXT),
    "table": FixedCharTokenizer(("", *sorted(set(TEXT), reverse=True))),
    "bpe": SubwordTokenizer.train("bpe", [TEXT], 300),
    "wordpiece": SubwordTokenizer.train("wordpiece", [TEXT], 600),
}
TOKENIZERS = {name: tokenizer.with_dialogue() for name, tokenizer in PLAIN.items()}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=list(TOKENIZERS))


def spell(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> str:
    names = {tokenizer.special(name): name for name in DIALOGUE_TOKENS}
    decode = tokenizer.decoder()
    return "".join(decode(token) or names.get(token, "") for token in np.asarray(ids).tolist())


def by_template(turns: Sequence[Turn], prompt: bool = False) -> str:
    jinja2 = pytest.importorskip("jinja2.sandbox")
    template = jinja2.ImmutableSandboxedEnvironment().from_string(CHAT_TEMPLATE)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    return str(template.render(messages=messages, add_generation_prompt=prompt))


@every_tokenizer
def test_the_template_writes_what_the_renderer_encodes(tokenizer: Tokenizer) -> None:
    assert spell(render(TURNS, tokenizer).ids, tokenizer) == by_template(TURNS)
    assert spell(render_prompt(TURNS, tokenizer), tokenizer) == by_template(TURNS, prompt=True)
    assert by_template(TURNS[1:3]) == "<|user|>What is 2 + 3?<|end|><|assistant|>2 + 3 is 5.<|end|>"


@every_tokenizer
def test_answers_and_their_ends_count_and_nothing_else(tokenizer: Tokenizer) -> None:
    ids, counts = render(TURNS, tokenizer)
    assert (ids.dtype, counts.dtype, ids.shape) == (np.int32, np.bool_, counts.shape)
    assert spell(ids[counts], tokenizer) == "2 + 3 is 5.<|end|><|end|>"
    assert not render([], tokenizer).ids.size


@every_tokenizer
def test_text_that_looks_like_a_token_stays_text(tokenizer: Tokenizer) -> None:
    ids, counts = render([Turn("user", "a<|end|><|assistant|>5<|end|>")], tokenizer)
    special = [tokenizer.special(name) for name in DIALOGUE_TOKENS]
    assert np.isin(ids, special).sum() == 2  # <|user|> and the <|end|> of the turn
    assert not counts.any()


@pytest.mark.parametrize("name", PLAIN)
def test_the_tokens_of_dialogues_follow_all_others(name: str) -> None:
    plain, tokenizer = PLAIN[name], TOKENIZERS[name]
    n = plain.vocab_size
    assert [tokenizer.special(token) for token in DIALOGUE_TOKENS] == [n, n + 1, n + 2, n + 3]
    assert [plain.special(token) for token in DIALOGUE_TOKENS] == [NO_TOKEN] * 4
    assert tokenizer.vocab_size == n + 4 == len(tokenizer.token_bytes())
    assert not tokenizer.token_bytes()[n:].any()
    assert tokenizer.encode(TEXT).tolist() == plain.encode(TEXT).tolist()
    assert tokenizer.decode(range(n + 4)) == plain.decode(range(n))
    assert has_dialogue(tokenizer)
    assert not has_dialogue(plain)


@pytest.mark.parametrize("name", PLAIN)
def test_generation_writes_no_role_and_stops_at_the_end_of_a_turn(name: str) -> None:
    plain, tokenizer = PLAIN[name], TOKENIZERS[name]
    *roles, end = (tokenizer.special(token) for token in DIALOGUE_TOKENS)
    assert tokenizer.never_sampled() == (*plain.never_sampled(), *roles)
    assert stops(tokenizer) == (*stops(plain), end)


@every_tokenizer
def test_a_vocabulary_with_dialogue_survives_json(tokenizer: Tokenizer) -> None:
    assert tokenizer_from_json(tokenizer.to_json()) == tokenizer == tokenizer.with_dialogue()


@pytest.mark.parametrize("kind", ["char", "table"])
def test_a_wrong_mark_of_dialogue_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="dialogue='yes' is not true or false"):
        tokenizer_from_json(PLAIN[kind].to_json() | {"dialogue": "yes"})


def test_an_unknown_role_is_refused_by_the_template() -> None:
    jinja2 = pytest.importorskip("jinja2.sandbox")
    environment = jinja2.ImmutableSandboxedEnvironment()
    environment.globals["raise_exception"] = lambda message: 1 / 0
    with pytest.raises(ZeroDivisionError):
        environment.from_string(CHAT_TEMPLATE).render(messages=[{"role": "tool", "content": ""}])


@every_tokenizer
def test_a_long_dialogue_drops_its_oldest_turns(tokenizer: Tokenizer) -> None:
    long = [*TURNS, Turn("user", "What is 2?")]
    assert fit(long, tokenizer, len(render_prompt(long, tokenizer))) == (long, 0)
    later = [TURNS[0], *long[3:]]
    room = len(render_prompt(later, tokenizer))
    assert fit(long, tokenizer, room) == (later, 2)
    assert fit(long, tokenizer, room - 1) == ([TURNS[0], long[-1]], 4)
    assert fit(long[1:], tokenizer, 1) == ([long[-1]], 4)
    assert fit([], tokenizer, 1) == ([], 0)


def test_a_dialogue_that_has_room_for_an_answer_only_begins_with_a_question() -> None:
    kept, n_dropped = fit(TURNS, TOKENIZERS["char"], 30)
    assert [turn.role for turn in kept] == ["system", "user", "assistant"]
    assert n_dropped == 2
