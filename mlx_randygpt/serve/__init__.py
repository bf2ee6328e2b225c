"""Serve a trained model over HTTP: the OpenAI API, the ancestor projects' API, metrics, a page.

One thread owns the model (`engine`) and decodes all requests in one batch. The rest is
asynchronous and does not touch the weights. Needs the extra `serve`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from mlx_randygpt.config import ModelConfig
from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.state import Params
from mlx_randygpt.tokenizers import Tokenizer, token_speller

MAX_TOKENS = 1 << 15  # of one text
MAX_CHOICES = 64  # texts of one request: prompts times n
MAX_LOGPROBS = 20
MAX_COST = 1 << 19  # of one request: texts times tokens times (1 + alternatives)
MAX_COST_TOGETHER = 1 << 20  # of all requests whose responses are not complete
MAX_BODY_BYTES = 1 << 20
MAX_BODIES_BYTES = 1 << 25  # of all requests that are being read
N_THREADS = 4  # that read requests and write whole responses
BODY_SECONDS = 30.0  # for a body to arrive


@dataclass(frozen=True)
class ServedModel:
    """The served model and its public facts."""

    name: str
    model: ModelConfig
    tokenizer: Tokenizer
    params: Params
    created: int  # seconds since 1970
    fingerprint: str  # of the weights
    step: int
    prompt: str = ""  # of the run
    options: tuple[str, ...] = ()  # with which `mlxgpt sample` loads the same weights
    # name -> (step, loss)
    curve: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    # a generated text -> what it copies; None without --check
    find_copies: Callable[[str], dict[str, Any]] | None = None

    @cached_property
    def spell(self) -> Callable[[int], str]:
        """Return a function from a token id to its text, which keeps what it returned."""
        return cache(token_speller(self.tokenizer))


@dataclass(frozen=True)
class Settings:
    """How the model is served; the defaults are the command's."""

    api_key: str = ""  # empty: no key needed
    defaults: SampleConfig = field(default_factory=SampleConfig)
    seed: int | None = None  # of requests without one; None: draw one for each
    # accepted in Host besides loopback addresses, against DNS rebinding; None: any name
    host_names: tuple[str, ...] | None = ("localhost",)


class ApiError(Exception):
    """An error response in the format of the OpenAI API."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """Return the error object."""
        kinds = {401: "authentication_error", 403: "permission_error"}
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = kinds.get(self.status, default)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}
