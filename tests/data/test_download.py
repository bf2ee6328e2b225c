"""A server on this machine that keeps its word, and every way of not keeping it."""

import socket
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from mlx_randygpt.data import DataError, download
from mlx_randygpt.data.download import (
    TINY_SHAKESPEARE,
    URL_VARIABLE,
    Remote,
    fetch,
    fetch_tiny_shakespeare,
)

BODY = b"To be, or not to be, that is the question.\n" * 4000  # more than two chunks
SHA = sha256(BODY).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Answers by path; /silent waits until the test is over."""

    over = threading.Event()
    tag = '"one"'
    asked: ClassVar[list[int]] = []  # where each answer of /resume began

    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404)
        elif self.path == "/silent":
            self.over.wait(5)
        elif self.path == "/half":
            self.start(len(BODY))
            self.wfile.write(BODY[:1000])
        elif self.path == "/dropped":
            pass
        elif self.path == "/long":
            self.start(2 * len(BODY))
            self.wfile.write(2 * BODY)
        elif self.path == "/stall":
            self.start(len(BODY))
            self.wfile.write(BODY[:1000])
            self.over.wait(5)
        elif self.path.startswith("/resume"):
            self.resume()
        elif self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "/good")
            self.end_headers()
        else:
            self.start(len(BODY))
            self.wfile.write(BODY if self.path == "/good" else BODY.swapcase())

    def resume(self) -> None:
        """40,000 bytes of what is asked for, then the line is dropped; `tag` is the version."""
        asked = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-")
        same = self.headers.get("If-Range", self.tag) == self.tag
        begin = int(asked) if same and "Range" in self.headers else 0
        self.asked.append(begin)
        if begin > len(BODY):
            self.send_error(416)
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(BODY) - 1}/{len(BODY)}")
        if not self.path.endswith("untagged"):
            self.send_header("ETag", self.tag)
        self.send_header("Content-Length", str(len(BODY) - begin))
        self.end_headers()
        body = BODY.swapcase() if self.path.endswith("swapped") else BODY
        self.wfile.write(body[begin : begin + 40_000])

    def start(self, length: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "*")
    Server.over.clear()
    Server.asked.clear()
    monkeypatch.setattr(Server, "tag", '"one"')
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        Server.over.set()
        server.shutdown()
        thread.join()


def quiet(done: int, size: int) -> None:
    pass


def small(
    url: str, path: Path, on_progress: download.Progress, timeout_seconds: float = 5.0
) -> None:
    """One attempt, as for tiny Shakespeare."""
    remote = Remote(url, len(BODY), SHA)
    fetch(remote, path, on_progress, timeout_seconds=timeout_seconds, attempts=1, pause=forbidden)


def forbidden(seconds: float) -> None:
    raise AssertionError("a single attempt does not pause")


def refusal(url: str, path: Path, timeout_seconds: float = 5.0) -> str:
    """What the failed fetch says; nothing may be left behind, whatever was there stays."""
    before = {file: file.read_bytes() for file in path.parent.glob("*")}
    with pytest.raises(DataError) as caught:
        small(url, path, quiet, timeout_seconds)
    assert {file: file.read_bytes() for file in path.parent.glob("*")} == before
    return str(caught.value).removeprefix(f"could not download {url} to {path}: ")


@pytest.mark.parametrize("place", ["/good", "/redirect"])
def test_a_file_arrives_whole_and_progress_is_told(url: str, place: str, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    small(url + place, tmp_path / "a.txt", lambda *now: told.append(now))
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_bytes() == BODY
    assert told == sorted(told)
    assert told[-1] == (len(BODY), len(BODY))


def test_an_http_error_is_named(url: str, tmp_path: Path) -> None:
    assert refusal(f"{url}/missing", tmp_path / "a.txt") == "the server answered 404 Not Found"


def test_a_connection_dropped_before_the_answer_is_named(url: str, tmp_path: Path) -> None:
    reason = refusal(f"{url}/dropped", tmp_path / "a.txt")
    assert reason == "Remote end closed connection without response"


def test_a_connection_dropped_on_the_way_is_a_short_body(url: str, tmp_path: Path) -> None:
    reason = refusal(f"{url}/half", tmp_path / "a.txt")
    assert reason == f"it ended after 1000 of {len(BODY)} bytes"


def test_a_body_that_is_too_long_is_cut_off(url: str, tmp_path: Path) -> None:
    expected = f"it is longer than the {len(BODY)} bytes it should have"
    assert refusal(f"{url}/long", tmp_path / "a.txt") == expected


def test_a_wrong_checksum_leaves_the_old_file_alone(url: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("older")
    wrong = sha256(BODY.swapcase()).hexdigest()
    reason = refusal(f"{url}/swapped", tmp_path / "a.txt")
    assert reason == f"its SHA-256 is {wrong}, not {SHA}"


@pytest.mark.parametrize("place", ["/silent", "/stall"])
def test_a_server_that_falls_silent_is_given_up(url: str, place: str, tmp_path: Path) -> None:
    reason = refusal(url + place, tmp_path / "a.txt", timeout_seconds=0.05)
    assert reason == "no answer within 0.05 s"


def test_an_answer_after_the_limit_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved, closed = threading.Event(), threading.Event()

    class Late:
        close = closed.set

    def slow_lookup(url: str, timeout: float) -> type[Late]:
        resolved.wait(5)
        return Late

    monkeypatch.setattr(download, "urlopen", slow_lookup)
    assert refusal("http://a/", tmp_path / "a.txt", 0.05) == "no answer within 0.05 s"
    resolved.set()
    assert closed.wait(5)


def test_nobody_listening_is_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    reason = refusal(f"http://127.0.0.1:{port}/", tmp_path / "a.txt")
    assert reason == "no connection (Connection refused)"


def test_a_url_that_is_none_is_said(tmp_path: Path) -> None:
    assert "unknown url type" in refusal("shakespeare", tmp_path / "a.txt")


def test_a_folder_that_cannot_be_written_is_said_before_asking(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    assert refusal("http://127.0.0.1:1/", tmp_path / "data/a.txt") == "File exists"


def test_ctrl_c_leaves_nothing_behind(url: str, tmp_path: Path) -> None:
    def interrupt(done: int, size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(f"{url}/good", tmp_path / "a.txt", interrupt)
    assert not list(tmp_path.iterdir())


def test_tiny_shakespeare_may_come_from_a_mirror(url: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{url}/good.*ended after {len(BODY)} of 1115394 bytes"):
        fetch_tiny_shakespeare(tmp_path / "a.txt", quiet, {URL_VARIABLE: f"{url}/good"})
    assert TINY_SHAKESPEARE.url.startswith("https://")


WHOLE = [*range(0, len(BODY), 40_000)]


def large(url: str, path: Path, sha256: str = SHA, size: int = len(BODY)) -> str:
    remote = Remote(url, size, sha256)
    return fetch(remote, path, quiet, timeout_seconds=5.0, pause=lambda seconds: None)


def refused(url: str, path: Path, sha256: str = SHA, size: int = len(BODY)) -> str:
    with pytest.raises(DataError) as caught:
        large(url, path, sha256, size)
    return str(caught.value).removeprefix(f"could not download {url} to {path}: ")


@pytest.mark.parametrize("size", [len(BODY), 0])
def test_a_dropped_line_is_taken_up_where_it_broke_off(url: str, size: int, tmp_path: Path) -> None:
    assert large(f"{url}/resume", tmp_path / "new" / "a.txt", SHA, size) == SHA
    assert (tmp_path / "new" / "a.txt").read_bytes() == BODY
    assert Server.asked == WHOLE
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.txt"]


def test_ctrl_c_keeps_what_came_and_the_next_call_goes_on(url: str, tmp_path: Path) -> None:
    def interrupt(done: int, size: int) -> None:
        if done > 60_000:
            raise KeyboardInterrupt

    remote = Remote(f"{url}/resume", len(BODY), SHA)
    with pytest.raises(KeyboardInterrupt):
        fetch(remote, tmp_path / "a.txt", interrupt, timeout_seconds=5.0)
    had = (tmp_path / ".a.txt.part").stat().st_size
    Server.asked.clear()
    large(f"{url}/resume", tmp_path / "a.txt")
    assert Server.asked[0] == had > 40_000
    assert (tmp_path / "a.txt").read_bytes() == BODY


def test_a_file_that_changed_meanwhile_is_begun_anew(url: str, tmp_path: Path) -> None:
    (tmp_path / ".a.txt.part").write_bytes(b"older" * 2000)
    (tmp_path / ".a.txt.part.tag").write_text('"older"')
    large(f"{url}/resume", tmp_path / "a.txt")
    assert Server.asked == WHOLE
    assert (tmp_path / "a.txt").read_bytes() == BODY


def test_a_part_that_is_too_long_is_begun_anew(url: str, tmp_path: Path) -> None:
    (tmp_path / ".a.txt.part").write_bytes(bytes(len(BODY) + 1))
    (tmp_path / ".a.txt.part.tag").write_text('"one"')
    large(f"{url}/resume", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == BODY


def test_without_a_version_nothing_is_put_together(url: str, tmp_path: Path) -> None:
    reason = refused(f"{url}/resume-untagged", tmp_path / "a.txt")
    assert reason == f"it ended after 40000 of {len(BODY)} bytes"
    assert set(Server.asked) == {0}


def test_a_line_that_brings_nothing_is_given_up(url: str, tmp_path: Path) -> None:
    pauses: list[float] = []
    with pytest.raises(DataError, match="Remote end closed connection without response"):
        fetch(Remote(f"{url}/dropped"), tmp_path / "a.txt", quiet, pause=pauses.append)
    assert pauses == [2.0, 4.0, 8.0, 16.0]


def test_a_length_that_is_a_lie_is_seen(url: str, tmp_path: Path) -> None:
    said = f"it is longer than the {len(BODY)} bytes it should have"
    assert refused(f"{url}/long", tmp_path / "a.txt") == said
    assert refused(f"{url}/half", tmp_path / "b.txt", "", 0) == (
        f"it ended after 1000 of {len(BODY)} bytes"
    )
    wrong = sha256(BODY).hexdigest()
    assert refused(f"{url}/good", tmp_path / "c.txt", "0" * 64, 0) == (
        f"its SHA-256 is {wrong}, not {'0' * 64}"
    )
    assert not (tmp_path / ".c.txt.part").exists()


def test_an_unknown_checksum_is_that_of_the_first_time(url: str, tmp_path: Path) -> None:
    assert large(f"{url}/good", tmp_path / "a.txt", "", 0) == SHA
    assert (tmp_path / "a.txt.sha256").read_text() == f"{SHA}  a.txt\n"
    large(f"{url}/good", tmp_path / "a.txt", "", 0)
    reason = refused(f"{url}/swapped", tmp_path / "a.txt", "", 0)
    assert f"not {SHA}, as when it was first fetched; remove {tmp_path}/a.txt.sha256" in reason
    assert (tmp_path / "a.txt").read_bytes() == BODY


def test_an_empty_checksum_is_an_error(url: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt.sha256").touch()
    reason = refused(f"{url}/good", tmp_path / "a.txt", "", 0)
    assert "a.txt.sha256, the checksum of the first download, is empty; remove it" in reason


def test_an_http_error_is_no_reason_to_try_again(url: str, tmp_path: Path) -> None:
    assert refused(f"{url}/missing", tmp_path / "a.txt") == "the server answered 404 Not Found"
