"""What a request asks for: settings, prompts as tokens, one writer for each text it wants.

Everything here is done before a text may wait for the engine; what does not fit is an ApiError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_randygpt.config import ConfigError
from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.sampling.generate import Continuation
from mlx_randygpt.serve import MAX_CHOICES, MAX_TOKENS, ApiError, ServedModel, Settings

ROLES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}
ENDS = ("\nUser:", "\nSystem:")  # where an answer ends
INTEGERS = ("max_tokens", "top_k")
NUMBERS = (
    "temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty",
)  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and as tokens."""

    text: str
    ids: list[int]


@dataclass(frozen=True)
class GenerationRequest:
    """A request that may be carried out."""

    prompts: list[Prompt]
    n: int  # texts of each
    config: SampleConfig
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    n_likely: int | None = None  # None: no log-probabilities

    def writers(self, served: ServedModel) -> list[Continuation]:
        """One for each text, prompt by prompt; each reads as it would alone."""
        return [self._writer(prompt, i, served) for prompt in self.prompts for i in range(self.n)]

    def _writer(self, prompt: Prompt, index: int, served: ServedModel) -> Continuation:
        read, forced = prompt.ids, list[int]()
        if self.echo and self.n_likely is not None:  # the choices of the prompt are asked for
            read, forced = read[:1], read[1:]
        try:
            writer = Continuation(served.tokenizer, read, self.config, index, self.n_likely, forced)
        except ConfigError as error:
            raise ApiError(400, str(error), param="logit_bias") from error
        if self.config.max_tokens == 0 and not forced:
            writer.sample.finish_reason = "length"
        return writer


def completion(
    body: Mapping[str, Any], served: ServedModel, settings: Settings, drawn: int
) -> GenerationRequest:
    """`POST /v1/completions`; `drawn` is the seed where nobody names one."""
    _check_model(body, served)
    prompts = [_prompt(given, served) for given in _prompts(body["prompt"])]
    n = int(body.get("n") or 1)
    if len(prompts) * n > MAX_CHOICES:
        raise ApiError(
            400, f"{len(prompts)} prompts times n={n} is more than {MAX_CHOICES} texts", param="n"
        )
    if (best_of := body.get("best_of")) is not None and best_of != n:
        raise ApiError(400, f"best_of={best_of} is not n={n}; all texts are given", param="best_of")
    if not body.get("truncate_prompt"):
        for prompt in prompts:
            _check_length(prompt, served)
    logprobs = body.get("logprobs")
    return GenerationRequest(
        prompts, n, _config(body, settings, drawn), *_streaming(body), bool(body.get("echo")),
        None if logprobs is None else int(logprobs),
    )  # fmt: skip


def chat(
    body: Mapping[str, Any], served: ServedModel, settings: Settings, drawn: int
) -> GenerationRequest:
    """`POST /v1/chat/completions`: the messages as a plain transcript."""
    _check_model(body, served)
    limit = body.get("max_completion_tokens")
    body = {**body, "max_tokens": body.get("max_tokens") if limit is None else limit}
    config = _config(body, settings, drawn)
    config = replace(config, stop=(*config.stop, *ENDS))
    if body.get("top_logprobs") is not None and not body.get("logprobs"):
        raise ApiError(400, "top_logprobs is given without logprobs", param="top_logprobs")
    n_likely = int(body.get("top_logprobs") or 0) if body.get("logprobs") else None
    prompt = transcript([(m["role"], _content(m["content"])) for m in body["messages"]], served)
    return GenerationRequest(
        [prompt], int(body.get("n") or 1), config, *_streaming(body), n_likely=n_likely
    )


def seed_shape(
    body: Mapping[str, Any], served: ServedModel, settings: Settings, drawn: int
) -> GenerationRequest:
    """`POST /`: prompt, max_tokens and temperature, without any other filter."""
    named = {"max_tokens": 2048, "temperature": 0.7, "top_p": 1.0, **body}
    prompt = _prompt(body["prompt"], served)
    return GenerationRequest([prompt], 1, _config(named, settings, drawn))


def transcript(messages: Sequence[tuple[str, str]], served: ServedModel) -> Prompt:
    """`User: …` and `Assistant: …`, a line each, then `Assistant:`. Of a talk that is longer than
    the context the oldest messages are left out; the last one has to fit."""
    lines = [f"{ROLES[role]}: {content}\n" for role, content in messages]
    for first in range(len(lines)):
        prompt = _prompt("".join(lines[first:]) + "Assistant:", served)
        if len(prompt.ids) <= served.model.block_size:
            return prompt
    _check_length(prompt, served)
    return prompt


def _prompts(given: Any) -> list[Any]:
    """The four shapes of a prompt as a list of texts or token lists."""
    if isinstance(given, str) or (isinstance(given[0], int | float)):
        return [given]
    return list(given)


def _prompt(given: Any, served: ServedModel) -> Prompt:
    """Text or token ids as both; an empty text begins a document."""
    tokenizer = served.tokenizer
    if isinstance(given, str):
        return Prompt(given, tokenizer.encode(given).tolist() or [tokenizer.bos])
    ids, most = [int(token) for token in given], tokenizer.vocab_size - 1
    if max(ids) > most:
        raise ApiError(400, f"token {max(ids)} is not known; ids are 0 to {most}", param="prompt")
    return Prompt(tokenizer.decode(ids), ids)


def _check_length(prompt: Prompt, served: ServedModel) -> None:
    n, size = len(prompt.ids), served.model.block_size
    if n > size:
        raise ApiError(
            400,
            f"This model's context is {size} tokens, the prompt has {n}; shorten it"
            " (completions: or send truncate_prompt, then its end is read)",
            param="prompt", code="context_length_exceeded",
        )  # fmt: skip


def _check_model(body: Mapping[str, Any], served: ServedModel) -> None:
    name = body.get("model")
    if name is not None and name != served.name:
        raise ApiError(
            404, f"The model {name[:100]!r} does not exist; this server has {served.name!r}",
            param="model", code="model_not_found",
        )  # fmt: skip


def _config(body: Mapping[str, Any], settings: Settings, drawn: int) -> SampleConfig:
    """The server's own settings, with those of the request over them."""
    given: dict[str, Any] = {}
    given |= {name: float(body[name]) for name in NUMBERS if body.get(name) is not None}
    given |= {name: int(body[name]) for name in INTEGERS if body.get(name) is not None}
    seed = settings.seed if body.get("seed") is None else int(body["seed"])
    given["seed"] = drawn if seed is None else seed
    if (stop := body.get("stop")) is not None:
        given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if (bias := body.get("logit_bias")) is not None:
        given["logit_bias"] = tuple((_token_id(i), float(x)) for i, x in bias.items())
    config = replace(settings.defaults, **given)
    return replace(config, max_tokens=min(config.max_tokens, MAX_TOKENS))


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise ApiError(400, f"logit_bias names {text[:40]!r}, not a token id", param="logit_bias")
    return int(text)


def _streaming(body: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether to stream, and whether with usage at the end."""
    stream, options = bool(body.get("stream")), body.get("stream_options")
    if options is not None and not stream:
        raise ApiError(400, "stream_options is given without stream", param="stream_options")
    return stream, bool((options or {}).get("include_usage"))


def _content(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
