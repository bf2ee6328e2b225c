"""The one thread that owns the model: it decodes all texts together, a token at a time.

A text joins between two tokens, when its prompt has been read, and leaves when it ends or nobody
waits for it any more. What a text reads and draws does not depend on who is beside it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import numpy as np

from mlx_randygpt.backends.base import Scorer
from mlx_randygpt.config import ModelConfig, UserError
from mlx_randygpt.sampling.generate import Continuation, Streams, extend
from mlx_randygpt.serve.metrics import Metrics
from mlx_randygpt.state import Array


class Full(UserError):
    """More texts are waiting than may."""


class Request:
    """One text that was asked for. The engine's thread writes it and lets `tell` be called, after
    each token or at the end alone; `cancelled` may be set from anywhere. Whoever reads it looks at
    `finished` first and at the text after."""

    def __init__(self, writer: Continuation, tell: Callable[[], None], *, each_token: bool) -> None:
        self.writer, self.tell, self.each_token = writer, tell, each_token
        self.cancelled = False
        self.error: Exception | None = None  # of the engine; the text ends there
        self.asked = time.perf_counter()

    @property
    def finished(self) -> bool:
        return bool(self.writer.sample.finish_reason or self.error or self.cancelled)


class Engine:
    """At most `n_streams` texts are decoded together, `n_waiting` more may wait."""

    def __init__(
        self, build: Callable[[], Scorer], model: ModelConfig, metrics: Metrics,
        n_streams: int, n_waiting: int,
    ) -> None:  # fmt: skip
        self._build, self._model, self._metrics = build, model, metrics
        self._n_streams, self._n_waiting = n_streams, n_waiting
        self.deliver: Callable[[list[Request]], None] = lambda jobs: None  # called in the thread
        self.backend_name = ""
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._error: BaseException | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Build the model in its thread; raises what goes wrong there."""
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            raise self._error

    def submit(self, jobs: Sequence[Request]) -> None:
        """Let these texts be written; Full where not all of them may wait."""
        with self._changed:
            if len(self._waiting) + len(jobs) > self._n_waiting + self._n_streams:
                raise Full(f"{len(self._waiting)} texts are waiting already; try again in a second")
            self._waiting.extend(jobs)
            self._changed.notify()

    def stop(self) -> None:
        """End at once; texts that are not finished are cancelled."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            backend = self._build()
            self.backend_name = f"{backend.name} on {backend.device}"
            batch = RunningBatch(Streams(backend, self._model, self._n_streams), self._metrics)
        except BaseException as error:
            self._error = error
            return
        finally:
            self._ready.set()
        while (arrived := self._arrived(batch)) is not None:
            everybody = [*batch.jobs, *arrived]
            try:
                for told in batch.join(arrived, self._model.block_size):
                    self.deliver(told)
                self.deliver(batch.step())
            except Exception as error:  # the server goes on; whoever was in here learns of it
                for job in everybody:
                    job.error = job.error or (None if job.finished else error)
                batch = RunningBatch(Streams(backend, self._model, self._n_streams), self._metrics)
                self.deliver(everybody)
        for job in [*batch.jobs, *self._waiting]:
            job.cancelled = True
        self.deliver([*batch.jobs, *self._waiting])

    def _arrived(self, batch: RunningBatch) -> list[Request] | None:
        """Who may join now, waiting for somebody where nothing is being written; None: stop."""
        with self._changed:
            while not (self._waiting or batch.jobs or self._stopping):
                self._changed.wait()
            if self._stopping:
                return None
            free = self._n_streams - len(batch.jobs)
            arrived = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
            self._metrics.set("waiting", len(self._waiting))
        return arrived


class RunningBatch:
    """The texts that are being written, by rows of the streams."""

    def __init__(self, streams: Streams, metrics: Metrics) -> None:
        self._streams, self._metrics = streams, metrics
        self.jobs: list[Request] = []
        self._tokens: list[int] = []  # the newest of each, not yet read

    def join(self, arrived: list[Request], block_size: int) -> Iterator[list[Request]]:
        """Read the prompts of new texts, short ones first, and write the first token of each; who
        is to be told, as soon as that can be."""
        self._leave()
        new = sorted((job for job in arrived if not job.finished), key=_n_read(block_size))
        yield [job for job in arrived if job.finished]
        for _, group in groupby(new, _n_read(block_size)):
            read = list(group)
            self._read(read, block_size)
            yield [job for job in read if job.each_token or job.finished]

    def step(self) -> list[Request]:
        """One more token for everybody who is not finished; who is to be told of it."""
        self._leave()
        if self.jobs:
            self._write(self.jobs, self._streams.append(self._tokens), first=0)
        told = [job for job in self.jobs if job.each_token or job.finished]
        self._leave()
        return told

    def _read(self, jobs: list[Request], block_size: int) -> None:
        """Prompts of one length, in one pass."""
        prompts = np.array([job.writer.prompt[-block_size:] for job in jobs], np.int32)
        self.jobs += jobs
        self._metrics.add("prompt_tokens_total", prompts.size)
        self._metrics.set("streams", len(self.jobs))
        self._write(jobs, self._streams.join(prompts), first=len(self.jobs) - len(jobs))
        now = time.perf_counter()
        for job in jobs:
            self._metrics.observe("first_token_seconds", now - job.asked)

    def _write(self, jobs: list[Request], logits: Array, first: int) -> None:
        self._tokens[first:] = extend([job.writer for job in jobs], logits)
        self._metrics.add("generated_tokens_total", len(jobs))

    def _leave(self) -> None:
        """Whoever is finished makes room; the last takes the row."""
        for row in reversed(range(len(self.jobs))):
            if self.jobs[row].finished:
                self._streams.leave(row)
                self.jobs[row], self._tokens[row] = self.jobs[-1], self._tokens[-1]
                del self.jobs[-1], self._tokens[-1]
        self._metrics.set("streams", len(self.jobs))


def _n_read(block_size: int) -> Callable[[Request], int]:
    return lambda job: min(len(job.writer.prompt), block_size)
