"""The server through a real socket: the official client, asking by hand, clients that misbehave."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("httpx")
pytest.importorskip("openai")
pytest.importorskip("prometheus_client")
pytest.importorskip("pydantic")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import httpx
import openai
from served import Host

from mlx_randygpt.backends import make_backend
from mlx_randygpt.dialogue import Turn, render_prompt
from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.sampling.generate import generate
from mlx_randygpt.serve import MAX_BODY_BYTES, Settings
from mlx_randygpt.state import TrainState
from mlx_randygpt.tokenizers.chars import CharTokenizer

MakeRun = Callable[..., tuple]  # type: ignore[type-arg]
ENDPOINTS = ["/", "/v1/completions", "/v1/chat/completions", "/attention", "/copies"]


@pytest.fixture(scope="module")
def lively_run(text: str, tiny_model: Any, tiny_train: Any, lively: Any) -> Any:
    """(model changes) -> a run whose model's chances are far from even, and its backend."""

    def build(**changes: Any) -> Any:
        tokenizer = CharTokenizer.train(text + "UserAssistantSystem:\n")
        model = tiny_model("modern", vocab_size=tokenizer.vocab_size, block_size=64, **changes)
        train = tiny_train("modern")
        run = SimpleNamespace(model=model, train=train, tokenizer=tokenizer)
        return run, make_backend("numpy", model, train, TrainState(3, lively(model), {}))

    return build


@pytest.fixture(scope="module")
def host(lively_run: Any) -> Iterator[Host]:
    host = Host(*lively_run())
    host.start()
    yield host
    host.stop()


