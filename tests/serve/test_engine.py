"""The thread that owns the model: texts together, as if alone; joining, leaving, failing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("prometheus_client")

from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.sampling.generate import Continuation, generate
from mlx_randygpt.serve import engine
from mlx_randygpt.serve.engine import Engine, Full, Request
from mlx_randygpt.serve.metrics import Metrics
from mlx_randygpt.state import rng

MakeRun = Callable[..., tuple]  # type: ignore[type-arg]
SECONDS = 60  # until a test is given up


class Host:
    """A running engine, and how a test asks it."""

    def __init__(self, run: Any, backend: Any, n_streams: int = 4, n_waiting: int = 200) -> None:
        self.run, self.backend, self.metrics = run, backend, Metrics()
        build = lambda: backend  # noqa: E731
        self.engine = Engine(
            build, run.model, self.metrics, n_streams=n_streams, n_waiting=n_waiting
        )
        self.told = threading.Condition()
        self.engine.deliver = self.deliver

    def deliver(self, requests: list[Request]) -> None:
        with self.told:
            for job in requests:
                job.notify()
            self.told.notify_all()

    def job(self, prompt: str, tell: Callable[[], None] = lambda: None, **config: Any) -> Request:
        ids = self.run.tokenizer.encode(prompt).tolist()
        settings = SampleConfig(**{"max_tokens": 12} | config)
        return Request(Continuation(self.run.tokenizer, ids, settings), tell, each_token=True)

    def wait(self, *requests: Request) -> None:
        with self.told:
            assert self.told.wait_for(lambda: all(job.finished for job in requests), SECONDS)

    def alone(self, job: Request) -> str:
        """What the same settings write without an engine."""
        w = job.continuation
        *_, [sample] = generate(
            self.backend, self.run.model, self.run.tokenizer, w.prompt, w.config
        )
        return sample.text


@pytest.fixture(params=["classic", "modern"])
def host(request: pytest.FixtureRequest, make_run: MakeRun) -> Iterator[Host]:
    host = Host(*make_run(request.param))
    host.engine.start()
    yield host
    host.engine.stop()


def test_texts_together_read_as_each_alone(host: Host) -> None:
    """Thirty texts of mixed lengths on four rows, past the context of 16."""
    random = rng(2, "check")
    words = "The old red ship and a small grey bird over hill under moon"
    lengths = random.integers(1, 40, (30, 2)).tolist()
    requests = [
        host.job(words[:n], seed=i, max_tokens=m, temperature=0.5 + i / 20, top_p=1.0)
        for i, (n, m) in enumerate(lengths)
    ]
    host.engine.submit(requests)
    host.wait(*requests)
    host.engine.stop()
    assert [job.continuation.sample.text for job in requests] == [
        host.alone(job) for job in requests
    ]
    assert host.metrics.value("generated_tokens_total") == sum(
        len(job.continuation.sample.ids) for job in requests
    )


def test_prompts_of_different_lengths_are_read_in_one_pass(host: Host) -> None:
    read: list[tuple[int, ...]] = []
    logits = host.backend.logits

    def watched(tokens: Any, *given: Any) -> Any:
        read.append(tokens.shape)
        return logits(tokens, *given)

    host.backend.logits = watched
    requests = [host.job("The old red ship"[:n], seed=n) for n in (14, 3, 8, 3)]
    host.engine.submit(requests)
    host.wait(*requests)
    host.engine.stop()
    assert read[0] == (4, 14)
    assert [job.continuation.sample.text for job in requests] == [
        host.alone(job) for job in requests
    ]


def test_texts_submitted_at_one_moment_are_read_in_one_pass(host: Host) -> None:
    read, soon, logits = list[int](), list[Callable[[], None]](), host.backend.logits

    def watched(tokens: Any, *given: Any) -> Any:
        read.append(len(tokens))
        return logits(tokens, *given)

    host.backend.logits = watched
    host.engine.call_soon = soon.append
    requests = [host.job("The", seed=n) for n in range(3)]
    for request in requests:
        host.engine.submit([request])
    [admit] = soon  # once for all three
    admit()
    host.wait(*requests)
    host.engine.stop()
    assert read[0] == 3


def test_first_tokens_are_sent_before_second_ones_are_decoded(host: Host) -> None:
    events, logits = list[str](), host.backend.logits

    def watched(*given: Any) -> Any:
        events.append("decode")
        return logits(*given)

    host.backend.logits = watched
    host.engine.wait_until_sent = lambda: events.append("sent")
    request = host.job("The", max_tokens=3)
    host.engine.submit([request])
    host.wait(request)
    host.engine.stop()
    assert events == ["decode", "sent", "decode", "decode"]


def test_a_short_prompt_does_not_wait_for_long_ones(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "READ_TOGETHER", 16)
    told: list[list[Request]] = []

    def deliver(requests: list[Request]) -> None:
        told.append(requests)
        host.deliver(requests)

    host.engine.deliver = deliver
    requests = [host.job("The old red ship"[:n]) for n in (14, 3, 8, 3)]
    host.engine.submit(requests)
    host.wait(*requests)
    assert [group for group in told if group][:3] == [
        [requests[1], requests[3]],
        [requests[2]],
        [requests[0]],
    ]


def test_who_is_cancelled_makes_room_and_others_go_on(host: Host) -> None:
    seen: list[int] = []
    never = {"max_tokens": 10**9, "logit_bias": ((host.run.tokenizer.eos, -100.0),)}
    endless = [host.job("The", lambda: seen.append(1), **never) for _ in range(4)]
    host.engine.submit(endless)  # all rows are taken
    short = host.job("A king", seed=3)
    host.engine.submit([short])
    with host.told:
        assert host.told.wait_for(lambda: len(seen) > 40, SECONDS)
        assert not short.finished
    for job in endless[:3]:
        job.cancelled = True
    host.wait(short)
    assert not endless[3].finished
    host.engine.stop()
    assert endless[3].finished
    assert short.continuation.sample.text == host.alone(short)


def test_an_idle_engine_gives_back_memory(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first text and after the last, and not in between."""
    run, backend = make_run("modern")
    host, idle, tokens = Host(run, backend), threading.Semaphore(0), list[int]()
    at: list[int] = []

    def release(given: Any) -> None:
        assert given is backend
        at.append(len(tokens))
        idle.release()

    monkeypatch.setattr("mlx_randygpt.serve.engine.release_memory", release)
    host.engine.start()
    assert idle.acquire(timeout=SECONDS)
    host.engine.submit([host.job("The", lambda: tokens.append(1), max_tokens=5)])
    assert idle.acquire(timeout=SECONDS)
    host.engine.stop()
    assert at == [0, 5]


