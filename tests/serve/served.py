"""A server for the tests: a small lively model behind a real socket, in a thread."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.sampling.generate import generate
from mlx_randygpt.serve import ServedModel, Settings
from mlx_randygpt.serve.api import Api
from mlx_randygpt.serve.engine import Engine
from mlx_randygpt.serve.metrics import Metrics
from mlx_randygpt.serve.server import Server

CURVE = {"loss": [(1.0, 3.0), (2.0, 2.5), (3.0, 2.0)], "val_loss": [(0.0, 3.1), (3.0, 2.2)]}


@dataclass
class Host:
    """Serves until `stop`; `text` is what the command would write."""

    run: Any
    backend: Any
    settings: Settings = field(default_factory=Settings)
    n_streams: int = 8
    n_waiting: int = 64
    n_connections: int = 100
    port: int = 0
    keeps_params: bool = True  # for attention maps
    find_copies: Callable[[str], dict[str, Any]] | None = None
    exits: list[int] = field(default_factory=list)  # signals after which it took too long
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
            options=("--checkpoint", "my runs/tale.safetensors"),
            curve=CURVE,
            find_copies=self.find_copies,
        )
        build = self.build or (lambda: self.backend)
        limits = {"n_streams": self.n_streams, "n_waiting": self.n_waiting}
        self.engine = Engine(build, run.model, self.metrics, **limits)
        self.engine.start()
        self._listening = socket.create_server(("127.0.0.1", self.port), backlog=200)
        self.port = self._listening.getsockname()[1]
        api = Api(served, self.settings, self.engine, self.metrics)
        stops = api.stop, self.n_connections, self.exits.append
        self.server = Server(api.app(), self._listening, *stops)
        self._thread = threading.Thread(target=self.server.serve_until_signal, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        if not self._thread.is_alive():
            return
        self.server.should_exit = True
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