@pytest.fixture(scope="module")
def client(host: Host) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{host.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def ask(client: Any, prompt: Any = "The old", **given: Any) -> Any:
    settings = {"seed": 3, "max_tokens": 20} | given
    return client.completions.create(model="tale", prompt=prompt, **settings)


# The official client, as it is


def test_a_completion_is_the_text_of_the_command(host: Host, client: Any) -> None:
    answer = ask(client)
    assert answer.choices[0].text == host.text("The old", seed=3, max_tokens=20)
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert (answer.object, answer.model) == ("text_completion", "tale")
    assert answer.usage.prompt_tokens == 7
    assert answer.usage.total_tokens == 7 + answer.usage.completion_tokens


def test_every_setting_reaches_the_text(host: Host, client: Any) -> None:
    ours = {
        "temperature": 1.1, "top_p": 0.8, "presence_penalty": 0.3, "frequency_penalty": 0.2,
        "stop": ["zz", "q"],
    }  # fmt: skip
    more = {"top_k": 9, "min_p": 0.01, "typical_p": 0.95, "repetition_penalty": 1.2}
    token = host.run.tokenizer.encode("e").tolist()[0]
    answer = ask(client, **ours, logit_bias={str(token): -3}, extra_body=more)
    config = ours | more | {"stop": ("zz", "q"), "logit_bias": ((token, -3.0),)}
    assert answer.choices[0].text == host.text("The old", seed=3, max_tokens=20, **config)


def test_prompts_are_text_tokens_or_lists_of_them(host: Host, client: Any) -> None:
    prompts = ["The old", "A king", ""]
    texts = [host.text(prompt, seed=3, max_tokens=20) for prompt in prompts]
    assert [c.text for c in ask(client, prompts).choices] == texts
    ids = [host.run.tokenizer.encode(prompt).tolist() for prompt in prompts[:2]]
    assert ask(client, ids[0]).choices[0].text == texts[0]
    assert [c.text for c in ask(client, ids).choices] == texts[:2]


def test_n_texts_are_the_samples_of_the_command(host: Host, client: Any) -> None:
    answer = ask(client, ["The old", "A king"], n=3)
    expected = [
        host.text(p, i, seed=3, max_tokens=20) for p in ("The old", "A king") for i in range(3)
    ]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == list(range(6))


def test_a_stream_is_the_text_in_pieces(host: Host, client: Any) -> None:
    pieces = list(ask(client, stream=True, n=2, stream_options={"include_usage": True}))
    texts = ["", ""]
    for piece in pieces[:-1]:
        for choice in piece.choices:
            texts[choice.index] += choice.text
    assert texts == [host.text("The old", i, seed=3, max_tokens=20) for i in range(2)]
    assert (pieces[-1].choices, pieces[-1].usage.prompt_tokens) == ([], 7)
    assert {piece.id for piece in pieces} == {pieces[0].id}
    assert len(pieces) >= sum(map(bool, texts)) + 1


def test_logprobs_and_echo(host: Host, client: Any) -> None:
    whole = ask(client, echo=True, logprobs=2).choices[0]
    rows = whole.logprobs
    assert "".join(rows.tokens).removesuffix("<eos>") == whole.text
    assert whole.text.startswith("The old")
    assert whole.text[7:] == host.text("The old", seed=3, max_tokens=20)
    assert rows.token_logprobs[0] is None
    assert all(p <= 0 for p in rows.token_logprobs[1:])
    assert all(len(top) == 2 for top in rows.top_logprobs[1:])
    assert rows.text_offset == [sum(map(len, rows.tokens[:i])) for i in range(len(rows.tokens))]
    streamed = {"tokens": [], "token_logprobs": [], "text_offset": []}  # type: ignore[var-annotated]
    for piece in ask(client, echo=True, logprobs=2, stream=True):
        for name, values in streamed.items():
            values += getattr(piece.choices[0].logprobs, name)
    assert streamed == {name: getattr(rows, name) for name in streamed}


def test_a_prompt_can_be_scored(client: Any) -> None:
    scored = ask(client, echo=True, logprobs=0, max_tokens=0)
    assert scored.choices[0].text == "The old"
    assert len(scored.choices[0].logprobs.token_logprobs) == 7
    assert (scored.usage.completion_tokens, scored.choices[0].finish_reason) == (0, "length")


def test_a_chat_goes_on_from_a_transcript(host: Host, client: Any) -> None:
    messages = [{"role": "system", "content": "Sing"}, {"role": "user", "content": "The old"}]
    settings = {"model": "tale", "messages": messages, "seed": 3, "max_tokens": 15}
    prompt = "System: Sing\nUser: The old\nAssistant:"
    expected = host.text(prompt, seed=3, max_tokens=15, stop=("\nUser:", "\nSystem:"))
    answer = client.chat.completions.create(**settings, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].message.role == "assistant"
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    pieces = list(client.chat.completions.create(**settings, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-1].choices[0].finish_reason in ("stop", "length")


def test_of_a_long_talk_the_oldest_messages_are_left_out(host: Host, client: Any) -> None:
    old = [{"role": "user", "content": "a hill " * 5}, {"role": "assistant", "content": "under"}]
    last = {"role": "user", "content": "The old"}
    settings = {"model": "tale", "seed": 3, "max_tokens": 9}
    long = client.chat.completions.create(messages=[*old, last], **settings)
    short = client.chat.completions.create(messages=[old[1], last], **settings)
    assert long.choices[0].message.content == short.choices[0].message.content
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=[{"role": "user", "content": "a" * 60}], **settings)
    assert caught.value.code == "context_length_exceeded"


@pytest.fixture
def dialogue(dialogue_run: Any) -> Iterator[tuple[Host, Any]]:
    """A server of a model of dialogue, and a client."""
    host = Host(*dialogue_run())
    host.start()
    with openai.OpenAI(base_url=f"{host.url}/v1", api_key="any", max_retries=0) as client:
        yield host, client
    host.stop()


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def answer_to(host: Host, messages: list[dict[str, str]], **config: Any) -> Any:
    """What the model answers to these turns as the renderer writes them."""
    tokenizer = host.run.tokenizer
    turns = [Turn(row["role"], row["content"]) for row in messages]
    ids, settings = render_prompt(turns, tokenizer).tolist(), SampleConfig(**config)
    *_, [sample] = generate(host.backend, host.run.model, tokenizer, ids, settings)
    return sample


def test_a_model_of_dialogue_gets_turns_and_stops_at_the_end_of_its_own(dialogue: Any) -> None:
    host, client = dialogue
    messages = [message("system", "Sing."), message("user", "The old <|end|> ship")]
    reasons = set()
    for seed in range(6):
        expected = answer_to(host, messages, seed=seed, max_tokens=60)
        settings = {"model": "tale", "messages": messages, "seed": seed, "max_tokens": 60}
        answer = client.chat.completions.create(**settings)
        [choice], usage = answer.choices, answer.usage
        assert (choice.message.content, choice.finish_reason) == (
            expected.text,
            expected.finish_reason,
        )
        assert usage.completion_tokens == len(expected.ids)
        pieces = list(client.chat.completions.create(**settings, stream=True))
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected.text
        assert pieces[-1].choices[0].finish_reason == expected.finish_reason
        assert answer.warnings == []
        reasons.add(choice.finish_reason)
    assert "stop" in reasons


def test_developer_is_another_name_of_system(dialogue: Any) -> None:
    _, client = dialogue
    asked = [message(role, "Sing.") for role in ("system", "developer")]
    answers = [
        client.chat.completions.create(
            model="tale", messages=[first, message("user", "king")], seed=3, max_tokens=9
        )
        for first in asked
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_a_long_conversation_loses_its_oldest_whole_turns(dialogue: Any) -> None:
    host, client = dialogue
    system, last = message("system", "Sing."), message("user", "The small grey bird")
    old = [message("user", "a red hill é"), message("assistant", "under the hill")]
    settings = {"model": "tale", "seed": 3, "max_tokens": 9}
    answer = client.chat.completions.create(messages=[system, *old, last], **settings)
    expected = answer_to(host, [system, last], seed=3, max_tokens=9)
    assert answer.choices[0].message.content == expected.text
    assert answer.warnings == [
        "the 2 oldest messages do not fit into the context and were left out"
    ]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=[message("user", "a" * 62)], **settings)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="'tool'; it must be 'system', 'developer', "):
        client.chat.completions.create(messages=[message("tool", "5")], **settings)


