"""Windows of conversations: every answer is a target once, and no two conversations mix."""

from collections.abc import Sequence

import numpy as np
import pytest

from mlx_randygpt.data import DataError
from mlx_randygpt.data.conversations import cut_windows, find_turns
from mlx_randygpt.data.windows import Conversations, Documents, Mixture, eval_batches, sample_batch
from mlx_randygpt.dialogue import Turn, render
from mlx_randygpt.state import IGNORED, Batch, rng
from mlx_randygpt.tokenizers.chars import CharTokenizer

LETTERS = CharTokenizer("abcdefgh", dialogue=True)
SYSTEM, USER, ASSISTANT, END = range(11, 15)


def conversation(*texts: str) -> list[Turn]:
    return [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def corpus(*conversations: Sequence[Turn]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of conversations as a corpus has them, and where these begin."""
    rendered = [render(turns, LETTERS) for turns in conversations]
    tokens = np.concatenate([np.where(counts, ids, ~ids) for ids, counts in rendered])
    return tokens, np.cumsum([0, *(len(part.ids) for part in rendered)])[:-1]


def windows_of(
    conversations: Sequence[Sequence[Turn]], size: int, pack: bool = False
) -> tuple[np.ndarray, Conversations]:
    tokens, starts = corpus(*conversations)
    return tokens, cut_windows(find_turns(tokens, starts, LETTERS), size, pack=pack)


SHORT = [conversation("ab", "c"), conversation("d", "ef", "g", "h")]  # 7 and 6 + 6 tokens


def spans(found: Conversations) -> list[tuple[int, int]]:
    return list(zip(found.first.tolist(), found.ends.tolist(), strict=True))


def test_turns_are_found_with_their_roles() -> None:
    tokens, starts = corpus([Turn("system", "a"), *SHORT[0]], SHORT[1])
    turns = find_turns(tokens, starts, LETTERS)
    assert turns.first.tolist() == [0, 3, 7, 10, 13, 17, 20]
    assert turns.ends.tolist() == [3, 7, 10, 13, 17, 20, 23]
    assert turns.roles.tolist() == [0, 1, 2, 1, 2, 1, 2]
    assert np.flatnonzero(turns.begin).tolist() == [0, 3]


def test_a_window_holds_one_conversation_unless_they_are_packed() -> None:
    assert spans(windows_of(SHORT, 18)[1]) == [(0, 7), (7, 20)]
    assert spans(windows_of(SHORT, 19, pack=True)[1]) == [(0, 20)]
    assert spans(windows_of(SHORT, 18, pack=True)[1]) == [(0, 14), (14, 20)]


def test_a_long_conversation_is_cut_ahead_of_a_question() -> None:
    found = windows_of(SHORT, 7)[1]
    assert spans(found) == [(0, 7), (7, 14), (14, 20)]
    assert (found.n_conversations, found.n_long) == (2, 1)


def test_a_long_exchange_is_cut_where_a_window_ends() -> None:
    _, found = windows_of([conversation("a", "bcdefgh")], 4)  # 3 + 9 tokens
    assert spans(found) == [(0, 5), (4, 9), (8, 12)]


def test_windows_that_ask_only_are_left_out() -> None:
    _, found = windows_of([conversation("abcdefgh", "a", "b")], 4)  # 10 + 3 + 3 tokens
    assert spans(found) == [(8, 13)]
    with pytest.raises(DataError, match="no conversation has an answer"):
        windows_of([conversation("a")], 4)


@pytest.mark.parametrize("size", [2, 3, 5, 8, 13, 40])
@pytest.mark.parametrize("pack", [False, True])
def test_every_token_of_an_answer_is_a_target_once(size: int, pack: bool) -> None:
    talks = [*SHORT, conversation("abcdefgh" * 3, "abc", "h" * 9, "gf" * 8), conversation("", "")]
    tokens, found = windows_of(talks, size, pack)
    batches = list(eval_batches(tokens, size, 3, conversations=found))
    targets = np.concatenate([batch.y().ravel() for batch in batches])
    assert targets[targets != IGNORED].tolist() == tokens[tokens >= 0].tolist()
    assert sum(batch.n_targets() for batch in batches) == (tokens >= 0).sum()


def test_an_input_is_the_id_whether_it_counts_or_not() -> None:
    tokens, found = windows_of(SHORT[:1], 8)
    batch = Batch(tokens, found.first, 8, ends=found.ends)
    assert batch.x().tolist() == [[USER, 0, 1, END, ASSISTANT, 2, END, END]]
    assert batch.y().tolist() == [[IGNORED] * 4 + [2, END] + [IGNORED] * 2]


def test_a_part_of_a_batch_has_the_ends_of_its_windows() -> None:
    tokens, found = windows_of(SHORT, 7)
    batch = Batch(tokens, found.first, 7, ends=found.ends)
    assert np.array_equal(batch.part(1, 3).y(), batch.y()[1:3])
    assert batch.part(1, 3).row == 1


def test_each_window_is_drawn_equally_often() -> None:
    tokens, found = windows_of(SHORT, 7)
    batch = sample_batch(tokens, 3000, 7, 1, 0, windows=found)
    counts = np.unique(batch.starts, return_counts=True)[1]
    assert np.abs(counts - 1000).max() < 100  # four standard deviations
    again = sample_batch(tokens, 3000, 7, 1, 0, windows=found)
    assert np.array_equal(batch.starts, again.starts)


def test_a_mixture_draws_each_part_by_its_share() -> None:
    talks = Conversations(np.array([100]), np.array([105]))
    text = Documents.within(np.array([0]), 100, 8)
    drawn = Mixture([text, talks], np.array([0.75, 0.25]), 8).draw(rng(1, "batch", 0), 4000)
    is_talk = drawn.starts == 100
    assert drawn.ends is not None
    assert abs(is_talk.mean() - 0.25) < 0.03  # four standard deviations
    assert set(drawn.ends[is_talk]) == {105}
    assert (drawn.ends - drawn.starts == 9)[~is_talk].all()
    assert set(drawn.starts[~is_talk]) == set(range(92))
