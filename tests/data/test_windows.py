"""Training windows start where they fit, a pass reads all, and evaluation sees each token once."""

import numpy as np
import pytest

from mlx_randygpt.data import DataError
from mlx_randygpt.data.windows import (
    Conversations,
    Documents,
    Mixture,
    batch_of_passes,
    eval_batches,
    sample_batch,
    shuffle,
)
from mlx_randygpt.state import IGNORED, Batch

TOKENS = np.arange(100, 200, dtype=np.int32)


def counted(batches: list[Batch]) -> list[int]:
    """The targets that count, in order."""
    targets = np.concatenate([batch.y().reshape(-1) for batch in batches])
    return [int(target) for target in targets[targets != IGNORED]]


def test_every_start_that_leaves_all_targets_is_drawn_and_no_other() -> None:
    batch = sample_batch(TOKENS[:12], 500, 8, seed=1, step=0)
    assert set(batch.starts.tolist()) == {0, 1, 2, 3}
    assert batch.n_targets() == 500 * 8
    assert np.array_equal(batch.y(), batch.x() + 1)


def test_a_split_of_one_block_and_one_token_is_enough() -> None:
    assert sample_batch(TOKENS[:9], 3, 8, seed=1, step=0).starts.tolist() == [0, 0, 0]


def test_windows_are_a_function_of_seed_step_and_micro_batch() -> None:
    def starts(seed: int, step: int, micro: int) -> tuple[int, ...]:
        return tuple(sample_batch(TOKENS, 16, 8, seed, step, micro).starts.tolist())

    assert starts(1, 2, 3) == starts(1, 2, 3)
    assert len({starts(*key) for key in np.ndindex(3, 3, 3)}) == 27


@pytest.mark.parametrize("n", [2, 8, 9, 10, 17, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_every_token_but_the_first_is_a_target_once(n: int, batch_size: int) -> None:
    batches = list(eval_batches(TOKENS[:n], 8, batch_size))
    assert counted(batches) == TOKENS[1:n].tolist()
    assert sum(batch.n_targets() for batch in batches) == n - 1
    assert len({batch.starts.shape for batch in batches}) == 1


def test_padding_windows_repeat_the_last_token_and_count_nothing() -> None:
    *_, last = eval_batches(TOKENS, 8, 9)  # 13 windows in 2 batches of 9
    padding = Batch(TOKENS, last.starts[4:], 8)
    assert padding.starts.tolist() == [len(TOKENS)] * 5
    assert padding.n_targets() == 0
    assert (padding.x() == TOKENS[-1]).all()
    assert (padding.y() == IGNORED).all()


@pytest.mark.parametrize(("max_tokens", "n_windows"), [(1, 1), (16, 2), (47, 5), (98, 12)])
def test_a_limit_takes_whole_windows_evenly_spread(max_tokens: int, n_windows: int) -> None:
    batches = list(eval_batches(TOKENS, 8, 1, max_tokens))
    starts = np.concatenate([batch.starts for batch in batches])
    assert len(counted(batches)) == n_windows * 8
    assert starts[0] == 0
    assert np.ptp(np.diff(starts, append=104)) <= 8  # 13 windows of 8: gaps differ by one at most


def test_a_limit_past_the_end_changes_nothing() -> None:
    batches = list(eval_batches(TOKENS, 8, 4, max_tokens=10_000))
    assert counted(batches) == TOKENS[1:].tolist()


def test_one_token_has_nothing_to_predict() -> None:
    with pytest.raises(DataError, match="1 tokens leave nothing to predict"):
        next(eval_batches(TOKENS[:1], 8, 4))


@pytest.mark.parametrize("n_tokens", [100, 93])
def test_no_window_crosses_from_one_document_to_the_next(n_tokens: int) -> None:
    first = np.array([0, 30, 35, 44, 60, 95])
    documents = Documents.within(first, n_tokens, 8)
    assert documents.n_left_out == {100: 2, 93: 1}[n_tokens]  # of 5 tokens each
    document = np.searchsorted(first, np.arange(100), side="right")
    starts = set[int]()
    for step in range(200):
        batch = sample_batch(TOKENS[:n_tokens], 16, 8, 1, step, windows=documents)
        for start in batch.starts.tolist():
            assert len(set(document[start : start + 9].tolist())) == 1
            starts.add(start)
    inside = [s for s in range(n_tokens - 8) if document[s] == document[s + 8]]
    assert sorted(starts) == inside  # each of them, and no other


def test_documents_that_are_all_too_short_are_refused() -> None:
    first = np.array([0, 5, 12])
    with pytest.raises(DataError, match=r"the longest document has 8 tokens; .* needs one of 9"):
        Documents.within(first, 20, 8)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 9, 255, 256, 257, 1000])
