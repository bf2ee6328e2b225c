"""The MLX backend as one rank of several: its own rows of every batch, means over all ranks.

Dropout draws by sequence of the whole batch, so the number of ranks changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_randygpt.backends.base import StepResult
from mlx_randygpt.backends.mlx.adapters import MLXLora
from mlx_randygpt.backends.mlx.backend import MLXBackend, _to_numpy
from mlx_randygpt.backends.mlx.optimizer import Weights
from mlx_randygpt.backends.ranks.group import resync
from mlx_randygpt.backends.ranks.ring import RingGroup
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.state import Batch, Params, TrainState


class MLXRank(MLXBackend):
    """See `backends.base.Backend`; every batch it is given is the whole one."""

    def __init__(
        self, group: RingGroup, model: ModelConfig, train: TrainConfig, state: TrainState
    ) -> None:
        self._group = group
        super().__init__(model, train, state)

    def restore(self, state: TrainState) -> None:
        """Go on from rank 0's state."""
        super().restore(self._group.same_state(state))

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        resync(self)  # type: ignore[arg-type]
        return super().train_step(batches, lr)

    def loss(self, batch: Batch) -> float:
        share = self._group.share(batch)
        return self._group.total(super().loss(share) * _weight([share], [batch]))

    def loss_and_grads(self, batch: Batch) -> tuple[float, Params]:
        share = self._group.share(batch)
        loss, grads = self._value_and_grad(self._weights, *self._windows(share), None)
        loss, grads = self._group.mean(loss, grads, _weight([share], [batch]))
        return float(loss), _to_numpy(grads)

    def _accumulated(self, batches: Sequence[Batch]) -> tuple[mx.array, Weights]:
        shares = [self._group.share(batch) for batch in batches]
        return self._group.mean(*super()._accumulated(shares), _weight(shares, batches))


class MLXLoraRank(MLXRank, MLXLora):
    """The same where adapters are trained; only their gradients are summed."""


def _weight(shares: Sequence[Batch], batches: Sequence[Batch]) -> float:
    """What part of the targets that count these shares have."""
    return sum(b.n_targets() for b in shares) / sum(b.n_targets() for b in batches)