def test_a_models_object_says_whether_it_answers(host: Host, dialogue: Any) -> None:
    for served, expected in ((host, False), (dialogue[0], True)):
        [model] = httpx.get(f"{served.url}/v1/models").json()["data"]
        assert model["dialogue"] is expected


def test_attention_is_shown_of_a_text_or_of_messages(host: Host, dialogue: Any) -> None:
    def ask(served: Host, **body: Any) -> Any:
        return httpx.post(f"{served.url}/attention", json={"layer": 0, "head": 1, **body})

    turns = [message("developer", "Sing."), message("user", "king")]
    tokens = ask(dialogue[0], messages=turns).json()["tokens"]
    assert "".join(tokens) == "<|system|>Sing.<|end|><|user|>king<|end|>"
    assert ask(dialogue[0], text="king").json()["tokens"] == ["k", "i", "n", "g"]
    refused = ask(host, messages=turns), ask(host), ask(dialogue[0], text="a", messages=turns)
    assert [answer.status_code for answer in refused] == [400, 400, 400]
    assert "this model continues text" in refused[0].json()["error"]["message"]
    assert "either text or messages" in refused[1].json()["error"]["message"]


def test_models_are_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tale"]
    assert client.models.retrieve("tale").owned_by == "mlx-randygpt"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-9")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("given", "error", "param", "code"),
    [
        ({"prompt": "x" * 65}, openai.BadRequestError, "prompt", "context_length_exceeded"),
        ({"prompt": [9999]}, openai.BadRequestError, "prompt", None),
        ({"temperature": -1}, openai.BadRequestError, "temperature", None),
        ({"n": 65}, openai.BadRequestError, "n", None),
        ({"prompt": ["a"] * 40, "n": 2}, openai.BadRequestError, "n", None),
        ({"best_of": 2}, openai.BadRequestError, "best_of", None),
        ({"suffix": "x"}, openai.BadRequestError, "suffix", "invalid_type"),
        ({"logit_bias": {"9999": 1}}, openai.BadRequestError, "logit_bias", None),
        ({"logit_bias": {"e": 1}}, openai.BadRequestError, "logit_bias", None),
        ({"stream_options": {}}, openai.BadRequestError, "stream_options", None),
        ({"extra_body": {"topk": 1}}, openai.BadRequestError, "topk", "unknown_parameter"),
    ],
)  # fmt: skip
def test_errors_are_those_of_the_client(
    given: dict[str, Any], error: Any, param: str, code: str | None, client: Any
) -> None:
    with pytest.raises(error) as caught:
        ask(client, given.pop("prompt", "The"), **given)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"


