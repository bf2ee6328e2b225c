"""Downloads: one file from the network, checked, and resumed if the connection breaks off."""

from __future__ import annotations

import fcntl
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import file_digest
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from mlx_randygpt import files
from mlx_randygpt.data import DataError

CHUNK_BYTES = 1 << 16
URL_VARIABLE = "MLXGPT_SHAKESPEARE_URL"  # a mirror of tiny Shakespeare
ATTEMPTS = 5  # in a row that bring nothing new before a download fails
Progress = Callable[[int, int], None]  # bytes so far, total bytes; 0: unknown


@dataclass(frozen=True)
class Remote:
    """The URL of a file that does not change, its size and checksum."""

    url: str
    size: int = 0  # bytes; 0: unknown
    sha256: str = ""  # "": that of the first download


TINY_SHAKESPEARE = Remote(
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    1_115_394,
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)


def fetch_tiny_shakespeare(
    path: Path, on_progress: Progress, environ: Mapping[str, str] = os.environ
) -> None:
    """Download tiny Shakespeare to `path`, from MLXGPT_SHAKESPEARE_URL if that is set."""
    url = environ.get(URL_VARIABLE) or TINY_SHAKESPEARE.url
    fetch(replace(TINY_SHAKESPEARE, url=url), path, on_progress, attempts=1)


def fetch(
    remote: Remote,
    path: Path,
    on_progress: Progress,
    *,
    timeout_seconds: float = 10.0,
    attempts: int = ATTEMPTS,
    pause: Callable[[float], None] = time.sleep,
) -> str:
    """Download `remote` to `path` and return its SHA-256; DataError if size or checksum is wrong.

    A download that broke off is resumed, by this call or the next: until the file is complete it
    is `.NAME.part`, which stays if the server identifies the version of the file. If no checksum
    is known, the first one is written to `NAME.sha256`, and later downloads must have it.
    `timeout_seconds` limits the time to the first response, and each wait for more; `attempts`
    in a row that bring nothing new are an error.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(part) as descriptor:
            attempt = partial(_append, remote, part, on_progress, timeout_seconds)
            _retry(attempt, part, attempts, pause)
            digest = _verified_digest(remote, part, path)
            files.flush(descriptor)
            files.publish(part, path)
    except (OSError, HTTPException, ValueError) as error:
        reason = _reason(error, timeout_seconds)
        raise DataError(f"could not download {remote.url} to {path}: {reason}") from error
    return digest


@contextmanager
def _locked(part: Path) -> Iterator[int]:
    """Hold `part` for this process, after waiting for any other that downloads the same file.

    At the end, a part that cannot be resumed is removed.
    """
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not files.exists(part) or not os.path.samestat(os.fstat(descriptor), part.stat()):
                continue  # the other process has finished and renamed or removed its file
            try:
                yield descriptor
            finally:
                if not (files.exists(part) and part.stat().st_size and _read_tag(part)):
                    part.unlink(missing_ok=True)
                    _tag(part).unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def _retry(
    attempt: Callable[[], None], part: Path, attempts: int, pause: Callable[[float], None]
) -> None:
    """Repeat `attempt` until `part` is complete.

    Raises OSError if `attempts` in a row bring nothing new, or if the first one cannot connect.
    """
    n_failed, connected = 0, False
    while True:
        before = part.stat().st_size
        try:
            attempt()
            return
        except HTTPError as refusal:
            if refusal.code != 416 or not before:  # 416: the range does not exist
                raise
            refusal.close()
            os.truncate(part, 0)
            error: Exception = refusal
        except (OSError, HTTPException) as failure:
            if isinstance(failure, URLError) and not connected:
                raise
            error = failure
        has_grown = part.stat().st_size > before and _read_tag(part) != ""
        n_failed, connected = (0, True) if has_grown else (n_failed + 1, connected)
        if n_failed >= attempts:
            raise error
        pause(2.0**n_failed)


def _append(remote: Remote, part: Path, on_progress: Progress, timeout_seconds: float) -> None:
    """Request the bytes that are missing and append them to `part`; OSError if some still are."""
    n_present = part.stat().st_size
    tag = _read_tag(part) if n_present else ""
    request = Request(remote.url, headers={"Accept-Encoding": "identity"})
    if tag:  # otherwise the file may have changed
        request.add_header("Range", f"bytes={n_present}-")
        request.add_header("If-Range", tag)
    with _open(request, timeout_seconds) as response:
        range_ = re.match(r"bytes (\d+)-\d+/", response.headers.get("Content-Range", ""))
        resumes = response.status == 206 and range_ and int(range_[1]) == n_present
        done = n_present if resumes else 0
        length = response.headers.get("Content-Length")
        size = remote.size or (done + int(length) if length else 0)
        _tag(part).write_text(_validator(response.headers))
        with open(part, "r+b") as file:
            file.seek(done)
            file.truncate()
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                done += len(chunk)
                if remote.size and done > remote.size:
                    raise DataError(f"it is longer than the {remote.size} bytes it should have")
                on_progress(done, size)
    if done < size:
        raise ConnectionError(f"it ended after {done} of {size} bytes")


def _validator(headers: Mapping[str, str]) -> str:
    """Return what identifies the version of the file; a weak ETag does not promise equal bytes."""
    tag = headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")


def _tag(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")


def _read_tag(part: Path) -> str:
    return _tag(part).read_text() if files.exists(_tag(part)) else ""


def _verified_digest(remote: Remote, part: Path, path: Path) -> str:
    """Return the SHA-256 of a complete file; if it is wrong, DataError and the file is gone."""
    with open(part, "rb") as file:
        digest = file_digest(file, "sha256").hexdigest()
    first = path.with_name(f"{path.name}.sha256")
    expected, advice = remote.sha256, ""
    if not expected and files.exists(first):
        expected = first.read_text().strip().partition(" ")[0]
        if not expected:
            raise DataError(f"{first}, the checksum of the first download, is empty; remove it")
        advice = f", as when it was first fetched; remove {first} if the new one is right"
    if expected and digest != expected:
        part.unlink()
        raise DataError(f"its SHA-256 is {digest}, not {expected}{advice}")
    if not remote.sha256:
        files.write(first, f"{digest}  {path.name}\n".encode())
    return digest


def _open(url: str | Request, seconds: float) -> Any:
    """Return the response, or raise TimeoutError.

    Looking up the name and trying each of its addresses counts too; the limit of a socket would
    start again for every address.
    """
    answer: Future[Any] = Future()

    def ask() -> None:
        try:
            answer.set_result(urlopen(url, timeout=seconds))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(seconds)
    except BaseException:  # Ctrl-C too: close a response that arrives later
        answer.add_done_callback(lambda late: None if late.exception() else late.result().close())
        raise


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
