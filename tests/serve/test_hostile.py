"""Requests that once failed, blocked the server or filled its memory, by class."""

from __future__ import annotations

import json
import math
import threading
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
from mlx_randygpt.serve import Settings
from mlx_randygpt.serve.http import dump
from mlx_randygpt.serve.responses import MAX_ENTRIES
from mlx_randygpt.state import TrainState
from mlx_randygpt.tokenizers.chars import CharTokenizer
from mlx_randygpt.tokenizers.subword import SubwordTokenizer

LETTERS = "".join(map(chr, range(32, 127))) + "\n"


@pytest.fixture(scope="module")
def make_host(tiny_model: Any, tiny_train: Any, lively: Any) -> Iterator[Callable[..., Host]]:
    """Start a server of a model that knows these characters; all are stopped at the end."""
    hosts = []

    def start(chars: str = LETTERS, tokenizer: Any = None, **settings: Any) -> Host:
        tokenizer = tokenizer or CharTokenizer.train(chars)
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


# Fields that other clients send


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    "extra",
    [
        {"functions": None}, {"tools": None, "tool_choice": None}, {"anything": None},
        {"seed": -1}, {"tools": []}, {"tool_choice": "none"}, {"parallel_tool_calls": True},
        {"response_format": {"type": "text"}}, {"x_request_id": "7"}, {"cache_prompt": True},
        {"stream_options": None}, {"stop": None}, {"min_tokens": 0}, {"": 1},
        {"main": [1]}, {"__main__": [1]},
    ],
)  # fmt: skip
def test_fields_that_do_not_change_the_text_are_accepted(extra: Any, host: Host) -> None:
    answers = complete(host, prompt="a", **extra), chat(host, USER, **extra)
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"functions": [{"name": "f"}]}, "functions"), ({"tools": [{}]}, "tools"),
        ({"min_tokens": 5}, "min_tokens"), ({"guided_regex": "a+"}, "guided_regex"),
        ({"topk": 3}, "topk"), ({"maxTokens": 3}, "maxTokens"), ({"temprature": 1}, "temprature"),
        ({"mirostat_tau": 1.0}, "mirostat_tau"),
    ],
)  # fmt: skip
def test_unknown_fields_that_would_change_the_text_are_refused(
    extra: Any, param: str, host: Host
) -> None:
    for answer in (complete(host, prompt="a", **extra), chat(host, USER, **extra)):
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param)
        assert error["message"].startswith(f"Unknown parameter: '{param}'")


def test_seed_minus_one_draws_a_seed_even_if_the_server_has_one(
    make_host: Callable[..., Host],
) -> None:
    fixed = make_host(settings=Settings(seed=7))
    assert complete(fixed, prompt="a").json()["seed"] == 7
    assert len({complete(fixed, prompt="a", seed=-1).json()["seed"] for _ in range(3)}) == 3


@pytest.mark.parametrize("role", ["assistant", "user"])
def test_null_content_is_empty(role: str, host: Host) -> None:
    null, empty = (
        chat(host, USER, {"role": role, "content": content, "tool_calls": None}, seed=3)
        for content in (None, "")
    )
    assert null.status_code == 200, null.text
    assert null.json()["choices"] == empty.json()["choices"]


# Line ends and byte order marks


@pytest.mark.parametrize("text", ["A\r\nB:", "A\rB:", "\ufeffA\nB:", "\ufeffA\r\nB:"])
def test_every_text_that_comes_in_has_one_kind_of_line_end(text: str, host: Host) -> None:
    settings = {"seed": 3, "max_tokens": 20, "echo": True}
    first, second = (complete(host, prompt=p, **settings).json() for p in (text, "A\nB:"))
    assert first["choices"] == second["choices"]
    assert complete(host, prompt=[text], **settings).json()["choices"] == first["choices"]
    chats = [chat(host, {"role": "user", "content": p}, seed=3).json() for p in (text, "A\nB:")]
    assert chats[0]["choices"] == chats[1]["choices"]
    plain = [httpx.post(host.url, json={"prompt": p, "seed": 3}).json() for p in (text, "A\nB:")]
    assert plain[0] == plain[1]


@pytest.mark.parametrize("stop", ["\r\n", "\r", ["\r\n"], "\n"])
def test_a_stop_text_with_any_line_end_matches(stop: Any, host: Host) -> None:
    newline = str(host.run.tokenizer.encode("\n")[0])
    body = {"seed": 3, "max_tokens": 9, "logit_bias": {newline: 100}, "stop": stop}
    choice = complete(host, prompt="a", **body).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")