def test_another_model_is_not_here(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'tale'"):
        client.completions.create(model="gpt-9", prompt="a")


def test_a_long_prompt_may_be_cut(host: Host, client: Any) -> None:
    prompt = "The old red ship and a small grey bird over hill under moon king queen"
    answer = ask(client, prompt, extra_body={"truncate_prompt": True})
    assert answer.choices[0].text == host.text(prompt, seed=3, max_tokens=20)


def test_the_other_backend_serves_the_same_text(lively_run: Any) -> None:
    pytest.importorskip("mlx.core", exc_type=ImportError)
    run, numpy = lively_run()
    build = lambda: make_backend("mlx", run.model, run.train, numpy.state())  # noqa: E731
    host = Host(run, numpy, build=build)
    host.start()
    try:
        body = {"prompt": ["The old", "A"], "seed": 3, "max_tokens": 20, "n": 2}
        answer = post(host, "/v1/completions", body).json()
        texts = [choice["text"] for choice in answer["choices"]]
        prompts = [("The old", 0), ("The old", 1), ("A", 0), ("A", 1)]
        assert texts == [host.text(p, i, seed=3, max_tokens=20) for p, i in prompts]
    finally:
        host.stop()


def test_with_a_key_only_those_who_have_it_may_ask(lively_run: Any) -> None:
    host = Host(*lively_run(), settings=Settings(api_key="s3cret"))
    host.start()
    try:
        base = f"{host.url}/v1"
        with openai.OpenAI(base_url=base, api_key="s3cret", max_retries=0) as client:
            assert ask(client).choices[0].text == host.text("The old", seed=3, max_tokens=20)
        with (
            openai.OpenAI(base_url=base, api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError, match="Incorrect API key"),
        ):
            ask(client)
        assert [httpx.get(host.url + path).status_code for path in ("/", "/health")] == [200, 200]
        closed = ("/run", "/metrics", "/v1/models")
        assert [httpx.get(host.url + path).status_code for path in closed] == [401, 401, 401]
        assert httpx.post(host.url, json={"prompt": "a"}).status_code == 401
    finally:
        host.stop()


# By hand


def post(host: Host, path: str, body: Any = None, **given: Any) -> Any:
    return httpx.post(host.url + path, json=body, timeout=60, **given)


def test_the_shape_of_the_seeds(host: Host) -> None:
    body = {"prompt": "The old", "max_tokens": 12, "temperature": 0.5, "seed": 4}
    answer = post(host, "/", body).json()
    expected = host.text("The old", seed=4, max_tokens=12, temperature=0.5, top_p=1.0)
    assert (answer["text"], answer["model"]) == (expected, "tale")
    assert answer["usage"]["prompt_tokens"] == 7
    assert set(answer["usage"]) == {"prompt_tokens", "completion_tokens"}


def test_without_a_seed_texts_differ_and_the_seed_is_told(host: Host) -> None:
    body = {"prompt": "The", "max_tokens": 30, "temperature": 1.5}
    answers = [post(host, "/v1/completions", body).json() for _ in range(3)]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 3
    again = post(host, "/v1/completions", {**body, "seed": answers[0]["seed"]}).json()
    assert again["choices"] == answers[0]["choices"]


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[]", b'{"a": 1}', b'{"prompt": NaN}'])
def test_a_malformed_body_is_an_error_object(path: str, body: bytes, host: Host) -> None:
    answer = httpx.post(host.url + path, content=body)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_half_a_character_breaks_nothing(host: Host) -> None:
    body = b'{"prompt": "a\\ud800b", "max_tokens": 3, "echo": true, "stop": "\\udfff"}'
    answer = httpx.post(f"{host.url}/v1/completions", content=body)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["text"].startswith("a\ud800b")


def test_a_body_that_is_too_long_is_refused(host: Host) -> None:
    answer = httpx.post(f"{host.url}/v1/completions", content=b" " * (MAX_BODY_BYTES + 1))
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "invalid_request_error")


def test_other_paths_and_methods_are_error_objects(host: Host) -> None:
    for method, path, status in [
        ("GET", "/nothing", 404),
        ("DELETE", "/", 405),
        ("GET", "/v1/completions", 405),
    ]:
        answer = httpx.request(method, host.url + path)
        assert (answer.status_code, "error" in answer.json()) == (status, True)


def test_pages_of_other_sites_may_not_ask(host: Host) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    assert post(host, "/", body, headers={"origin": host.url}).status_code == 200
    assert post(host, "/", body, headers={"origin": "http://evil.example"}).status_code == 403
    rebound = {"origin": "http://evil.example:80", "host": "evil.example:80"}
    assert post(host, "/", body, headers=rebound).status_code == 403


