"""The heartbeat between the ranks of a run, on connections of its own.

A rank that goes silent or ends without saying goodbye is lost, and all others are notified.
Rank 0 listens and the others connect to it; lines of text go both ways. The caller decides what a
loss leads to. MLX's ring notices a closed connection but waits endlessly for a process that hangs
or a cable that is unplugged, hence this module.
"""

from __future__ import annotations

import contextlib
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence

BEATS = 8  # per timeout
MAX_LINE_BYTES = 4096  # of an unknown peer; a longer one is cut off
CONNECT_SECONDS = 5.0


class Peer:
    """The other end of one connection."""

    def __init__(self, connection: socket.socket, now: float, rank: int | None = None) -> None:
        self.connection, self.heard_at, self.rank = connection, now, rank
        self._text = b""

    def lines(self) -> list[str] | None:
        """Return the lines that have arrived, or None if the connection is closed."""
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
        """Send a line if that is possible at once; a peer that does not read is soon lost."""
        with contextlib.suppress(OSError):
            self.connection.send(line.encode() + b"\n")


class Heartbeat:
    """One rank's heartbeat, on a thread of its own, which calls `lost(reason)` at most once."""

    def __init__(self, rank: int, size: int, timeout: float, lost: Callable[[str], None]) -> None:
        self._rank, self._size, self._timeout, self._lost = rank, size, timeout, lost
        self._peers: list[Peer] = []
        self._listener: socket.socket | None = None
        self._token = secrets.token_hex(16)
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()  # leaving and watching share the connections
        self._over = False
        self._is_lost = threading.Event()
        self._why = ""
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def listen(self) -> list[str | int]:
        """Start on rank 0; return the port and the token with which the others `connect`."""
        self._listener = socket.create_server(("", 0), backlog=self._size)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread.start()
        return [self._listener.getsockname()[1], self._token]

    def connect(self, addresses: Sequence[str], port: int, token: str) -> bool:
        """Start on another rank; return whether rank 0 was reached at one of its addresses."""
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
        """Wait up to `wait` seconds for a loss; return which rank was lost and how, or ""."""
        self._is_lost.wait(wait)
        return self._why

    def leave(self, code: int) -> None:
        """Say goodbye to the others, in good order if the code is 0, and stop."""
        with self._lock:
            self._over = True
            for peer in self._peers:
                peer.send(f"bye {code}")
                peer.lines()  # closing with unread data would lose the goodbye
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
                if now - looked_at > self._timeout / 2:  # this process itself was suspended
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
        if peer.rank is None:  # unknown until it has shown the token
            if secrets.compare_digest(word.encode(), self._token.encode()) and rest.isdigit():
                peer.rank = int(rest)
                peer.send("")
            else:
                self._remove(peer)
            return
        peer.heard_at = now
        if word == "lost":
            self._report(rest)
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
            self._report(f"rank {peer.rank} is lost: {how}")

    def _report(self, why: str) -> None:
        if self._why:
            return
        self._why = why
        for peer in self._peers:
            peer.send(f"lost {why}")
        self._is_lost.set()


def own_addresses(ring: Sequence[str]) -> list[str]:
    """Return the addresses at which other ranks can reach this one.

    They are its own addresses in the ring and those of its host name.
    """
    addresses = [address.rpartition(":")[0].strip("[]") for address in ring]
    with contextlib.suppress(OSError):
        infos = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
        addresses += [str(info[4][0]) for info in infos]
    return list(dict.fromkeys(addresses))
