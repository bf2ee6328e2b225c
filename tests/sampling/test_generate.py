"""When a text ends, what can be shown of it, and what the model sees past its context."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from mlx_randygpt.backends import make_backend
from mlx_randygpt.config import ConfigError, ModelConfig, TrainConfig
from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.sampling.generate import Continuation, Generated, extend, generate, shown_length
from mlx_randygpt.state import Params, TrainState
from mlx_randygpt.tokenizers.chars import CharTokenizer

LETTERS = CharTokenizer("abcdefgh")  # ids 0 to 7; 8 <bos>, 9 <eos>, 10 <unk>
V = LETTERS.vocab_size


class Script:
    """A backend that says what it was asked and speaks from a script, one line per stream."""

    def __init__(self, *lines: str) -> None:
        self.script = [[*LETTERS.encode(line).tolist(), LETTERS.eos] for line in lines]
        self.asked: list[tuple[int, list[int]]] = []  # length of row 0 before, its new tokens

    class Cache:
        def __init__(self, n: int) -> None:
            self.lengths = np.zeros(n, np.int64)
            self.lines, self.said = list(range(n)), [0] * n

        def reset(self, rows: slice) -> None:
            self.lengths[rows] = 0

        def move(self, source: int, target: int) -> None:
            for column in (self.lengths, self.lines, self.said):
                column[target] = column[source]  # type: ignore[index]

    def new_cache(self, batch_size: int) -> Script.Cache:
        return Script.Cache(batch_size)

    def logits(self, tokens: Any, cache: Script.Cache, rows: slice, lengths: Any = None) -> Any:
        self.asked.append((int(cache.lengths[0]), tokens[0].tolist()))
        cache.lengths[rows] += tokens.shape[1]
        logits = np.zeros((len(tokens), V), np.float32)
        for i, row in enumerate(range(len(cache.lines))[rows]):
            line = self.script[cache.lines[row]]
            logits[i, line[min(cache.said[row], len(line) - 1)]] = 100
            cache.said[row] += tokens.shape[1] == 1 or cache.said[row] == 0  # else: read again
        return logits


@pytest.fixture
def tell(tiny_model: Callable[..., ModelConfig]) -> Callable[..., Iterator[list[Generated]]]:
    """(backend, prompt="ab", n=1, recipe="modern", **config) -> the samples as they grow."""

    def run(
        backend: Any, prompt: str = "ab", n: int = 1, recipe: str = "modern",
        n_likely: int | None = None, **config: Any,
    ) -> Iterator[list[Generated]]:  # fmt: skip
        model = tiny_model(recipe, vocab_size=V, block_size=6)
        settings = SampleConfig(**{"max_tokens": 20, "temperature": 0} | config)
        ids = LETTERS.encode(prompt).tolist()
        return generate(backend, model, LETTERS, ids, settings, n, n_likely=n_likely)

    return run


Tell = Callable[..., Iterator[list[Generated]]]


def test_eos_stops_and_is_no_text(tell: Tell) -> None:
    *_, [sample] = tell(Script("cafe"))
    assert (sample.text, sample.finish_reason) == ("cafe", "stop")


def test_max_tokens_stops(tell: Tell) -> None:
    *grown, [sample] = tell(Script("cafecafe"), max_tokens=3)
    assert len(grown) == 2
    assert (sample.text, sample.finish_reason) == ("caf", "length")


def test_a_stop_text_is_cut_with_what_follows(tell: Tell) -> None:
    *_, [sample] = tell(Script("abcdefgh"), stop=("fg", "de", "h"))
    assert (sample.text, sample.finish_reason) == ("abc", "stop")


def test_a_stop_text_in_the_prompt_does_not_count(tell: Tell) -> None:
    *_, [sample] = tell(Script("dbad"), prompt="bad", stop=("bad",))
    assert sample.text == "d"


def test_each_stream_ends_by_itself(tell: Tell) -> None:
    *_, samples = tell(Script("bad", "decade", "a"), n=3)
    assert [sample.text for sample in samples] == ["bad", "decade", "a"]
    assert {sample.finish_reason for sample in samples} == {"stop"}


def test_an_empty_prompt_is_refused(tell: Tell) -> None:
    with pytest.raises(ConfigError, match="the prompt is empty"):
        next(tell(Script("a"), prompt=""))


def test_a_bias_outside_the_vocabulary_is_refused(tell: Tell) -> None:
    with pytest.raises(ConfigError, match=f"logit_bias of token {V}: token ids are 0 to {V - 1}"):
        next(tell(Script("a"), logit_bias=((V, 1.0),)))


def test_what_may_still_change_is_not_shown() -> None:
    assert shown_length("abc", ()) == 3
    assert shown_length("abcde", ("def", "x")) == 3
    assert shown_length("abd", ("def",)) == 2


def test_each_choice_tells_what_the_model_thought(tell: Tell) -> None:
    grown = tell(Script("cafe"), n_likely=2, temperature=1.0, logit_bias=((0, -9.0),))
    *_, [sample] = grown
    assert [choice.token for choice in sample.choices] == sample.ids
    first = sample.choices[0]  # logits of 100 for c, 0 for seven letters and <eos>; no filter
    rest = np.log(np.exp(-100) / (1 + 8 * np.exp(-100)))
    assert first.likeliest == ((2, pytest.approx(0)), (0, pytest.approx(rest)))
    assert first.logprob == pytest.approx(0)


def test_forced_tokens_are_read_and_not_written(tell: Tell) -> None:
    writer = Continuation(LETTERS, [0], SampleConfig(temperature=0), n_likely=0, forced=[1, 2])
    logits = np.zeros((1, V))
    logits[0, 5] = 1.0
    taken = [extend([writer], logits) for _ in range(3)]
    assert (taken, writer.prompt, writer.sample.ids) == ([[1], [2], [5]], [0, 1, 2], [5])
    assert [choice.token for choice in writer.sample.choices] == [1, 2, 5]


def test_asking_to_stop_ends_the_text(tiny_model: Callable[..., ModelConfig]) -> None:
    grown: list[list[Generated]] = []
    model, settings = tiny_model("modern", vocab_size=V), SampleConfig(20, temperature=0)
    stop = lambda: len(grown) == 2  # noqa: E731
    for samples in generate(Script("cafecafe"), model, LETTERS, [0], settings, 1, stop):  # type: ignore[arg-type]
        grown.append(samples)  # noqa: PERF402
    assert grown[-1][0].text == "ca"


def test_rotary_windows_slide_and_nothing_is_read_twice(tell: Tell) -> None:
    backend = Script("cdefghabcd")
    *_, [sample] = tell(backend, max_tokens=9)
    read = [(2 + i, [2 + i]) for i in range(6)]  # c at 2, d at 3, … past the context of 6
    assert backend.asked == [(0, [0, 1]), *read, (8, [0]), (9, [1])]
    assert sample.text == "cdefghabc"


def test_learned_positions_start_again_with_the_last_half(tell: Tell) -> None:
    backend = Script("cdefghabcd")
    list(tell(backend, max_tokens=9, recipe="classic"))
    first = [(0, [0, 1]), (2, [2]), (3, [3]), (4, [4]), (5, [5])]  # a to f fill the context
    again = [(0, [4, 5]), (2, [6]), (3, [7]), (4, [0]), (5, [1])]  # e f, then g h a b
    assert backend.asked == first + again


@pytest.mark.parametrize("recipe", ["classic", "modern"])
def test_of_a_long_prompt_the_end_is_read(recipe: str, tell: Tell) -> None:
    backend = Script("a")
    list(tell(backend, prompt="abcdefgh", recipe=recipe, max_tokens=1))
    assert backend.asked == [(0, [2, 3, 4, 5, 6, 7])]


@pytest.fixture
def model_of(
    tiny_model: Callable[..., ModelConfig],
    tiny_train: Callable[..., TrainConfig],
    lively: Callable[..., Params],
) -> Callable[..., tuple[Any, ModelConfig]]:
    """(recipe, backend="numpy") -> a lively model of the letters, context 6, and its settings."""

    def build(recipe: str, backend: str = "numpy") -> tuple[Any, ModelConfig]:
        model = tiny_model(recipe, vocab_size=V, block_size=6)
        state = TrainState(0, lively(model), {})
        return make_backend(backend, model, tiny_train(recipe), state), model

    return build


def texts(backend: Any, model: ModelConfig, n: int = 1, **config: Any) -> list[str]:
    settings = SampleConfig(max_tokens=40, temperature=1.5, top_p=1, **config)
    *_, samples = generate(backend, model, LETTERS, [0, 1], settings, n)
    return [sample.text for sample in samples]


@pytest.mark.parametrize("recipe", ["classic", "modern"])
def test_a_stream_reads_the_same_alone_and_among_others(
    recipe: str, model_of: Callable[..., tuple[Any, ModelConfig]]
) -> None:
    alone, [among, *others] = texts(*model_of(recipe)), texts(*model_of(recipe), n=4)
    assert [among] == alone
    assert len({among, *others}) == 4
    assert texts(*model_of(recipe), seed=2) != alone


def test_what_is_never_sampled_never_appears(
    model_of: Callable[..., tuple[Any, ModelConfig]],
) -> None:
    backend, model = model_of("modern")
    settings = SampleConfig(max_tokens=60, temperature=100, top_p=1)  # all but even chances
    *_, samples = generate(backend, model, LETTERS, [0], settings, 20)
    ids = {token for sample in samples for token in sample.ids}
    assert ids == set(range(V)) - {LETTERS.bos, LETTERS.unk}


@pytest.mark.parametrize("recipe", ["classic", "modern"])
def test_both_backends_write_the_same_text(
    recipe: str, model_of: Callable[..., tuple[Any, ModelConfig]]
) -> None:
    pytest.importorskip("mlx.core", exc_type=ImportError)
    assert texts(*model_of(recipe), n=3) == texts(*model_of(recipe, "mlx"), n=3)
