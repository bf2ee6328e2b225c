"""The routes: from a request to texts that are waited for, and to the answer.

Everything here runs in one event loop; the engine's thread only ever calls into it to say that a
text has grown.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shlex
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from importlib import resources
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from mlx_randygpt.analysis.insight import attention_map
from mlx_randygpt.backends.base import resident_bytes
from mlx_randygpt.model import parameter_count
from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.sampling.generate import Continuation
from mlx_randygpt.serve import ApiError, ServedModel, Settings, schema
from mlx_randygpt.serve.engine import Engine, Full, Request
from mlx_randygpt.serve.http import (
    App,
    EventStream,
    Guard,
    error_response,
    event,
    json_response,
    read_body,
    until_gone,
)
from mlx_randygpt.serve.metrics import Metrics
from mlx_randygpt.serve.openapi import description
from mlx_randygpt.serve.requests import GenerationRequest, chat, completion, seed_shape
from mlx_randygpt.serve.responses import ResponseBuilder, StreamState, token_speller

Read = Callable[[dict[str, Any], ServedModel, Settings, int], GenerationRequest]
PAGE = {  # path -> file of page/, its type
    "/": ("index.html", "text/html"), "/app.js": ("app.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"), "/icon.svg": ("icon.svg", "image/svg+xml"),
}  # fmt: skip
MAX_ATTENTION_TOKENS = 128  # tokens of an attention map


class Api:
    """The application, over an engine that has been started."""

    def __init__(
        self, served: ServedModel, settings: Settings, engine: Engine, metrics: Metrics
    ) -> None:
        self._served, self._settings, self._engine = served, settings, engine
        self._metrics = metrics
        self._one_map = asyncio.Lock()
        self._files = {path: _file(*named) for path, named in PAGE.items()}

    def app(self) -> App:
        """What a server runs."""
        routes = [Route(path, self._page) for path in PAGE if path != "/"]
        routes += [
            Route("/", self._root, methods=["GET", "POST"]),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/health", self._health),
            Route("/metrics", self._render_metrics),
            Route("/openapi.json", self._openapi),
            Route("/run", self._run),
            Route("/attention", self._attention, methods=["POST"]),
        ]
        failures: dict[Any, Any] = {
            ApiError: lambda request, error: error_response(error),
            HTTPException: _http_error,
            Exception: lambda request, error: error_response(ApiError(500, "internal error")),
        }
        app = Starlette(routes=routes, exception_handlers=failures, lifespan=self._lifespan)
        return Guard(app, self._settings, self._metrics, {route.path for route in routes})

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()

        def deliver(jobs: list[Request]) -> None:
            loop.call_soon_threadsafe(_tell, jobs)

        self._engine.deliver = deliver
        yield
        await asyncio.to_thread(self._engine.stop)

    # Texts

    async def _completions(self, request: HttpRequest) -> Response:
        return await self._write(request, schema.COMPLETION, completion, is_chat=False)

    async def _chat(self, request: HttpRequest) -> Response:
        return await self._write(request, schema.CHAT, chat, is_chat=True)

    async def _root(self, request: HttpRequest) -> Response:
        """The page, and the shape of the seeds."""
        if request.method != "POST":
            return await self._page(request)
        asked = await self._asked(request, schema.SEED, seed_shape)
        writers = await self._written(request, asked)
        usage = ResponseBuilder(self._served, asked, "", 0, False).usage(writers)
        del usage["total_tokens"]
        text = writers[0].sample.text
        return json_response({"text": text, "model": self._served.name, "usage": usage})

    async def _write(
        self, request: HttpRequest, shape: schema.Schema, read: Read, *, is_chat: bool
    ) -> Response:
        asked = await self._asked(request, shape, read)
        name = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        spelling = ResponseBuilder(self._served, asked, name, int(time.time()), is_chat)
        if not asked.stream:
            return json_response(spelling.whole(await self._written(request, asked)))
        changed = asyncio.Event()
        jobs = self._submit(asked, changed)
        return EventStream(_events(jobs, changed, spelling), lambda: self._cancel(jobs, changed))

    async def _written(self, request: HttpRequest, asked: GenerationRequest) -> list[Continuation]:
        """All texts of a request when they have ended; ApiError where one could not."""
        changed = asyncio.Event()
        jobs = self._submit(asked, changed)
        gone = partial(self._cancel, jobs, changed)
        watch = asyncio.create_task(until_gone(request.receive, gone))
        try:
            while not all(job.finished for job in jobs):
                await changed.wait()
                changed.clear()
        finally:
            watch.cancel()
            gone()
        if failed := [job.error for job in jobs if job.error is not None]:
            raise ApiError(500, "the model failed; the request may be sent again") from failed[0]
        if any(job.cancelled for job in jobs):
            raise ApiError(503, "the server is stopping", code="stopping")
        return [job.writer for job in jobs]

    async def _asked(
        self, request: HttpRequest, shape: schema.Schema, read: Read
    ) -> GenerationRequest:
        body = schema.parse(await read_body(request), shape)
        return read(body, self._served, self._settings, secrets.randbelow(1 << 31))

    def _submit(self, asked: GenerationRequest, changed: asyncio.Event) -> list[Request]:
        """The texts of a request, given to the engine; 503 where too many wait."""
        writers = asked.writers(self._served)
        jobs = [Request(writer, changed.set, each_token=asked.stream) for writer in writers]
        try:
            self._engine.submit([job for job in jobs if not job.finished])
        except Full as error:
            self._metrics.add("refused_total", len(jobs))
            raise ApiError(503, str(error), code="overloaded") from error
        return jobs

    def _cancel(self, jobs: Sequence[Request], changed: asyncio.Event) -> None:
        """Nobody waits for these any more."""
        for job in jobs:
            if not job.finished:
                job.cancelled = True
                self._metrics.add("cancelled_total")
        changed.set()

    # The rest

    async def _models(self, request: HttpRequest) -> Response:
        return json_response({"object": "list", "data": [self._model_object()]})

    async def _model(self, request: HttpRequest) -> Response:
        if (name := request.path_params["name"]) != self._served.name:
            raise ApiError(
                404, f"The model {name[:100]!r} does not exist; this server has"
                f" {self._served.name!r}", param="model", code="model_not_found",
            )  # fmt: skip
        return json_response(self._model_object())

    def _model_object(self) -> dict[str, Any]:
        served = self._served
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "mlx-randygpt",
            "context_length": served.model.block_size,
        }

    async def _health(self, request: HttpRequest) -> Response:
        return json_response({"status": "ok", "model": self._served.name})

    async def _render_metrics(self, request: HttpRequest) -> Response:
        self._metrics.set("memory_bytes", resident_bytes())
        return Response(self._metrics.render(), media_type="text/plain; version=0.0.4")

    async def _openapi(self, request: HttpRequest) -> Response:
        return json_response(description(self._served, bool(self._settings.api_key)))

    async def _run(self, request: HttpRequest) -> Response:
        """What the page tells of the model, its run, and the server's own settings."""
        served, defaults = self._served, self._settings.defaults
        named = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "typical_p",
                 "repetition_penalty", "seed")  # fmt: skip
        return json_response({
            "name": served.name, "step": served.step, "curve": served.curve,
            "parameters": parameter_count(served.model), "block_size": served.model.block_size,
            "n_layer": served.model.n_layer, "n_head": served.model.n_head,
            "vocab_size": served.model.vocab_size, "backend": self._engine.backend_name,
            "prompt": served.prompt,
            "options": _other_options(defaults),
            "defaults": {name: getattr(defaults, name) for name in named},
            "plain": {name: getattr(SampleConfig(), name) for name in named},
        })  # fmt: skip

    async def _attention(self, request: HttpRequest) -> Response:
        body = schema.parse(await read_body(request), schema.ATTENTION)
        served, layer, head = self._served, int(body["layer"]), int(body["head"])
        model = served.model
        if not served.params:
            raise ApiError(404, "attention maps need the float weights; serve without --quantize")
        for name, value, n in (("layer", layer, model.n_layer), ("head", head, model.n_head)):
            if value >= n:
                raise ApiError(400, f"{name}={value} is not there; it is 0 to {n - 1}", param=name)
        ids = served.tokenizer.encode(body["text"]) if body["text"] else [served.tokenizer.bos]
        ids = np.asarray(ids)[-min(MAX_ATTENTION_TOKENS, model.block_size) :]
        async with self._one_map:
            shares = await asyncio.to_thread(attention_map, served.params, model, ids, layer, head)
        name_of = token_speller(served.tokenizer)
        rows = [[round(float(x), 4) for x in row[: i + 1]] for i, row in enumerate(shares)]
        return json_response({"tokens": [name_of(int(i)) for i in ids], "weights": rows})

    async def _page(self, request: HttpRequest) -> Response:
        content, kind = self._files[request.url.path]
        return Response(content, media_type=kind, headers={"cache-control": "no-cache"})


