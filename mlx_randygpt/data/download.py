"""One file from the network, whole and checked or not at all.

Owns the request, its limits, the checksum and the temporary name; progress goes to a callback. A
small file is asked for once; a large one goes on where it broke off, in the same call or the next.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from hashlib import file_digest
from hashlib import sha256 as new_sha256
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from mlx_randygpt.data import DataError

CHUNK_BYTES = 1 << 16
URL_VARIABLE = "MLXGPT_SHAKESPEARE_URL"  # a mirror of tiny Shakespeare
ATTEMPTS = 5  # in a row that bring nothing new
Progress = Callable[[int, int], None]  # bytes so far, bytes in all; 0: not known


@dataclass(frozen=True)
class Remote:
    """A file that never changes, and where it is."""

    url: str
    size: int = 0  # bytes; 0: not known
    sha256: str = ""  # "": what the first download had


TINY_SHAKESPEARE = Remote(
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    1_115_394,
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)


def fetch_tiny_shakespeare(
    path: Path, on_progress: Progress, environ: Mapping[str, str] = os.environ
) -> None:
    """Tiny Shakespeare as `path`, from the URL in MLXGPT_SHAKESPEARE_URL if there is one."""
    url = environ.get(URL_VARIABLE) or TINY_SHAKESPEARE.url
    fetch(url, path, TINY_SHAKESPEARE.sha256, TINY_SHAKESPEARE.size, on_progress)


def fetch(
    url: str,
    path: Path,
    sha256: str,
    size: int,
    on_progress: Progress,
    timeout_seconds: float = 10.0,
) -> None:
    """The `size` bytes of `url` as the file `path`, if their SHA-256 is right.

    `timeout_seconds` limits the time to the first answer, and then each wait for more.
    DataError says why not; then, as after Ctrl-C, nothing is left behind.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file, _open(url, timeout_seconds) as response:
            _copy(response, file, sha256, size, on_progress)
        os.replace(part, path)
    except (OSError, HTTPException, ValueError) as error:
        reason = _reason(error, timeout_seconds)
        raise DataError(f"could not download {url} to {path}: {reason}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def fetch_large(
    remote: Remote,
    path: Path,
    on_progress: Progress,
    timeout_seconds: float = 10.0,
    pause: Callable[[float], None] = time.sleep,
) -> str:
    """The file of `remote` as `path`, if size and SHA-256 are right; the SHA-256.

    A connection that breaks off is taken up again where it was, here or in the next call: until
    the file is whole it is `.NAME.part`. Where no checksum is known the first one is written to
    `NAME.sha256`, and later downloads must have it. DataError says why not.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _go_on(remote, part, on_progress, timeout_seconds, pause)
        digest = _checked(remote, part, path)
        os.replace(part, path)
    except (OSError, HTTPException, ValueError) as error:
        reason = _reason(error, timeout_seconds)
        raise DataError(f"could not download {remote.url} to {path}: {reason}") from error
    _tag(part).unlink(missing_ok=True)
    return digest


def _go_on(
    remote: Remote, part: Path, on_progress: Progress, seconds: float,
    pause: Callable[[float], None],
) -> None:  # fmt: skip
    """Fill `part` until all of the file is there; OSError when ATTEMPTS in a row bring nothing, or
    at once where there is no connection to begin with."""
    failed, ever = 0, False
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _append(remote, part, on_progress, seconds):
                return
            error: Exception = ConnectionError("the connection broke off")
        except HTTPError as refusal:
            if refusal.code != 416 or not before:  # 416: no such range, so `part` is no part of it
                raise
            refusal.close()
            part.unlink()
            error = refusal
        except (OSError, HTTPException) as broken:
            if isinstance(broken, URLError) and not ever:
                raise
            error = broken
        grown = part.exists() and part.stat().st_size > before
        failed, ever = (0, True) if grown else (failed + 1, ever)
        if failed == ATTEMPTS:
            raise error
        pause(2.0**failed)


def _append(remote: Remote, part: Path, on_progress: Progress, seconds: float) -> bool:
    """Ask for what is missing and write what comes; whether that was all of it."""
    have = part.stat().st_size if part.exists() else 0
    tag = _tag(part).read_text() if have and _tag(part).exists() else ""
    request = Request(remote.url, headers={"Accept-Encoding": "identity"})
    if tag:  # else nobody knows whether it is still the same file
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", tag)
    with _open(request, seconds) as response:
        from_there = re.match(r"bytes (\d+)-\d+/", response.headers.get("Content-Range", ""))
        goes_on = response.status == 206 and from_there and int(from_there[1]) == have
        done = have if goes_on else 0
        size = done + int(response.headers.get("Content-Length") or 0)
        _tag(part).write_text(_validator(response.headers))
        with open(part, "ab" if goes_on else "wb") as file:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                done += len(chunk)
                if remote.size and done > remote.size:
                    raise DataError(f"it is longer than the {remote.size} bytes it should have")
                on_progress(done, remote.size or size)
    return done >= (remote.size or size)


def _validator(headers: Mapping[str, str]) -> str:
    """What the server says of the version of the file; a weak tag promises no equal bytes."""
    tag = headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")


def _tag(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")


def _checked(remote: Remote, part: Path, path: Path) -> str:
    """The SHA-256 of a whole file; where it is wrong, DataError and the file is gone."""
    with open(part, "rb") as file:
        digest = file_digest(file, "sha256").hexdigest()
    known = path.with_name(f"{path.name}.sha256")
    expected, advice = remote.sha256, ""
    if not expected and known.exists():
        expected = known.read_text().split()[0]
        advice = f", as when it was first fetched; remove {known} if the new one is right"
    if expected and digest != expected:
        part.unlink()
        raise DataError(f"its SHA-256 is {digest}, not {expected}{advice}")
    if not remote.sha256:
        known.write_text(f"{digest}  {path.name}\n")
    return digest


def _open(url: str | Request, seconds: float) -> Any:
    """The response, or TimeoutError: here the time to look up the name and to try each of its
    addresses counts too, where a socket's own limit would start again for every address."""
    answer: Future[Any] = Future()

    def ask() -> None:
        try:
            answer.set_result(urlopen(url, timeout=seconds))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(seconds)
    except BaseException:  # Ctrl-C too: whatever still arrives is closed
        answer.add_done_callback(lambda late: None if late.exception() else late.result().close())
        raise


def _copy(
    response: IO[bytes], file: IO[bytes], sha256: str, size: int, on_progress: Progress
) -> None:
    digest, done = new_sha256(), 0
    while chunk := response.read(CHUNK_BYTES):
        file.write(chunk)
        digest.update(chunk)
        done += len(chunk)
        if done > size:
            raise DataError(f"it is longer than the {size} bytes it should have")
        on_progress(done, size)
    if done < size:
        raise DataError(f"it ended after {done} of {size} bytes")
    if digest.hexdigest() != sha256:
        raise DataError(f"its SHA-256 is {digest.hexdigest()}, not {sha256}")


def _reason(error: Exception, seconds: float) -> str:
    if isinstance(error, HTTPError):
        error.close()
        return f"the server answered {error.code} {error.reason}"
    cause = error.reason if isinstance(error, URLError) else error
    if isinstance(cause, TimeoutError):
        return f"no answer within {seconds:g} s"
    if isinstance(error, URLError):
        return f"no connection ({getattr(cause, 'strerror', None) or cause})"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
