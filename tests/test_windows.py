"""Training windows can start anywhere and nowhere else; evaluation sees each token once."""

import numpy as np
import pytest

from mlx_randygpt.data import DataError
from mlx_randygpt.data.windows import eval_batches, sample_batch
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
