"""Which token comes next, against numbers worked by hand; when to stop; what the model sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from mlx_randygpt.backends import make_backend
from mlx_randygpt.config import ConfigError, ModelConfig, TrainConfig
from mlx_randygpt.sample import Generated, SampleConfig, generate, pick, probabilities
from mlx_randygpt.state import Params, TrainState, rng
from mlx_randygpt.tokenizer import CharTokenizer

LETTERS = CharTokenizer("abcdefgh")  # ids 0 to 7; 8 <bos>, 9 <eos>, 10 <unk>
V = LETTERS.vocab_size


def drawn_from(weights: list[float], seen: tuple[int, ...] = (), **config: Any) -> list[float]:
    """Probabilities of tokens with these weights, under the named filters alone."""
    alone: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0}
    with np.errstate(divide="ignore"):
        logits = np.log(weights)
    return probabilities(logits, SampleConfig(**alone | config), seen).round(12).tolist()


def test_without_filters_it_is_the_softmax() -> None:
    assert drawn_from([1, 2, 3, 4]) == [0.1, 0.2, 0.3, 0.4]
    assert drawn_from([0, 1, 3]) == [0, 0.25, 0.75]


def test_temperature_is_a_power() -> None:
    assert drawn_from([1, 4, 4], temperature=0.5) == pytest.approx([1 / 33, 16 / 33, 16 / 33])
    assert drawn_from([1, 4, 4], temperature=2.0) == [0.2, 0.4, 0.4]


def test_temperature_zero_takes_the_first_of_the_best() -> None:
    assert drawn_from([1, 5, 2, 5], temperature=0) == [0, 1, 0, 0]
    assert drawn_from([1, 5, 2, 5], temperature=0, top_k=1, top_p=0.1) == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [
        (1, [0, 0, 0, 1]), (2, [0, 0.2, 0.2, 0.6]), (3, [0, 0.2, 0.2, 0.6]),
        (0, [0.1, 0.18, 0.18, 0.54]), (4, [0.1, 0.18, 0.18, 0.54]), (99, [0.1, 0.18, 0.18, 0.54]),
    ],
)  # fmt: skip
def test_top_k_keeps_all_that_tie_with_the_last(top_k: int, expected: list[float]) -> None:
    assert drawn_from([10, 18, 18, 54], top_k=top_k) == expected


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.0, [3]), (0.3, [3]), (0.4, [3]), (0.41, [3, 2]), (0.7, [3, 2]), (0.71, [3, 2, 1])],
)
def test_the_nucleus_is_the_fewest_that_reach_top_p(top_p: float, kept: list[int]) -> None:
    p = probabilities(np.log([0.125, 0.1875, 0.25, 0.4375]), SampleConfig(temperature=1, top_p=0.5))
    assert np.flatnonzero(p).tolist() == [2, 3]  # 0.4375 is not enough
    found = drawn_from([1, 2, 3, 4.000001], top_p=top_p)
    assert np.flatnonzero(found).tolist() == sorted(kept)


def test_the_nucleus_takes_the_lower_of_equal_ids() -> None:
    assert drawn_from([1, 1, 1, 1], top_p=0.5) == [0.5, 0.5, 0, 0]


def test_min_p_is_a_share_of_the_best() -> None:
    assert drawn_from([1, 2, 3, 4], min_p=0.5) == pytest.approx([0, 2 / 9, 3 / 9, 4 / 9])
    assert drawn_from([1, 2, 3, 4], min_p=1.0) == [0, 0, 0, 1]


def test_filters_apply_in_order_and_each_to_what_is_left() -> None:
    # top-k leaves 0.2, 0.3, 0.5 of the rest; their nucleus of 0.75 is 0.3 and 0.5.
    assert drawn_from([1, 2, 3, 5], top_k=3, top_p=0.75) == [0, 0, 0.375, 0.625]
    assert drawn_from([1, 2, 3, 5], top_k=3, top_p=0.75, min_p=0.7) == [0, 0, 0, 1]


def test_the_penalty_lowers_what_was_seen_whatever_its_sign() -> None:
    logits = np.array([2.0, -1.0, 0.0, 2.0])
    config = SampleConfig(temperature=1, top_p=1, repetition_penalty=2)
    p = probabilities(logits, config, [0, 1, 1, 2])  # being seen twice costs no more
    expected = np.exp([1.0, -2.0, 0.0, 2.0])
    np.testing.assert_allclose(p, expected / expected.sum(), rtol=1e-14)
    assert logits.tolist() == [2, -1, 0, 2]  # what came in is left alone


def test_what_is_impossible_stays_so() -> None:
    for config in ({"top_k": 3}, {"top_p": 0.99}, {"min_p": 0.0}, {"repetition_penalty": 2.0}):
        p = drawn_from([0, 1, 0, 1], (0, 1), **config)
        assert (p[0], p[2]) == (0, 0)


def test_pick_follows_the_distribution() -> None:
    p, random = np.array([0, 0.125, 0, 0.5, 0.375, 0]), rng(1, "check")
    counts = np.bincount([pick(p, random) for _ in range(4000)], minlength=6) / 4000
    np.testing.assert_allclose(counts, p, atol=0.032)  # 4 standard deviations; measured: 0.002


class Always:
    """A generator that returns one number."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self) -> float:
        return self.number


