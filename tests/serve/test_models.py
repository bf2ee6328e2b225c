"""What a body may be: each complaint names the place, the value and what would be right."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("pydantic")

from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_randygpt.serve import ApiError
from mlx_randygpt.serve.models import AttentionBody, ChatBody, CompletionBody, PlainBody, parse

USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a"}, {"prompt": ""}, {"prompt": ["a", ""]}, {"prompt": [1, 2]},
        {"prompt": [[1], [2, 3]]}, {"prompt": "a", "temperature": 0, "n": 2.0, "stop": None},
        {"prompt": "a", "stop": ["x", "y"], "logit_bias": {"3": -100}, "user": "me"},
        {"prompt": "a", "stream": True, "stream_options": {"include_usage": True}},
    ],
)  # fmt: skip
def test_what_the_api_allows_passes(body: dict[str, Any]) -> None:
    parsed, ignored = parse(json.dumps(body).encode(), CompletionBody)
    assert ignored == []
    assert parsed.model_dump(exclude_unset=True) == body


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "prompt", "prompt is missing"),
        ({"prompt": 3}, "prompt", "prompt is 3; it must be of type string"),
        ({"prompt": []}, "prompt", "prompt"),
        ({"prompt": ["a", 3]}, "prompt[1]", "prompt[1] is 3; it must be of type string"),
        ({"prompt": [[]]}, "prompt[0]", "prompt[0] has 0 items; it must have at least 1"),
        ({"prompt": [1, -1]}, "prompt[1]", "prompt[1] is -1; it must be at least 0"),
        ({"prompt": 3}, "prompt", "it must be of type string or array"),
        ({"prompt": {}}, "prompt", "prompt is {}; it must be of type string or array"),
        ({"prompt": ["a"] * 65}, "prompt", "prompt has 65 items; it must have at most 64"),
        ({"prompt": [1] * 65 + ["a"]}, "prompt[65]", "is 'a'; it must be of type integer"),
        ({"prompt": [1, 2, "a"]}, "prompt[2]", "prompt[2] is 'a'; it must be of type integer"),
        ({"prompt": [[1], [2, "a"]]}, "prompt[1][1]", "is 'a'; it must be of type integer"),
        ({"prompt": "a", "stop": 5}, "stop", "it must be of type string or array or null"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop", "has 17 items; it must have at most 16"),
        ({"prompt": "a", "top_k": 2**53}, "top_k", "it must be at most 9007199254740991"),
        (
            {"prompt": "a", "stream_options": {"top_k": 1}},
            "stream_options.top_k",
            "Unknown parameter: 'stream_options.top_k'",
        ),
        ({"prompt": "a", "n": True}, "n", "n is True; it must be of type integer or null"),
        ({"prompt": "a", "n": 1.5}, "n", "n is 1.5; it must be of type integer or null"),
        (
            {"prompt": "a", "temperature": -1},
            "temperature",
            "temperature is -1; it must be at least 0",
        ),
        ({"prompt": "a", "temprature": 1}, "temprature", "Unknown parameter: 'temprature'"),
        ({"prompt": "a", "logit_bias": {"1": "x"}}, "logit_bias.1", "must be of type number"),
        (
            {"prompt": "a", "stop": [""]},
            "stop[0]",
            "stop[0] has 0 characters; it must have at least 1",
        ),
    ],
)
def test_a_complaint_names_place_value_and_what_would_be_right(
    body: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(ApiError) as caught:
        parse(json.dumps(body).encode(), CompletionBody)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert message in caught.value.message


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b"[" * 99999, b'{"prompt": NaN}', b"[]", b'"x"', b"null"]
)
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError, match="the body is"):
        parse(body, CompletionBody)


def test_null_is_the_default_of_every_optional_field() -> None:
    for model, body in ((CompletionBody, {"prompt": "a"}), (ChatBody, {"messages": [USER]})):
        nulls = dict.fromkeys(set(model.model_fields) - set(body))
        assert parse(json.dumps(nulls | body).encode(), model) == parse(
            json.dumps(body).encode(), model
        )


def test_messages_are_checked_to_the_ground() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    parse(json.dumps({"messages": [USER, parts]}).encode(), ChatBody)
    for wrong, message in [
        ({"role": "user"}, "messages[1].content is missing"),
        ({"role": "king", "content": "a"}, "messages[1].role is 'king'; it must be 'system', "),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[1].content[0]"),
    ]:
        with pytest.raises(ApiError) as caught:
            parse(json.dumps({"messages": [USER, wrong]}).encode(), ChatBody)
        assert message in caught.value.message


words = st.sampled_from(["", "a", "role", "content", "type", "text", "1", "\ud800"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.sampled_from([0.5, -1e300]) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
named = st.sampled_from(["prompt", "messages", "n", "stop", "logit_bias", "seed", "top_k", "echo"])


@settings(deadline=None)
@given(st.dictionaries(named, json_values, max_size=4))
def test_nothing_that_is_json_is_more_than_refused(body: dict[str, Any]) -> None:
    for shape in (CompletionBody, ChatBody, PlainBody, AttentionBody):
        try:
            parse(json.dumps(body).encode(), shape)
        except ApiError as error:
            if error.status != 400:
                raise
