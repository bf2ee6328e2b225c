"""Requests that once failed, blocked the server or filled its memory, by class."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")
pytest.importorskip("pydantic")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import httpx
from served import Host

from mlx_randygpt.backends import make_backend
from mlx_randygpt.state import TrainState
from mlx_randygpt.tokenizers.chars import CharTokenizer

LETTERS = "".join(map(chr, range(32, 127))) + "\n"


@pytest.fixture(scope="module")
def make_host(tiny_model: Any, tiny_train: Any, lively: Any) -> Iterator[Callable[..., Host]]:
    """Start a server of a model that knows these characters; all are stopped at the end."""
    hosts = []

    def start(chars: str = LETTERS, **settings: Any) -> Host:
        tokenizer = CharTokenizer.train(chars)
        model = tiny_model("modern", vocab_size=tokenizer.vocab_size, block_size=64)
        train = tiny_train("modern")
        run = SimpleNamespace(model=model, train=train, tokenizer=tokenizer)
        backend = make_backend("numpy", model, train, TrainState(3, lively(model), {}))
        hosts.append(Host(run, backend, **settings))
        hosts[-1].start()
        return hosts[-1]

    yield start
    for host in hosts:
        host.stop()


@pytest.fixture(scope="module")
def host(make_host: Callable[..., Host]) -> Host:
    return make_host()


@pytest.fixture(scope="module")
def two_letters(make_host: Callable[..., Host]) -> Host:
    return make_host("ab")


def complete(host: Host, **body: Any) -> httpx.Response:
    return httpx.post(f"{host.url}/v1/completions", json={"max_tokens": 3, **body}, timeout=60)


def chat(host: Host, *messages: dict[str, Any], **body: Any) -> httpx.Response:
    body = {"max_tokens": 3, "messages": list(messages), **body}
    return httpx.post(f"{host.url}/v1/chat/completions", json=body, timeout=60)


def events(answer: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def logprobs_in(choice: Any) -> Iterator[float | None]:
    rows = choice["logprobs"]
    yield from rows["token_logprobs"]
    for top in rows["top_logprobs"]:
        yield from (top or {}).values()


# Log-probabilities


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "ab", "max_tokens": 1, "logprobs": 5},
        {"prompt": "ab", "logprobs": 20, "logit_bias": {"0": -100, "1": -100}},
        {"prompt": "axb", "max_tokens": 0, "echo": True, "logprobs": 0},
        {"prompt": [0, 2, 1], "echo": True, "logprobs": 1},
        {"prompt": [2, 3, 4, 4], "echo": True, "logprobs": 20},
        {"prompt": "", "echo": True, "logprobs": 20},
    ],
)
def test_logprobs_are_finite_for_every_prompt(
    body: dict[str, Any], stream: bool, two_letters: Host
) -> None:
    answer = complete(two_letters, seed=3, stream=stream, **body)
    assert answer.status_code == 200, answer.text
    choices = [
        choice for part in (events(answer) if stream else [answer.json()])
        for choice in part["choices"]
    ]  # fmt: skip
    values = [p for choice in choices for p in logprobs_in(choice)]
    assert len(values) > 1
    assert all(p is None or -math.inf < p <= 0 for p in values)
    names = {name for c in choices for top in c["logprobs"]["top_logprobs"] for name in top or {}}
    assert names <= {"a", "b", "<eos>"}


def test_logprobs_do_not_depend_on_bans_and_filters(two_letters: Host) -> None:
    plain, filtered = (
        complete(two_letters, prompt="a", max_tokens=1, logprobs=3, **body).json()
        for body in ({}, {"logit_bias": {"0": -100}, "top_k": 1, "temperature": 0.1})
    )
    tops = [body["choices"][0]["logprobs"]["top_logprobs"][0] for body in (plain, filtered)]
    assert tops[0] == tops[1]
    assert sum(math.exp(p) for p in tops[0].values()) < 1  # the banned tokens have the rest