def test_a_pass_visits_each_item_once_in_an_order_of_its_own(n: int) -> None:
    passes, items = shuffle(np.arange(3 * n), n, seed=1)
    assert passes.tolist() == [0] * n + [1] * n + [2] * n
    orders = items.reshape(3, n)
    assert np.array_equal(np.sort(orders), np.tile(np.arange(n), (3, 1)))
    if n > 8:
        assert (
            len({*map(tuple, orders), tuple(range(n)), tuple(shuffle(np.arange(n), n, 2)[1])}) == 5
        )


def test_the_orders_of_passes_look_random() -> None:
    orders = shuffle(np.arange(400 * 100), 100, seed=1)[1].reshape(400, 100)
    means = orders.mean(axis=0)  # of what comes first, second, ...: 49.5 ± 1.4
    assert abs(means - 49.5).max() < 6
    steps = np.diff(orders) % 100  # from one item to the next: 396 of each but 0
    assert np.bincount(steps.ravel(), minlength=100)[1:].min() > 300
    assert (orders[:, 0] == orders[:, 1]).sum() == 0


def test_windows_of_a_pass_depend_on_their_numbers_only() -> None:
    whole = batch_of_passes(TOKENS, 60, 8, 1, 7)
    parts = [batch_of_passes(TOKENS, 20, 8, 1, 7 + 20 * i).starts for i in range(3)]
    assert np.array_equal(whole.starts, np.concatenate(parts))
    assert not np.array_equal(whole.starts, batch_of_passes(TOKENS, 60, 8, 2, 7).starts)


@pytest.mark.parametrize("n", [9, 10, 16, 17, 18, 24, 25, 100])
def test_passes_read_all_of_a_text_evenly(n: int) -> None:
    n_windows, n_passes = -(-(n - 8) // 8), 400
    read = np.zeros(n, int)
    seen = set()
    for i in range(n_passes):
        batch = batch_of_passes(TOKENS[:n], n_windows, 8, 1, i * n_windows)
        assert batch.n_targets() == 8 * n_windows
        np.add.at(read, batch.y().reshape(-1) - 100, 1)
        seen.update(batch.starts.tolist())
    assert seen == set(range(n - 8))  # every start that leaves all targets
    assert read[0] == 0
    inner = read[12:-12]
    assert (inner == n_passes).all()
    assert read[1:].min() > 0


def test_passes_over_documents_stay_inside_them() -> None:
    first = np.array([0, 30, 35, 44, 60, 95])
    documents = Documents.within(first, 100, 8)
    assert np.diff(documents.tiles).tolist() == [3, 0, 1, 1, 4, 0]
    document = np.searchsorted(first, np.arange(100), side="right") - 1
    starts = list[int]()
    for i in range(200):
        batch = batch_of_passes(TOKENS, 9, 8, 1, 9 * i, documents)
        assert sorted(document[batch.starts].tolist()) == [0, 0, 0, 2, 3, 4, 4, 4, 4]
        assert (document[batch.starts] == document[batch.starts + 8]).all()
        starts += batch.starts.tolist()
    assert set(starts) == {s for s in range(92) if document[s] == document[s + 8]}


def test_passes_over_conversations_and_mixtures_visit_every_window_equally_often() -> None:
    talks = Conversations(np.array([80, 85, 92]), np.array([85, 92, 99]))
    batch = batch_of_passes(TOKENS, 6, 8, 1, 3, talks)
    assert sorted(batch.starts.tolist()) == [80, 80, 85, 85, 92, 92]
    assert batch.ends is not None
    assert dict(zip(batch.starts.tolist(), batch.ends.tolist(), strict=True))[85] == 92
    mixture = Mixture(
        [Documents.of(np.array([0]), np.array([80]), 8), talks], np.array([0.7, 0.3]), 8
    )
    batch = batch_of_passes(TOKENS, 4000, 8, 1, 0, mixture)
    is_talk = np.isin(batch.starts, talks.first)
    assert is_talk.mean() == pytest.approx(0.3, abs=0.03)
    counts = np.bincount(batch.starts[is_talk], minlength=100)[talks.first]
    assert np.ptp(counts) <= 0.2 * counts.mean()  # a round of the mixture is not over yet
