"""From a checked body to work for the engine: settings, prompts as tokens, one text per choice.

Everything that can be wrong with a request is an ApiError here, before a text joins the queue.
"""

from __future__ import annotations

import reprlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_randygpt.config import ConfigError
from mlx_randygpt.dialogue import Turn, fit_prompt, has_dialogue, render_prompt
from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.sampling.generate import Continuation
from mlx_randygpt.serve import MAX_CHOICES, MAX_COST, MAX_TOKENS, ApiError, ServedModel, Settings
from mlx_randygpt.serve.models import ChatBody, CompletionBody, Message, PlainBody, SamplingBody
from mlx_randygpt.words import unify_newlines

ANY_SEED = -1
MAX_SHOWN = 10  # unknown characters in a warning
ENDS = ("\nUser:", "\nSystem:")  # where an answer ends
FILTERS = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and as tokens."""

    text: str
    ids: list[int]


@dataclass(frozen=True)
class GenerationRequest:
    """A valid request for texts."""

    prompts: list[Prompt]
    config: SampleConfig
    n: int = 1  # texts of each prompt
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    n_likely: int | None = None  # None: no log-probabilities
    warnings: tuple[str, ...] = ()  # what was done differently than the request may expect

    @property
    def cost(self) -> int:
        """Return how many tokens and alternatives the answer can have, and a share of the prompts.

        A prompt's token takes about an eighth of the memory, once for each text.
        """
        n_prompt = sum(len(prompt.ids) for prompt in self.prompts)
        n_forced = n_prompt if self.echo and self.n_likely is not None else 0
        n_tokens = self.n * (len(self.prompts) * self.config.max_tokens + n_forced)
        return n_tokens * (1 + (self.n_likely or 0)) + (1 + self.n) * n_prompt // 8

    def with_ignored(self, names: Sequence[str]) -> GenerationRequest:
        """Return the request with a warning about fields without meaning here."""
        if not names:
            return self
        shown = ", ".join(reprlib.repr(name) for name in names[:MAX_SHOWN])
        more = ", …" if len(names) > MAX_SHOWN else ""
        return replace(self, warnings=(*self.warnings, f"ignored fields: {shown}{more}"))

    def check_cost(self) -> GenerationRequest:
        """Return the request; raise ApiError 400 if the answer could be too large."""
        if self.cost > MAX_COST:
            message = (
                f"{len(self.prompts) * self.n} texts times max_tokens={self.config.max_tokens}"
                f" with {self.n_likely or 0} alternatives is {self.cost} tokens;"
                f" at most {MAX_COST} are possible: lower n, max_tokens or logprobs"
            )
            raise ApiError(400, message, param="max_tokens")
        return self

    def continuations(self, served: ServedModel) -> list[Continuation]:
        """Return one continuation for each text, prompt by prompt."""
        return [self._begin(prompt, i, served) for prompt in self.prompts for i in range(self.n)]

    def usage(self, texts: Sequence[Continuation]) -> dict[str, int]:
        """Return the token counts of the prompts and of these texts, as the OpenAI API has them."""
        n_prompt = sum(len(prompt.ids) for prompt in self.prompts)
        n_text = sum(len(text.sample.ids) for text in texts)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_text,
            "total_tokens": n_prompt + n_text,
        }

    def _begin(self, prompt: Prompt, index: int, served: ServedModel) -> Continuation:
        ids, forced = prompt.ids, list[int]()
        if self.echo and self.n_likely is not None:  # score the prompt's tokens too
            ids, forced = ids[:1], ids[1:]
        try:
            text = Continuation(served.tokenizer, ids, self.config, index, self.n_likely, forced)
        except ConfigError as error:
            raise ApiError(400, str(error), param="logit_bias") from error
        if self.config.max_tokens == 0 and not forced:
            text.sample.finish_reason = "length"
        return text


def read_completion(
    body: CompletionBody, served: ServedModel, settings: Settings, drawn_seed: int
) -> GenerationRequest:
    """Read `POST /v1/completions`; `drawn_seed` is used if neither request nor server has one."""
    _check_model(body, served)
    prompts = [_prompt(prompt, served) for prompt in _list_prompts(body.prompt)]
    n = body.n or 1
    if len(prompts) * n > MAX_CHOICES:
        message = f"{len(prompts)} prompts times n={n} is {len(prompts) * n} texts"
        raise ApiError(400, f"{message}; at most {MAX_CHOICES} are possible", param="n")
    if body.best_of is not None and body.best_of != n:
        message = f"best_of={body.best_of} must equal n={n}: all texts are returned"
        raise ApiError(400, message, param="best_of")
    if not body.truncate_prompt:
        for prompt in prompts:
            _check_length(prompt, served)
    return GenerationRequest(
        prompts=prompts,
        config=_config(body, settings, drawn_seed),
        n=n,
        stream=bool(body.stream),
        include_usage=_include_usage(body),
        echo=bool(body.echo),
        n_likely=body.logprobs,
        warnings=_warn(prompts, served),
    ).check_cost()


def read_chat(
    body: ChatBody, served: ServedModel, settings: Settings, drawn_seed: int
) -> GenerationRequest:
    """Read `POST /v1/chat/completions`: the messages become turns, or a plain transcript."""
    _check_model(body, served)
    if body.max_completion_tokens is not None:
        body = body.model_copy(update={"max_tokens": body.max_completion_tokens})
    config = _config(body, settings, drawn_seed)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
    turns = turns_of(body.messages)
    if has_dialogue(served.tokenizer):
        prompt, n_dropped = dialogue(turns, served, config.max_tokens)
    else:
        prompt, n_dropped = transcript(turns, served)
        config = replace(config, stop=(*config.stop, *ENDS))
    dropped = (f"the {n_dropped} oldest messages do not fit into the context and were left out",)
    return GenerationRequest(
        prompts=[prompt],
        config=config,
        n=body.n or 1,
        stream=bool(body.stream),
        include_usage=_include_usage(body),
        n_likely=body.top_logprobs or 0 if body.logprobs else None,
        warnings=(*_warn([prompt], served), *(dropped if n_dropped else ())),
    ).check_cost()


def read_plain(
    body: PlainBody, served: ServedModel, settings: Settings, drawn_seed: int
) -> GenerationRequest:
    """Read `POST /`: prompt, max_tokens, temperature and seed, with no other filter."""
    sampling = SamplingBody(top_p=1.0, **body.model_dump(exclude={"prompt"}))
    config = _config(sampling, settings, drawn_seed)
    prompts = [_prompt(body.prompt, served)]
    request = GenerationRequest(prompts=prompts, config=config, warnings=_warn(prompts, served))
    return request.check_cost()


def turns_of(messages: Sequence[Message]) -> list[Turn]:
    """Return messages as turns; "developer" is another name of the system."""
    return [
        Turn("system" if message.role == "developer" else message.role, _text_of(message))
        for message in messages
    ]


def dialogue(turns: Sequence[Turn], served: ServedModel, max_tokens: int) -> tuple[Prompt, int]:
    """Return turns as a model of dialogue reads them, and how many of the oldest were dropped.

    The system's turn at the beginning is kept; with it the last one must fit into the context.
    """
    kept, n_dropped = fit_prompt(turns, served.tokenizer, served.model.block_size, max_tokens)
    ids = render_prompt(kept, served.tokenizer).tolist()
    prompt = Prompt("\n".join(turn.text for turn in kept), ids)
    _check_length(prompt, served)
    return prompt, n_dropped


def transcript(turns: Sequence[Turn], served: ServedModel) -> tuple[Prompt, int]:
    """Return turns as `User: …` and `Assistant: …` lines, followed by `Assistant:`.

    The oldest are dropped until the rest fits into the context; the last must fit. Also returns how
    many were dropped.
    """
    lines = [f"{turn.role.capitalize()}: {turn.text}\n" for turn in turns]

    def prompt_from(first: int) -> Prompt:
        return _prompt("".join(lines[first:]) + "Assistant:", served)

    def fits(first: int) -> bool:
        return len(prompt_from(first).ids) <= served.model.block_size

    # by bisection, since every attempt encodes the rest of the conversation
    first = bisect_left(range(len(lines) - 1), True, key=fits)
    prompt = prompt_from(first)
    _check_length(prompt, served)
    return prompt, first


def check_name(name: str, served: ServedModel) -> None:
    """Raise ApiError 404 unless `name` is the served model's."""
    if name != served.name:
        message = f"The model {name[:100]!r} does not exist; this server has {served.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _list_prompts(prompt: str | list[Any]) -> list[Any]:
    """Return a prompt of any of the four forms as a list of texts or token lists."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def _prompt(prompt: str | list[int], served: ServedModel) -> Prompt:
    """Return text or token ids as both; an empty text becomes BOS."""
    tokenizer = served.tokenizer
    if isinstance(prompt, str):
        prompt = unify_newlines(prompt)
        return Prompt(prompt, tokenizer.encode(prompt).tolist() or [tokenizer.bos])
    last = tokenizer.vocab_size - 1
    if max(prompt) > last:
        message = f"prompt has token {max(prompt)}; token ids are 0 to {last}"
        raise ApiError(400, message, param="prompt")
    return Prompt(tokenizer.decode(prompt), prompt)


def _warn(prompts: Sequence[Prompt], served: ServedModel) -> tuple[str, ...]:
    """Return what the model does not see of the prompts."""
    warnings, size = [], served.model.block_size
    unknown = Counter[str]()
    for text in dict.fromkeys(prompt.text for prompt in prompts):
        unknown.update(served.tokenizer.unknown(text))
    if unknown:
        shown = ", ".join(repr(char) for char, _ in unknown.most_common(MAX_SHOWN))
        more = ", …" if len(unknown) > MAX_SHOWN else ""
        n = sum(unknown.values())
        are = "characters of the prompt are" if n > 1 else "character of the prompt is"
        warnings.append(f"{n} {are} unknown to the model: {shown}{more}")
    if longest := max((n for p in prompts if (n := len(p.ids)) > size), default=0):
        warnings.append(
            f"the prompt has {longest} tokens, the context {size}; only the end was used"
        )
    return tuple(warnings)


def _check_length(prompt: Prompt, served: ServedModel) -> None:
    n, size = len(prompt.ids), served.model.block_size
    if n > size:
        message = (
            f"This model's context is {size} tokens, the prompt has {n}; shorten it"
            " (completions: or send truncate_prompt to use its end)"
        )
        raise ApiError(400, message, param="prompt", code="context_length_exceeded")


def _check_model(body: SamplingBody, served: ServedModel) -> None:
    if body.model is not None:
        check_name(body.model, served)


def _config(body: SamplingBody, settings: Settings, drawn_seed: int) -> SampleConfig:
    """Return the server's settings, overridden by those of the request."""
    seed = drawn_seed if settings.seed is None else settings.seed
    changes: dict[str, Any] = {"seed": seed}
    changes |= {k: value for k in FILTERS if (value := getattr(body, k)) is not None}
    if body.seed == ANY_SEED:
        changes["seed"] = drawn_seed
    if body.stop is not None:
        changes["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.logit_bias is not None:
        changes["logit_bias"] = tuple((_token_id(k), x) for k, x in body.logit_bias.items())
    config = replace(settings.defaults, **changes)
    return replace(config, max_tokens=min(config.max_tokens, MAX_TOKENS))


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        message = f"logit_bias has the key {text[:40]!r}; keys must be token ids such as '17'"
        raise ApiError(400, message, param="logit_bias")
    return int(text)


def _include_usage(body: SamplingBody) -> bool:
    """Return whether a stream ends with its usage."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream=true", param="stream_options")
    return bool(body.stream_options and body.stream_options.include_usage)


def _text_of(message: Message) -> str:
    content = message.content
    parts = [content] if isinstance(content, str) else [part.text for part in content or ()]
    return unify_newlines("".join(parts))
