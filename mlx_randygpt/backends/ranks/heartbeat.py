"""Signs of life between the ranks of a run, beside the connections that sum gradients: who falls
silent or ends without a word is lost, and all others hear of it.

Rank 0 listens, the others connect to it; lines of text go both ways. What a loss leads to is for
the caller to decide. MLX's ring notices a connection that closes but waits for ever for a process
that stands still or a cable that is pulled, hence this.
"""

from __future__ import annotations

import contextlib
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence

BEATS = 8  # in a timeout
MAX_LINE_BYTES = 4096  # bytes; a stranger's is cut off
CONNECT_SECONDS = 5.0


class Peer:
    """The other end of one connection."""

    def __init__(self, connection: socket.socket, now: float, rank: int | None = None) -> None:
        self.connection, self.heard_at, self.rank = connection, now, rank
        self._text = b""

    def lines(self) -> list[str] | None:
        """What has arrived; None where the connection is closed."""
        try:
            content = self.connection.recv(MAX_LINE_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not content:
            return None
        *lines, self._text = (self._text + content).split(b"\n")
        self._text = self._text[-MAX_LINE_BYTES:]
        return [line.decode(errors="replace") for line in lines]

    def send(self, line: str) -> None:
        """Say it if that can be done now; who does not read is silent soon, and found by that."""
        with contextlib.suppress(OSError):
            self.connection.send(line.encode() + b"\n")


class Heartbeat:
    """One rank's end of it, on a thread of its own. `lost(why)` is called once, from there."""

    def __init__(self, rank: int, size: int, timeout: float, lost: Callable[[str], None]) -> None:
        self._rank, self._size, self._timeout, self._lost = rank, size, timeout, lost
        self._peers: list[Peer] = []
        self._listener: socket.socket | None = None
        self._token = secrets.token_hex(16)
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()  # leaving and watching share the connections
        self._over = False
        self._found = threading.Event()
        self._why = ""
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def listen(self) -> list[str | int]:
        """Rank 0: begin; port and token, for the others to `connect` with."""
        self._listener = socket.create_server(("", 0), backlog=self._size)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread.start()
        return [self._listener.getsockname()[1], self._token]

    def connect(self, addresses: Sequence[str], port: int, token: str) -> bool:
        """Another rank: reach rank 0 at one of its addresses and begin; whether that worked."""
        for address in addresses:
            try:
                connection = socket.create_connection((address, port), CONNECT_SECONDS)
                connection.sendall(f"{token} {self._rank}\n".encode())
                if not connection.recv(1):  # a first sign of life: the token is right
                    continue
            except OSError:
                continue
            self._add(Peer(connection, time.monotonic(), rank=0))
            self._thread.start()
            return True
        return False

    def why(self, wait: float) -> str:
        """Who was lost and how, within so many seconds; "" where nobody was."""
        self._found.wait(wait)
        return self._why

    def leave(self, code: int) -> None:
        """Take leave of the others, orderly where the code is 0, and end."""
        with self._lock:
            self._over = True
            for peer in self._peers:
                peer.send(f"bye {code}")
                peer.lines()  # what is unread when it closes would undo the farewell
                peer.connection.close()
            if self._listener is not None:
                self._listener.close()

    def _watch(self) -> None:
        looked_at, sent_at = time.monotonic(), 0.0
        while not self._why:
            ready = self._selector.select(self._timeout / BEATS)
            now = time.monotonic()
            with self._lock:
                if self._over:
                    return
                if now - looked_at > self._timeout / 2:  # this process itself stood still
                    for peer in self._peers:
                        peer.heard_at = now
                looked_at = now
                for key, _ in ready:
                    self._hear(key.data, now)
                if now - sent_at >= self._timeout / BEATS:
                    sent_at = now
                    for peer in self._peers:
                        peer.send("")
                for peer in [*self._peers]:
                    if now - peer.heard_at > self._timeout:
                        self._remove(peer)
                        self._lose(peer, f"nothing was heard of it for {self._timeout:g} s")
        if self._why:
            self._lost(self._why)

    def _hear(self, peer: Peer | None, now: float) -> None:
        if peer is None:
            assert self._listener is not None
            with contextlib.suppress(OSError):
                connection, _ = self._listener.accept()
                self._add(Peer(connection, now))
            return
        lines = peer.lines()
        if lines is None:
            self._remove(peer)
            self._lose(peer, "its process has ended")
        for line in lines or ():
            self._read(peer, line, now)

    def _read(self, peer: Peer, line: str, now: float) -> None:
        word, _, rest = line.partition(" ")
        if peer.rank is None:  # a stranger until it has shown the token
            if secrets.compare_digest(word.encode(), self._token.encode()) and rest.isdigit():
                peer.rank = int(rest)
                peer.send("")
            else:
                self._remove(peer)
            return
        peer.heard_at = now
        if word == "lost":
            self._tell(rest)
        elif line == "bye 0":
            self._remove(peer)
        elif word == "bye":
            self._remove(peer)
            self._lose(peer, "it has left, and its own last line says why")

    def _add(self, peer: Peer) -> None:
        peer.connection.setblocking(False)
        self._peers.append(peer)
        self._selector.register(peer.connection, selectors.EVENT_READ, peer)

    def _remove(self, peer: Peer) -> None:
        if peer in self._peers:
            self._peers.remove(peer)
            self._selector.unregister(peer.connection)
            peer.connection.close()

    def _lose(self, peer: Peer, how: str) -> None:
        if peer.rank is not None:
            self._tell(f"rank {peer.rank} is lost: {how}")

    def _tell(self, why: str) -> None:
        if self._why:
            return
        self._why = why
        for peer in self._peers:
            peer.send(f"lost {why}")
        self._found.set()


def own_addresses(ring: Sequence[str]) -> list[str]:
    """Where other ranks may reach this one: its addresses in the ring, and those of its name."""
    found = [at.rpartition(":")[0].strip("[]") for at in ring]
    with contextlib.suppress(OSError):
        infos = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
        found += [str(info[4][0]) for info in infos]
    return list(dict.fromkeys(found))
