"""The NumPy backend as one rank of several: its own rows of every batch, sums over all ranks.

The flat gradient vector is summed once a step, the loss after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mlx_randygpt.backends.base import StepResult
from mlx_randygpt.backends.numpy.adapters import NumpyLora
from mlx_randygpt.backends.numpy.backend import NumpyBackend
from mlx_randygpt.backends.ranks.group import resync
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.state import Batch, Params, TrainState

if TYPE_CHECKING:
    from mlx_randygpt.backends.ranks.ring import RingGroup


class NumpyRank(NumpyBackend):
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
        resync(self)
        own = super().train_step(batches, lr)
        return replace(own, loss_value=self._group.total(own.loss))

    def loss(self, batch: Batch) -> float:
        return self._group.total(super().loss(batch))

    def loss_and_grads(self, batch: Batch) -> tuple[float, Params]:
        loss, grads = super().loss_and_grads(batch)
        return self._group.total(loss), grads

    def _run(self, batch: Batch, total: int, work: Callable[..., float]) -> float:
        return super()._run(self._group.share(batch), total, work)

    def _reduce(self) -> None:
        super()._reduce()
        self._group.sum(self._g)


class NumpyLoraRank(NumpyRank, NumpyLora):
    """The same where adapters are trained; what is summed is the gradient of the whole model."""
