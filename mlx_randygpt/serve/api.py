"""The routes: from an HTTP request to a checked body, to the engine, and to the response."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from random import Random
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from mlx_randygpt.backends.base import resident_bytes
from mlx_randygpt.config import UserError
from mlx_randygpt.dialogue import has_dialogue
from mlx_randygpt.sampling.generate import Continuation
from mlx_randygpt.serve import N_THREADS, ApiError, ServedModel, Settings
from mlx_randygpt.serve.engine import Engine, Request
from mlx_randygpt.serve.http import (
    App,
    Bodies,
    Guard,
    PieceResponse,
    cut,
    dump,
    error_response,
    json_response,
)
from mlx_randygpt.serve.inspection import describe_run, map_attention, report_copies
from mlx_randygpt.serve.metrics import Metrics
from mlx_randygpt.serve.models import (
    AttentionBody,
    B,
    ChatBody,
    CompletionBody,
    CopiesBody,
    PlainBody,
    parse,
)
from mlx_randygpt.serve.openapi import describe
from mlx_randygpt.serve.requests import (
    GenerationRequest,
    check_name,
    read_chat,
    read_completion,
    read_plain,
)
from mlx_randygpt.serve.responses import ResponseBuilder
from mlx_randygpt.serve.submission import InFlight, Submission, stopping
from mlx_randygpt.tokenizers import TokenizerError
from mlx_randygpt.tokenizers.chars import CharTokenizer, FixedCharTokenizer

PAGE = {  # path -> file in page/, media type
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
SMALL_BYTES = 1 << 10  # of a body of characters, which is read in the event loop
LARGE_BYTES = 1 << 16  # of a body
SENT_SECONDS = 0.02  # for which the engine waits until first tokens are sent
ENGINE_SECONDS = 0.25  # for the token that is being decoded when the server ends
R = TypeVar("R")


class Api:
    """The application, over an engine that has been started."""

    def __init__(
        self, served: ServedModel, settings: Settings, engine: Engine, metrics: Metrics
    ) -> None:
        self._served, self._settings, self._engine = served, settings, engine
        self._metrics = metrics
        self._bodies, self._in_flight = Bodies(), InFlight()
        self._threads = ThreadPoolExecutor(N_THREADS)
        self._large_thread = ThreadPoolExecutor(1)  # a thread keeps the memory of a long text
        # the tokenizers library can take a quarter of a second for a few bytes
        is_fast = isinstance(served.tokenizer, CharTokenizer | FixedCharTokenizer)
        self._small_bytes = SMALL_BYTES if is_fast else 0
        self._random = Random()  # the system's random numbers would cost Python's lock each time
        self._attention_lock, self._copies_lock = asyncio.Lock(), asyncio.Lock()
        self._large_lock = asyncio.Lock()
        self._files = {path: _read_file(*entry) for path, entry in PAGE.items()}

    def app(self) -> App:
        """Return the ASGI application."""
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
            Route("/copies", self._copies, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {
            ApiError: _api_error,
            HTTPException: _http_error,
            TokenizerError: _tokenizer_error,
            Exception: _internal_error,
        }
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        return Guard(app, self._settings, self._metrics, {route.path for route in routes})

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()

        def deliver(requests: list[Request]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop ended before this token
                loop.call_soon_threadsafe(_notify, requests)

        sent = threading.Event()

        def wait_until_sent() -> None:
            sent.clear()
            with contextlib.suppress(RuntimeError):
                # a turn later than the notices, when their pieces are sent
                loop.call_soon_threadsafe(loop.call_soon, sent.set)
                sent.wait(SENT_SECONDS)

        self._engine.deliver, self._engine.wait_until_sent = deliver, wait_until_sent
        self._engine.call_soon = loop.call_soon
        self._stopped = loop.create_future()
        yield
        self.stop()
        self._engine.stop(ENGINE_SECONDS)

    def stop(self) -> None:
        """End all requests: streams with an error event, whole answers with 503."""
        self._in_flight.stop()
        if not self._stopped.done():
            self._stopped.set_result(None)

    # Texts

    async def _completions(self, request: HttpRequest) -> Response:
        submitted = await self._submit(request, CompletionBody, read_completion)
        return await self._respond(request, *submitted, is_chat=False)

    async def _chat(self, request: HttpRequest) -> Response:
        submitted = await self._submit(request, ChatBody, read_chat)
        return await self._respond(request, *submitted, is_chat=True)

    async def _root(self, request: HttpRequest) -> Response:
        """Send the page, or continue a prompt as the ancestor projects do."""
        if request.method != "POST":
            return await self._page(request)
        generation, submission = await self._submit(request, PlainBody, read_plain)
        try:
            [text] = await submission.wait(request)
        finally:
            submission.close()
        usage = generation.usage([text])
        del usage["total_tokens"]
        body = {
            "text": text.sample.text,
            "model": self._served.name,
            "usage": usage,
            "warnings": list(generation.warnings),
        }
        return json_response(body)

    async def _respond(
        self,
        request: HttpRequest,
        generation: GenerationRequest,
        submission: Submission,
        *,
        is_chat: bool,
    ) -> Response:
        builder = ResponseBuilder(
            served=self._served,
            generation=generation,
            id=f"{'chatcmpl' if is_chat else 'cmpl'}-{self._random.getrandbits(128):032x}",
            created=int(time.time()),
            is_chat=is_chat,
        )
        if generation.stream:
            return submission.stream(builder)
        try:
            texts = await submission.wait(request)
            content = await self._in_thread(lambda: dump(builder.whole(texts)))
        except BaseException:
            submission.close()
            raise
        headers = {"content-type": "application/json", "content-length": str(len(content))}
        return PieceResponse(cut(content), submission.close, headers)

    async def _submit(
        self,
        request: HttpRequest,
        model: type[B],
        read: Callable[[B, ServedModel, Settings, int], GenerationRequest],
    ) -> tuple[GenerationRequest, Submission]:
        """Submit the texts of a request; until then its body counts among those being read."""
        seed = self._random.getrandbits(31)

        def check(content: bytes) -> tuple[GenerationRequest, list[Continuation]]:
            body, ignored = parse(content, model)
            try:
                generation = read(body, self._served, self._settings, seed)
            except UserError as error:  # of the tokenizer
                raise ApiError(400, f"the text cannot be encoded: {error}") from error
            return generation.with_ignored(ignored), generation.continuations(self._served)

        async with self._bodies.read(request) as content:
            generation, texts = await self._check(check, content)
            submission = Submission(
                texts,
                self._engine,
                self._metrics,
                self._in_flight,
                cost=generation.cost,
                each_token=generation.stream,
            )
        return generation, submission

    async def _check(self, check: Callable[[bytes], R], content: bytes) -> R:
        """Return check(content): at once if that takes less time than another thread, or in one."""
        if len(content) <= self._small_bytes:
            return check(content)
        if len(content) <= LARGE_BYTES:
            return await self._in_thread(check, content)
        async with self._large_lock:  # they hold Python's lock for long; others come between two
            return await self._in_thread(check, content, threads=self._large_thread)

    async def _in_thread(
        self, work: Callable[..., R], *values: object, threads: ThreadPoolExecutor | None = None
    ) -> R:
        """Return work(*values), done in a thread; ApiError 503 if the server stops before."""
        if self._stopped.done():
            raise stopping()
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(threads or self._threads, work, *values)
        await asyncio.wait((running, self._stopped), return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            return running.result()
        running.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        running.cancel()
        raise stopping()

    # Other routes

    async def _models(self, request: HttpRequest) -> Response:
        return json_response({"object": "list", "data": [self._model_object()]})

    async def _model(self, request: HttpRequest) -> Response:
        check_name(request.path_params["name"], self._served)
        return json_response(self._model_object())

    def _model_object(self) -> dict[str, Any]:
        served = self._served
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "mlx-randygpt",
            "context_length": served.model.block_size,
            "dialogue": has_dialogue(served.tokenizer),
        }

    async def _health(self, request: HttpRequest) -> Response:
        return json_response({"status": "ok", "model": self._served.name})

    async def _render_metrics(self, request: HttpRequest) -> Response:
        self._metrics.set("memory_bytes", resident_bytes())
        return Response(self._metrics.render(), media_type="text/plain; version=0.0.4")

    async def _openapi(self, request: HttpRequest) -> Response:
        return json_response(describe(self._served, bool(self._settings.api_key)))

    async def _run(self, request: HttpRequest) -> Response:
        facts = describe_run(self._served, self._settings.defaults, self._engine.backend_name)
        return json_response(facts)

    async def _attention(self, request: HttpRequest) -> Response:
        lock = self._attention_lock  # one at a time: each is a forward pass
        return await self._inspect(request, AttentionBody, lock, map_attention)

    async def _copies(self, request: HttpRequest) -> Response:
        lock = self._copies_lock  # one at a time: each reads the whole text
        return await self._inspect(request, CopiesBody, lock, report_copies)

    async def _inspect(
        self,
        request: HttpRequest,
        model: type[B],
        lock: asyncio.Lock,
        inspect: Callable[[ServedModel, B], dict[str, Any]],
    ) -> Response:
        async with self._bodies.read(request) as content:
            body, _ = await self._in_thread(parse, content, model)
        async with lock:
            return json_response(await self._in_thread(inspect, self._served, body))

    async def _page(self, request: HttpRequest) -> Response:
        content, media_type = self._files[request.url.path]
        return Response(content, media_type=media_type, headers={"cache-control": "no-cache"})


def _notify(requests: list[Request]) -> None:
    for request in requests:
        request.notify()


# Starlette would run a handler that is not `async` in threads of its own


async def _api_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _tokenizer_error(request: HttpRequest, error: Exception) -> Response:
    return error_response(ApiError(400, str(error)))


async def _internal_error(request: HttpRequest, error: Exception) -> Response:
    return error_response(ApiError(500, "internal error"))


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    """Return the router's 404 or 405 as an error object."""
    assert isinstance(error, HTTPException)
    message = f"cannot {request.method} {request.url.path[:100]}: {error.detail}"
    response = error_response(ApiError(error.status_code, message))
    response.headers.update(error.headers or {})
    return response


def _read_file(name: str, media_type: str) -> tuple[bytes, str]:
    return (resources.files("mlx_randygpt.serve") / "page" / name).read_bytes(), media_type
