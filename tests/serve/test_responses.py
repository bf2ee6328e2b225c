"""Streams: events whose frame is built once are those that would be built anew each time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("starlette")

from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.sampling.generate import Generated
from mlx_randygpt.serve.http import event
from mlx_randygpt.serve.responses import ResponseBuilder, StreamState

TEXT = 'a "\\ line\n\0 of 😀 \ud800 and é'


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("include_usage", [False, True])
def test_a_growing_text_has_the_events_of_its_pieces(*, is_chat: bool, include_usage: bool) -> None:
    config = SampleConfig(seed=3)
    generation: Any = SimpleNamespace(
        config=config, n_likely=None, echo=False, warnings=("\0",), include_usage=include_usage
    )
    served: Any = SimpleNamespace(name='the "\0" model', fingerprint="fp")
    builder = ResponseBuilder(served, generation, "id", 1, is_chat)
    text: Any = SimpleNamespace(sample=Generated(), config=config)
    state = StreamState(builder, 1, text)
    assert state.events() == b""
    for i, letter in enumerate(TEXT):
        text.sample.text += letter
        opening = event(builder.opening(1)) if is_chat and i == 0 else b""
        assert state.events() == opening + event(builder.piece(1, letter, None, None))
        assert state.events() == b""
    text.sample.finish_reason = "length"
    assert state.events() == event(builder.piece(1, "", None, "length"))
    assert state.done
