"""The one thread that owns the model: it decodes all texts in one batch, a token at a time.

A text joins the batch between two tokens and leaves it when it ends or is cancelled. Its result
does not depend on the other texts in the batch.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from mlx_randygpt.backends import release_memory
from mlx_randygpt.backends.base import Scorer
from mlx_randygpt.config import ModelConfig, UserError
from mlx_randygpt.sampling.generate import Continuation, Streams, extend
from mlx_randygpt.serve.metrics import Metrics
from mlx_randygpt.state import Array

READ_TOGETHER = 256  # tokens of prompts in one pass


class Full(UserError):
    """The queue is full."""


class Request:
    """One text in the engine.

    The engine's thread extends `continuation`; `notify` is called after each token, or only at the
    end. Any thread can set `cancelled`. Read `finished` before the text.
    """

    def __init__(
        self, continuation: Continuation, notify: Callable[[], None], *, each_token: bool
    ) -> None:
        self.continuation, self.notify, self.each_token = continuation, notify, each_token
        self.cancelled = False
        self.error: BaseException | None = None  # of the engine; ends the text
        self.created = time.perf_counter()

    @property
    def finished(self) -> bool:
        """Whether the text has ended, failed, or was cancelled."""
        return bool(self.continuation.sample.finish_reason or self.error or self.cancelled)


class Engine:
    """Decode up to `n_streams` texts together and queue up to `n_waiting` more."""

    def __init__(
        self,
        build: Callable[[], Scorer],
        model: ModelConfig,
        metrics: Metrics,
        *,
        n_streams: int,
        n_waiting: int,
    ) -> None:
        self._build, self._model, self._metrics = build, model, metrics
        self._n_streams, self._n_waiting = n_streams, n_waiting
        # called in the engine's thread with the requests to notify
        self.deliver: Callable[[list[Request]], None] = lambda requests: None
        # called there after first tokens; returns when they are sent, before the next are decoded
        self.wait_until_sent: Callable[[], None] = lambda: None
        # calls a function once everything that has arrived at the same moment is submitted
        self.call_soon: Callable[[Callable[[], None]], object] = lambda function: function()
        self.backend_name = ""
        self._release: Callable[[], None] = lambda: None  # the memory that an idle model can spare
        self._arriving: list[Request] = []  # submitted at this moment
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._error: BaseException | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Build the model in the engine's thread; raise what fails there."""
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            raise self._error

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests; raise Full if there is no room for all of them.

        Those of one moment join the batch together, so that their prompts are read in one pass.
        """
        with self._changed:
            n_waiting = len(self._waiting) + len(self._arriving)
            if n_waiting + len(requests) > self._n_waiting + self._n_streams:
                raise Full(f"{n_waiting} texts are already waiting; try again in a second")
            is_first = not self._arriving
            self._arriving += requests
        if is_first and requests:
            self.call_soon(self._admit)

    def _admit(self) -> None:
        with self._changed:
            self._waiting.extend(self._arriving)
            self._arriving.clear()
            self._changed.notify()

    def stop(self, seconds: float | None = None) -> None:
        """Stop after the current token, and wait for it so long; cancel what has not ended."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            backend = self._build()
            self._release = partial(release_memory, backend)
            self.backend_name = f"{backend.name} on {backend.device}"
            batch = RunningBatch(Streams(backend, self._model, self._n_streams), self._metrics)
        except BaseException as error:
            self._error = error
            return
        finally:
            self._ready.set()
        while (arrived := self._next_requests(batch)) is not None:
            current = [*batch.requests, *arrived]
            try:
                for joined in batch.join(arrived, self._model.block_size):
                    if joined:
                        self.deliver(joined)
                        self.wait_until_sent()
                if notified := batch.step():
                    self.deliver(notified)
            except BaseException as error:  # keep serving; every request in this batch gets it
                for request in current:
                    request.error = request.error or (None if request.finished else error)
                batch = RunningBatch(Streams(backend, self._model, self._n_streams), self._metrics)
                self.deliver(current)
        unfinished = [*batch.requests, *self._waiting, *self._arriving]
        for request in unfinished:
            request.cancelled = True
        self.deliver(unfinished)

    def _next_requests(self, batch: RunningBatch) -> list[Request] | None:
        """Return the requests to join now; wait for one if the batch is empty; None: stop."""
        with self._changed:
            while not (self._waiting or batch.requests or self._stopping):
                self._release()
                self._changed.wait()
            if self._stopping:
                return None
            free = self._n_streams - len(batch.requests)
            arrived = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
            self._metrics.set("waiting", len(self._waiting))
        return arrived


class RunningBatch:
    """The requests that are being decoded; request i is row i of the streams."""

    def __init__(self, streams: Streams, metrics: Metrics) -> None:
        self._streams, self._metrics = streams, metrics
        self.requests: list[Request] = []
        self._tokens: list[int] = []  # the newest of each, not fed yet

    def join(self, arrived: list[Request], block_size: int) -> Iterator[list[Request]]:
        """Feed new prompts, short ones first, and decode the first token of each.

        Yields the requests to notify as soon as they are known.
        """
        self._leave()
        if ended := [request for request in arrived if request.finished]:
            yield ended
        new = [request for request in arrived if not request.finished]
        for together in read_together(new, block_size):
            self._feed(together, block_size)
            yield [request for request in together if request.each_token or request.finished]
        if new:
            self._leave()  # those whose first token is their last

    def step(self) -> list[Request]:
        """Decode one token for every request; return those to notify."""
        if self.requests:
            self._write(self.requests, self._streams.append(self._tokens), first=0)
        notified = [request for request in self.requests if request.each_token or request.finished]
        self._leave()
        return notified

    def _feed(self, requests: list[Request], block_size: int) -> None:
        """Feed prompts in one forward pass."""
        prompts = [request.continuation.prompt[-block_size:] for request in requests]
        self.requests += requests
        self._metrics.add("prompt_tokens_total", sum(map(len, prompts)))
        self._metrics.set("streams", len(self.requests))
        self._write(requests, self._streams.join(prompts), first=len(self.requests) - len(requests))
        now = time.perf_counter()
        for request in requests:
            self._metrics.observe("first_token_seconds", now - request.created)

    def _write(self, requests: list[Request], logits: Array, first: int) -> None:
        self._tokens[first:] = extend([request.continuation for request in requests], logits)
        self._metrics.add("generated_tokens_total", len(requests))

    def _leave(self) -> None:
        """Remove finished requests; the last row moves into each gap."""
        for row in reversed(range(len(self.requests))):
            if self.requests[row].finished:
                self._streams.leave(row)
                self.requests[row], self._tokens[row] = self.requests[-1], self._tokens[-1]
                del self.requests[-1], self._tokens[-1]
        self._metrics.set("streams", len(self.requests))


def read_together(requests: Sequence[Request], block_size: int) -> Iterator[list[Request]]:
    """Yield the requests in the groups whose prompts are read in one pass, short ones first.

    A pass has READ_TOGETHER tokens at most, padding included, so that a short prompt does not wait
    for long ones; a longer prompt has a pass of its own.
    """
    group: list[Request] = []
    for request in sorted(requests, key=lambda request: len(request.continuation.prompt)):
        length = min(len(request.continuation.prompt), block_size)
        if group and (len(group) + 1) * length > READ_TOGETHER:
            yield group
            group = []
        group.append(request)
    if group:
        yield group