def test_more_than_may_wait_are_refused_together(make_run: MakeRun) -> None:
    host = Host(*make_run("modern"), n_streams=1, n_waiting=2)  # not started: nobody leaves
    host.engine.submit([host.job("a"), host.job("b")])
    with pytest.raises(Full, match="2 texts are already waiting"):
        host.engine.submit([host.job("c"), host.job("d")])
    host.engine.submit([host.job("c")])


def test_a_failing_step_is_told_and_the_next_text_is_written(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(*make_run("modern"))
    whole, fail = host.backend.logits, threading.Event()

    def logits(*given: Any) -> Any:
        if fail.is_set():
            fail.clear()
            raise FloatingPointError("out of luck")
        return whole(*given)

    monkeypatch.setattr(host.backend, "logits", logits)
    host.engine.start()
    fail.set()
    unlucky, lucky = host.job("The"), host.job("The", seed=8)
    host.engine.submit([unlucky])
    host.wait(unlucky)
    assert isinstance(unlucky.error, FloatingPointError)
    host.engine.submit([lucky])
    host.wait(lucky)
    host.engine.stop()
    assert lucky.continuation.sample.text == host.alone(lucky)


def test_what_goes_wrong_in_building_is_raised_at_the_start(make_run: MakeRun) -> None:
    run, _ = make_run("modern")

    def build() -> Any:
        raise MemoryError("too big")

    with pytest.raises(MemoryError, match="too big"):
        Engine(build, run.model, Metrics(), n_streams=1, n_waiting=1).start()


def test_prompt_choices_are_those_of_a_full_pass(host: Host) -> None:
    ids = host.run.tokenizer.encode("The old ship").tolist()
    config = SampleConfig(max_tokens=0)
    writer = Continuation(host.run.tokenizer, ids[:1], config, n_likely=2, forced=ids[1:])
    job = Request(writer, lambda: None, each_token=False)
    host.engine.submit([job])
    host.wait(job)
    host.engine.stop()
    for n, choice in enumerate(writer.sample.choices, start=1):
        logits = host.backend.logits(np.array([ids[:n]]), host.backend.new_cache(1))[0]
        logprobs = logits - np.log(np.exp(logits.astype(float)).sum())
        assert choice.token == ids[n]
        assert choice.logprob == pytest.approx(logprobs[ids[n]], abs=1e-5)
    assert n == len(ids) - 1
