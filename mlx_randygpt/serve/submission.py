"""Between the routes and the engine: submit the texts of a request, wait for or stream them.

Everything here runs in the event loop; the engine's thread only reports that texts have grown.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from starlette.requests import Request as HttpRequest

from mlx_randygpt.sampling.generate import Continuation
from mlx_randygpt.serve import MAX_COST_TOGETHER, ApiError
from mlx_randygpt.serve.engine import Engine, Full, Request
from mlx_randygpt.serve.http import PieceResponse, event, until_disconnect
from mlx_randygpt.serve.metrics import Metrics
from mlx_randygpt.serve.responses import ResponseBuilder, StreamState


class InFlight:
    """The submissions whose responses are not complete, and what they can cost together."""

    def __init__(self) -> None:
        self._costs: dict[Submission, int] = {}
        self._stopping = False

    def add(self, submission: Submission, cost: int) -> None:
        """Count a submission; raise ApiError 503 if all could be too much, or the server stops."""
        if self._stopping:
            raise stopping()
        if (total := sum(self._costs.values()) + cost) > MAX_COST_TOGETHER:
            message = f"the requests in progress and this one can have {total} tokens together;"
            message += f" at most {MAX_COST_TOGETHER} are possible: try again later"
            raise ApiError(503, message, code="overloaded")
        self._costs[submission] = cost

    def discard(self, submission: Submission) -> None:
        """Forget a submission, if it is counted."""
        self._costs.pop(submission, None)

    def stop(self) -> None:
        """Cancel all texts; accept no new ones."""
        self._stopping = True
        for submission in self._costs:
            submission.cancel()


class Submission:
    """The texts of one HTTP request in the engine; ApiError 503 if its queue is full.

    It counts among those in flight until it is closed.
    """

    def __init__(
        self,
        texts: Sequence[Continuation],
        engine: Engine,
        metrics: Metrics,
        in_flight: InFlight,
        *,
        cost: int,
        each_token: bool,
    ) -> None:
        self._metrics, self._in_flight = metrics, in_flight
        self._changed = asyncio.Event()
        self._requests = [Request(text, self._changed.set, each_token=each_token) for text in texts]
        try:
            in_flight.add(self, cost)
            engine.submit([request for request in self._requests if not request.finished])
        except ApiError:
            metrics.add("refused_total", len(self._requests))
            raise
        except Full as error:
            in_flight.discard(self)
            metrics.add("refused_total", len(self._requests))
            raise ApiError(503, str(error), code="overloaded") from error

    async def wait(self, http_request: HttpRequest) -> list[Continuation]:
        """Return all texts once they have ended; raise ApiError if one of them failed."""
        watch = asyncio.create_task(until_disconnect(http_request.receive, self.cancel))
        try:
            while not all(request.finished for request in self._requests):
                await self._changed.wait()
                self._changed.clear()
        finally:
            watch.cancel()
            self.cancel()
        if failed := [r for r in self._requests if r.error or r.cancelled]:
            raise _failure(failed[0]) from failed[0].error
        return [request.continuation for request in self._requests]

    def stream(self, builder: ResponseBuilder) -> PieceResponse:
        """Return a response that sends the texts while they grow."""
        events = _events(self._requests, self._changed, builder)
        headers = {"content-type": "text/event-stream", "cache-control": "no-store"}
        return PieceResponse(events, self.close, headers)

    def close(self) -> None:
        """Cancel the texts that have not ended, and count them no more: the response is over."""
        self.cancel()
        self._in_flight.discard(self)

    def cancel(self) -> None:
        """Cancel the texts that have not ended."""
        for request in self._requests:
            if not request.finished:
                request.cancelled = True
                self._metrics.add("cancelled_total")
        self._changed.set()


def stopping() -> ApiError:
    """Return the error of a request that the server has no time for."""
    return ApiError(503, "the server is stopping", code="stopping")


def _failure(request: Request) -> ApiError:
    """Return the error of a text that failed, or was cancelled because the server stops."""
    if request.error is not None:
        return ApiError(500, "the model failed; the request can be repeated")
    return stopping()


async def _events(
    requests: Sequence[Request], changed: asyncio.Event, builder: ResponseBuilder
) -> AsyncIterator[bytes]:
    """Yield the pieces of all texts as they grow, then the end as the OpenAI API has it."""
    states = [StreamState(builder, i, r.continuation) for i, r in enumerate(requests)]
    while not all(state.done for state in states):
        changed.clear()
        ended = [request for request in requests if request.error or request.cancelled]
        n_sent = 0
        for state in states:
            if not state.done and (events := state.events()):
                n_sent += 1
                yield events
                await asyncio.sleep(0)  # a chunk is small, and others come between two
        if n_sent:
            continue
        if ended:
            yield event(_failure(ended[0]).body())
            return
        if not all(state.done for state in states):
            await changed.wait()
    if builder.generation.include_usage:
        yield event(builder.closing([request.continuation for request in requests]))
    yield b"data: [DONE]\n\n"
