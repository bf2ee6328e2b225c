"""A server for the tests: a small lively model behind a real socket, in a thread."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.sampling.generate import generate
from mlx_randygpt.serve import ServedModel, Settings
from mlx_randygpt.serve.api import Api
from mlx_randygpt.serve.engine import Engine
from mlx_randygpt.serve.metrics import Metrics

CURVE = {"loss": [(1.0, 3.0), (2.0, 2.5), (3.0, 2.0)], "val_loss": [(0.0, 3.1), (3.0, 2.2)]}


@dataclass
class Host:
    """Serves until `stop`; `text` is what the command would write."""

    run: Any
    backend: Any
    settings: Settings = field(default_factory=Settings)
    n_streams: int = 8
    n_waiting: int = 64
    port: int = 0
    keeps_params: bool = True  # for attention maps
    find_copies: Callable[[str], dict[str, Any]] | None = None
    build: Callable[[], Any] | None = None  # in the engine's thread, where not `backend`

    def start(self) -> None:
        run, self.metrics = self.run, Metrics()
        params = self.backend.state().params if self.keeps_params else {}
        served = ServedModel(
            name="tale",
            model=run.model,
            tokenizer=run.tokenizer,
            params=params,
            created=1,
            fingerprint="abc",
            step=3,
            prompt=run.train.prompt,
            curve=CURVE,
            find_copies=self.find_copies,
        )
        build = self.build or (lambda: self.backend)
        limits = {"n_streams": self.n_streams, "n_waiting": self.n_waiting}
        self.engine = Engine(build, run.model, self.metrics, **limits)
        self.engine.start()
        self._listening = socket.create_server(("127.0.0.1", self.port), backlog=200)
        self.port = self._listening.getsockname()[1]
        app = Api(served, self.settings, self.engine, self.metrics).app()
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, ws="none")
        self._server = uvicorn.Server(config)
        sockets = [self._listening]
        self._thread = threading.Thread(target=self._server.run, args=(sockets,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        self._listening.close()
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def text(self, prompt: str, index: int = 0, **config: Any) -> str:
        ids = self.run.tokenizer.encode(prompt).tolist() or [self.run.tokenizer.bos]
        settings = SampleConfig(**config)
        found = generate(self.backend, self.run.model, self.run.tokenizer, ids, settings, index + 1)
        *_, samples = found
        return str(samples[index].text)