@pytest.mark.parametrize(
    ("number", "token"), [(0.0, 1), (0.2499, 1), (0.25, 3), (0.7, 3), (1 - 2**-53, 3)]
)
def test_pick_never_takes_what_has_no_chance(number: float, token: int) -> None:
    p = np.array([0, 0.25, 0, 0.75 - 1e-15, 0])  # sums to less than the largest draw
    assert pick(p, Always(number)) == token  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": -1}, {"top_k": -1}, {"seed": -1}, {"temperature": -0.1}, {"top_p": 1.1},
        {"min_p": -0.1}, {"repetition_penalty": 0.0}, {"temperature": np.nan}, {"stop": ("",)},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SampleConfig(**wrong)


class Script:
    """A backend that says what it was asked and speaks from a script, one line per stream."""

    def __init__(self, *lines: str) -> None:
        self.script = [[*LETTERS.encode(line).tolist(), LETTERS.eos] for line in lines]
        self.said = 0
        self.asked: list[tuple[int, list[int]]] = []  # cache length before, tokens of stream 0

    def new_cache(self, batch_size: int) -> Script.Cache:
        return Script.Cache()

    class Cache:
        def __init__(self) -> None:
            self.lengths = np.zeros(1, np.int64)  # of stream 0

        def reset(self, rows: slice) -> None:
            self.lengths[rows] = 0

    def logits(self, tokens: Any, cache: Script.Cache) -> Any:
        self.asked.append((int(cache.lengths[0]), tokens[0].tolist()))
        cache.lengths += tokens.shape[1]
        logits = np.zeros((len(tokens), V), np.float32)
        for row, line in enumerate(self.script[: len(tokens)]):
            logits[row, line[min(self.said, len(line) - 1)]] = 100
        self.said += 1
        return logits


@pytest.fixture
def tell(tiny_model: Callable[..., ModelConfig]) -> Callable[..., Iterator[list[Generated]]]:
    """(backend, prompt="ab", n=1, recipe="modern", **config) -> the samples as they grow."""

    def run(
        backend: Any, prompt: str = "ab", n: int = 1, recipe: str = "modern", **config: Any
    ) -> Iterator[list[Generated]]:
        model = tiny_model(recipe, vocab_size=V, block_size=6)
        settings = SampleConfig(**{"max_tokens": 20, "temperature": 0} | config)
        return generate(backend, model, LETTERS, LETTERS.encode(prompt).tolist(), settings, n)

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
    again = [(0, [4, 5, 6]), (3, [7]), (4, [0]), (5, [1])]  # e f g, then h a b
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
