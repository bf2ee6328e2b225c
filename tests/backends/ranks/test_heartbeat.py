"""Signs of life on loopback: who falls silent or ends without a word is lost, once, for all."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from queue import Queue

import pytest

from mlx_randygpt.backends.ranks.heartbeat import Heartbeat, own_addresses

LONG = 600.0  # seconds of silence that no test reaches
WAIT = 60.0
Join = Callable[..., tuple[list[Heartbeat], "Queue[tuple[int, str]]"]]


@pytest.fixture
def ranks() -> Iterator[Join]:
    """(size, timeout) -> the heartbeats of all ranks but those in `without`, in one process, and a
    queue of (rank, why) that their losses go to."""
    made: list[Heartbeat] = []

    def build(size: int, timeout: float = LONG, without: int = 0) -> tuple[list[Heartbeat], Queue]:
        lost: Queue[tuple[int, str]] = Queue()
        for rank in range(size - without):
            told = lambda why, rank=rank: lost.put((rank, why))  # noqa: E731
            made.append(Heartbeat(rank, size, timeout, told))
        port, token = made[0].listen()
        for beat in made[1:]:
            assert beat.connect(["127.0.0.1"], int(port), str(token))
        build.place = port, token  # type: ignore[attr-defined]
        return made, lost

    yield build
    for beat in made:
        beat.leave(0)


def test_a_rank_that_ends_without_a_word_is_lost_for_all_others(ranks: Join) -> None:
    beats, lost = ranks(3)
    beats[1]._peers[0].connection.shutdown(socket.SHUT_RDWR)
    heard = dict(lost.get(timeout=WAIT) for _ in range(3))
    assert heard[0] == heard[2] == "rank 1 is lost: its process has ended"
    assert beats[2].why(0) == heard[2]


def test_all_hear_that_rank_0_is_gone(ranks: Join) -> None:
    beats, lost = ranks(2)
    beats[1]._peers[0].connection.shutdown(socket.SHUT_RDWR)
    heard = dict(lost.get(timeout=WAIT) for _ in range(2))
    assert heard[1] == "rank 0 is lost: its process has ended"


def test_silence_is_a_loss(ranks: Join) -> None:
    _, lost = ranks(2, timeout=0.5, without=1)
    port, token = ranks.place  # type: ignore[attr-defined]
    with socket.create_connection(("127.0.0.1", port)) as dumb:
        dumb.sendall(f"{token} 1\n".encode())
        rank, why = lost.get(timeout=WAIT)
    assert (rank, why) == (0, "rank 1 is lost: nothing was heard of it for 0.5 s")


def test_a_rank_that_takes_leave_is_not_lost(ranks: Join) -> None:
    beats, lost = ranks(3)
    beats[2].leave(0)
    beats[1].leave(1)  # said after; heard by rank 0 alone
    rank, why = lost.get(timeout=WAIT)
    assert rank == 0
    assert why == "rank 1 is lost: it has left, and its own last line says why"
    assert lost.empty()


def test_a_stranger_is_sent_away(ranks: Join) -> None:
    beats, lost = ranks(2)
    port, _ = ranks.place  # type: ignore[attr-defined]
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT) as stranger:
        stranger.sendall(b"guess 1\nlost rank 1\n")
        assert stranger.recv(100) == b""
    assert lost.empty()
    assert len(beats[0]._peers) == 1


def test_a_rank_that_cannot_reach_rank_0_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    assert not Heartbeat(1, 2, LONG, print).connect(["127.0.0.1"], closed, "")


def test_the_ring_s_own_addresses_come_first() -> None:
    assert own_addresses(["10.0.0.7:5000", "[::1]:5001"])[:2] == ["10.0.0.7", "::1"]