@pytest.mark.parametrize("path", ["/", "/app.js", "/style.css", "/icon.svg"])
def test_the_page_comes_from_the_package_under_a_strict_policy(path: str, host: Host) -> None:
    answer = httpx.get(host.url + path)
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    outside = answer.text.replace("http://www.w3.org/2000/svg", "")  # a name, not a request
    assert "http:" not in outside
    assert "https:" not in outside


def test_attention_rows_are_shares(host: Host) -> None:
    answer = post(host, "/attention", {"text": "The old", "layer": 1, "head": 2}).json()
    assert "".join(answer["tokens"]) == "The old"
    assert [len(row) for row in answer["weights"]] == [1, 2, 3, 4, 5, 6, 7]
    assert all(sum(row) == pytest.approx(1, abs=1e-3) for row in answer["weights"])
    wrong = post(host, "/attention", {"text": "a", "layer": 2, "head": 0})
    assert wrong.json()["error"]["message"] == "layer=2 does not exist; use 0 to 1"


def test_attention_wants_the_float_weights(lively_run: Any) -> None:
    host = Host(*lively_run(), keeps_params=False)
    host.start()
    answer = post(host, "/attention", {"text": "The old", "layer": 1, "head": 2})
    host.stop()
    assert answer.status_code == 404
    assert "serve without --quantize" in answer.json()["error"]["message"]


def test_copies_are_reported_if_the_server_has_the_training_text(lively_run: Any) -> None:
    with_text = Host(*lively_run(), find_copies=lambda text: {"share": len(text) / 10})
    with_text.start()
    answer = post(with_text, "/copies", {"text": "The 🙂"})
    too_long = post(with_text, "/copies", {"text": "a" * 65_537})
    facts = httpx.get(f"{with_text.url}/run").json()
    with_text.stop()
    assert answer.json() == {"share": 0.5}
    assert facts["check"] is True
    assert too_long.status_code == 400
    assert "at most 65,536" in too_long.json()["error"]["message"]


def test_without_the_training_text_nothing_is_said_about_copies(host: Host) -> None:
    answer = post(host, "/copies", {"text": "The old"})
    assert answer.status_code == 404
    assert "serve with --check" in answer.json()["error"]["message"]
    assert httpx.get(f"{host.url}/run").json()["check"] is False


def test_metrics_are_what_prometheus_reads(host: Host) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    before = host.metrics.value("generated_tokens_total")
    post(host, "/v1/completions", {"prompt": "The", "max_tokens": 5, "n": 3, "temperature": 2})
    text = httpx.get(f"{host.url}/metrics").text
    assert "_created" not in text
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    tokens = families["mlxgpt_generated_tokens"].samples[0].value
    assert 3 <= tokens - before <= 15
    assert families["mlxgpt_first_token_seconds"].type == "histogram"
    assert families["mlxgpt_memory_bytes"].samples[0].value > 1e6


def test_the_page_is_told_of_the_run(host: Host) -> None:
    told = httpx.get(f"{host.url}/run").json()
    assert (told["name"], told["step"], told["n_head"]) == ("tale", 3, 4)
    assert told["curve"]["val_loss"] == [[0.0, 3.1], [3.0, 2.2]]


def test_what_the_page_has_no_slider_for_is_told_as_options(lively_run: Any) -> None:
    bias = ((3, -2.0),)
    defaults = SampleConfig(stop=("a b", "q"), presence_penalty=0.5, logit_bias=bias)
    host = Host(*lively_run(), settings=Settings(defaults=defaults))
    host.start()
    try:
        told = httpx.get(f"{host.url}/run").json()["options"]
        assert told == (
            " --checkpoint 'my runs/tale.safetensors' --presence-penalty 0.5"
            " --logit-bias '#3=-2.0' --stop 'a b' --stop q"
        )
        body = {"prompt": "The old", "seed": 3}
        answer = post(host, "/v1/completions", body).json()["choices"][0]["text"]
        settings = {"stop": ("a b", "q"), "presence_penalty": 0.5, "logit_bias": bias}
        assert answer == host.text("The old", seed=3, **settings)
    finally:
        host.stop()


def test_the_description_has_a_schema_for_every_body(host: Host) -> None:
    description = httpx.get(f"{host.url}/openapi.json").json()
    schemas = description["components"]["schemas"]
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(description)))
    assert references <= set(schemas)
    posts = [path for path, operations in description["paths"].items() if "post" in operations]
    assert posts == ENDPOINTS
    prompts = schemas["CompletionBody"]["properties"]["prompt"]["anyOf"]
    assert [prompt["type"] for prompt in prompts] == ["string", "array", "array", "array"]
    assert schemas["PlainBody"]["required"] == ["prompt"]
    assert schemas["Message"]["additionalProperties"] is True