def _other_options(config: SampleConfig) -> str:
    """What the page has no slider for, as words of the command line."""
    words = []
    for name in ("presence_penalty", "frequency_penalty"):
        if value := getattr(config, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += [word for token, x in config.logit_bias for word in ("--logit-bias", f"#{token}={x}")]
    words += [word for stop in config.stop for word in ("--stop", stop)]
    return " " + shlex.join(words) if words else ""


def _tell(jobs: Sequence[Request]) -> None:
    for job in jobs:
        job.tell()


async def _events(
    jobs: Sequence[Request], changed: asyncio.Event, spelling: ResponseBuilder
) -> AsyncIterator[bytes]:
    """The pieces of all texts as they grow, then what the OpenAI API ends with."""
    growing = [StreamState(spelling, i, job.writer) for i, job in enumerate(jobs)]
    while not all(growth.done for growth in growing):
        changed.clear()
        over = any(job.error or job.cancelled for job in jobs)
        pieces = [p for growth in growing if not growth.done for p in growth.pieces()]
        if pieces:
            yield b"".join(map(event, pieces))
        if over:
            yield event(ApiError(500, "the text could not be finished").body())
            return
        if not all(growth.done for growth in growing):
            await changed.wait()
    if spelling.asked.include_usage:
        yield event(spelling.closing([job.writer for job in jobs]))
    yield b"data: [DONE]\n\n"


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:100]} is not here: {error.detail}"
    response = error_response(ApiError(error.status_code, message))
    response.headers.update(error.headers or {})
    return response


def _file(name: str, kind: str) -> tuple[bytes, str]:
    return (resources.files("mlx_randygpt.serve") / "page" / name).read_bytes(), kind