# Size


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a", "max_tokens": 32768, "n": 64, "logprobs": 20},
        {"prompt": "a", "max_tokens": 32768, "n": 8, "logprobs": 20, "stream": True},
        {"prompt": ["a"] * 64, "max_tokens": 32768},
        {"prompt": ["a" * 60_000] * 16, "max_tokens": 0, "echo": True, "logprobs": 20,
         "truncate_prompt": True},
    ],
)  # fmt: skip
def test_an_answer_that_would_be_too_large_is_refused(body: dict[str, Any], host: Host) -> None:
    before = host.metrics.value("prompt_tokens_total")
    answer = complete(host, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_tokens")
    assert host.metrics.value("prompt_tokens_total") == before


# Warnings


@pytest.mark.parametrize(
    ("path", "body", "warning"),
    [
        ("/v1/completions", {"prompt": "aéb"}, "1 character of the prompt is unknown"),
        ("/v1/completions", {"prompt": "aéb", "stream": True}, "1 character"),
        ("/v1/completions", {"prompt": "a" * 65, "truncate_prompt": True}, "65 tokens"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "é"}]}, "'é'"),
        ("/v1/chat/completions", {"messages": [USER] * 9}, "oldest messages"),
        ("/v1/completions", {"prompt": "a", "x_thing": 3}, "ignored fields: 'x_thing'"),
        ("/", {"prompt": "é" * 80}, "80 characters"),
    ],
)
def test_an_answer_says_what_the_model_did_not_see(
    path: str, body: Any, warning: str, host: Host
) -> None:
    answer = httpx.post(host.url + path, json={"max_tokens": 3, **body})
    first = events(answer)[0] if body.get("stream") else answer.json()
    assert warning in "; ".join(first["warnings"])


def test_an_ordinary_answer_has_no_warnings(host: Host) -> None:
    assert complete(host, prompt="a").json()["warnings"] == []
    assert chat(host, USER).json()["warnings"] == []


# Offsets, and the event loop


def pieces_of(answer: httpx.Response) -> dict[str, list[Any]]:
    rows: dict[str, list[Any]] = {}
    for part in events(answer):
        for choice in part["choices"]:
            for name, values in choice["logprobs"].items():
                rows.setdefault(name, []).extend(values)
            rows.setdefault("text", []).append(choice["text"])
    return rows


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [95, 40, 41, 97], "echo": True}, {"prompt": "aéb", "echo": True},
        {"prompt": "", "echo": True}, {"prompt": "ab"}, {"prompt": "ab", "stop": ["e", "s t"]},
        {"prompt": "ab", "echo": True, "max_tokens": 0}, {"prompt": "ab", "stop": "a", "n": 3},
        {"prompt": "x" * 60, "echo": True, "max_tokens": 200},
    ],
)  # fmt: skip
def test_offsets_are_places_in_the_text(body: dict[str, Any], host: Host) -> None:
    body = {"seed": 3, "logprobs": 20, "max_tokens": 40, **body}
    for choice in complete(host, **body).json()["choices"]:
        rows, text = choice["logprobs"], choice["text"]
        assert all(0 <= at <= len(text) for at in rows["text_offset"])
        assert rows["text_offset"] == sorted(rows["text_offset"])
        names = zip(rows["tokens"], rows["text_offset"], strict=True)
        plain = [(name, at) for name, at in names if len(name) == 1 and at < len(text)]
        assert all(text[at] in (name, "é") for name, at in plain)
    if "n" not in body:
        streamed = pieces_of(complete(host, stream=True, **body))
        assert "".join(streamed.pop("text")) == text
        assert streamed == rows


def test_a_chunk_of_a_stream_is_bounded(host: Host) -> None:
    body = {"prompt": "x" * 60, "echo": True, "max_tokens": 200, "logprobs": 20, "seed": 3}
    parts = events(complete(host, stream=True, **body))
    sizes = [len(c["logprobs"]["tokens"]) for part in parts for c in part["choices"]]
    assert max(sizes) * 21 <= MAX_ENTRIES
    assert sum(sizes) > 60


def test_large_json_is_the_same_in_pieces() -> None:
    rows = [{"a": i, "b": [None, 0.5, "é\ud800"], "c": {}} for i in range(200)]
    for value in (
        {},
        [],
        {"x": rows, "y": [rows[0]] * 3, "z": []},
        [1],
        "a",
        {"": list(range(99))},
    ):
        assert json.loads(dump(value)) == json.loads(json.dumps(value))


def backtracking_tokenizer() -> SubwordTokenizer:
    """Return a tokenizer that takes long for a few letters, and then fails."""
    pytest.importorskip("tokenizers")
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    model = {"type": "BPE", "vocab": {"a": 0, "!": 1}, "merges": []}
    content = {"version": "1.0", "model": model, "pre_tokenizer": {**pattern, "invert": False}}
    return SubwordTokenizer.from_file(json.dumps(content))


def test_a_slow_tokenizer_is_not_called_in_the_event_loop(
    make_host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, tokenizer = list[str](), backtracking_tokenizer()
    encode = tokenizer.encode

    def record(text: str) -> Any:
        threads.append(threading.current_thread().name)
        return encode(text)

    host = make_host(tokenizer=tokenizer)
    monkeypatch.setattr(SubwordTokenizer, "encode", lambda self, text: record(text))
    body = {"prompt": "a", "max_tokens": 1}
    assert httpx.post(f"{host.url}/v1/completions", json=body, timeout=60).status_code == 200
    assert threads
    assert all(name.startswith("ThreadPoolExecutor") for name in threads)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a" * 34 + "!"}),
        ("/v1/completions", {"prompt": "a" * 34 + "!", "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 34 + "!"}]}),
        ("/attention", {"text": "a" * 34 + "!", "layer": 0, "head": 0}),
    ],
)
def test_a_text_that_the_tokenizer_fails_on_is_a_bad_request(
    path: str, body: dict[str, Any], make_host: Callable[..., Host]
) -> None:
    host = make_host(tokenizer=backtracking_tokenizer())
    answer = httpx.post(f"{host.url}{path}", json=body, timeout=60)
    assert answer.status_code == 400
    assert "the text cannot be encoded" in answer.json()["error"]["message"]