def test_the_description_says_what_is_accepted(host: Host) -> None:
    """Limits are in the words of JSON Schema, null is allowed, the model's sizes are known."""
    description = httpx.get(f"{host.url}/openapi.json").json()
    schemas, model = description["components"]["schemas"], host.run.model
    assert not re.findall(r'"(ge|le|min_length|max_length)":', json.dumps(schemas))
    assert schemas["CompletionBody"]["properties"]["n"]["anyOf"][0]["maximum"] == 64
    assert {"type": "null"} in schemas["PlainBody"]["properties"]["temperature"]["anyOf"]
    assert schemas["AttentionBody"]["properties"]["head"]["maximum"] == model.n_head - 1
    biases = schemas["CompletionBody"]["properties"]["logit_bias"]["anyOf"][0]
    pattern = biases["propertyNames"]["pattern"]
    accepted = [n for n in range(2000) if re.search(pattern, str(n))]
    assert accepted == list(range(model.vocab_size))
    for operations in description["paths"].values():
        for operation in operations.values():
            assert {"400", "408", "431", "503"} <= set(operation["responses"])


# Clients that misbehave


def streaming(host: Host, max_tokens: int) -> socket.socket:
    """A client that has seen the first piece of a stream."""
    client = socket.create_connection(("127.0.0.1", host.port), timeout=60)
    body = json.dumps({"prompt": "The", "max_tokens": max_tokens, "stream": True,
                       "logit_bias": {str(host.run.tokenizer.eos): -100}}).encode()  # fmt: skip
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    client.sendall(head.encode() + body)
    seen = b""
    while b"data: " not in seen:
        seen += client.recv(4096)
    return client


def wait_until(true: Callable[[], bool]) -> None:
    import time

    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_client_that_leaves_makes_room(host: Host) -> None:
    before = host.metrics.value("cancelled_total")
    clients = [streaming(host, 30_000) for _ in range(3)]
    assert host.metrics.value("streams") >= 3
    for client in clients:
        client.close()
    wait_until(lambda: host.metrics.value("streams") == 0)
    assert host.metrics.value("cancelled_total") == before + 3


def test_a_client_that_waits_for_a_whole_text_and_leaves_makes_room(host: Host) -> None:
    body = {"prompt": "The", "max_tokens": 30_000, "n": 2,
            "logit_bias": {str(host.run.tokenizer.eos): -100}}  # fmt: skip
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{host.url}/v1/completions", json=body, timeout=0.5)
    wait_until(lambda: host.metrics.value("streams") == 0)


def test_a_full_queue_says_come_again(lively_run: Any) -> None:
    host = Host(*lively_run(), n_streams=1, n_waiting=1)
    host.start()
    try:
        first = streaming(host, 30_000)
        waiting = ThreadPoolExecutor(1)
        second = waiting.submit(post, host, "/", {"prompt": "The", "max_tokens": 2})
        wait_until(lambda: host.metrics.value("waiting") == 1 or len(host.engine._waiting) == 1)
        refused = post(host, "/v1/completions", {"prompt": "The", "n": 2})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["code"] == "overloaded"
        first.close()
        assert second.result(60).status_code == 200
        waiting.shutdown()
    finally:
        host.stop()


def test_a_server_that_stops_ends_its_streams(lively_run: Any) -> None:
    host = Host(*lively_run())
    host.start()
    client = streaming(host, 30_000)
    host.stop()
    while client.recv(65536):
        pass
    client.close()


def mixed(seed: int) -> tuple[str, dict[str, Any]]:
    """A prompt and settings that are different for each seed."""
    prompt = "The old red ship and a small grey bird"[: 1 + seed % 37]
    return prompt, {"max_tokens": 5 + seed % 23, "seed": seed, "temperature": 0.6 + seed % 5 / 5}


def test_many_at_once_are_never_mixed_up(host: Host) -> None:
    def one(seed: int) -> str:
        prompt, config = mixed(seed)
        answer = post(host, "/v1/completions", {"prompt": prompt, **config}).json()
        return str(answer["choices"][0]["text"])

    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(one, range(60)))
    assert texts == [host.text(mixed(seed)[0], **mixed(seed)[1]) for seed in range(60)]
