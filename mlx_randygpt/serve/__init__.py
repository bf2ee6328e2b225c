"""A trained model behind HTTP: the OpenAI API, the shape of the seeds, metrics, and a page.

One thread owns the model (`engine`), and all requests are decoded together in one batch. The rest
is asynchronous and never touches a weight. Needs the extra `serve`; knows neither the command line
nor signals.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mlx_randygpt.config import ModelConfig
from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.state import Params
from mlx_randygpt.tokenizers import Tokenizer

MAX_TOKENS = 1 << 15  # of one text
MAX_CHOICES = 64  # texts of one request: prompts times n
MAX_LOGPROBS = 20
MAX_BODY_BYTES = 1 << 20
BODY_SECONDS = 30.0  # for a body to arrive


@dataclass(frozen=True)
class ServedModel:
    """The model that is served, and what may be told of it."""

    name: str
    model: ModelConfig
    tokenizer: Tokenizer
    params: Params
    created: int  # seconds since 1970
    fingerprint: str  # of the weights
    step: int
    prompt: str = ""  # of the run
    curve: dict[str, list[tuple[float, float]]] = field(
        default_factory=dict
    )  # name -> (step, loss)


@dataclass(frozen=True)
class Settings:
    """How it is served; the defaults are the command's."""

    api_key: str = ""  # empty asks for none
    defaults: SampleConfig = field(default_factory=SampleConfig)
    seed: int | None = None  # of requests that name none; None draws one each time
    loopback_only: bool = True  # then other Host names are refused: no page elsewhere can ask


class ApiError(Exception):
    """An answer that is an error, as the OpenAI API words it."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 403: "permission_error", 500: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        named = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": named}
