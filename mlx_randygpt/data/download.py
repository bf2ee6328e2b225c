"""One file from the network, whole and checked or not at all.

Owns the request, its limits, the checksum and the temporary name; progress goes to a callback.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256 as new_sha256
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from mlx_randygpt.data import DataError

CHUNK_BYTES = 1 << 16
URL_VARIABLE = "MLXGPT_SHAKESPEARE_URL"  # a mirror of tiny Shakespeare
Progress = Callable[[int, int], None]  # bytes so far, bytes in all


@dataclass(frozen=True)
class Remote:
    """A file that never changes, and where it is."""

    url: str
    size: int  # bytes
    sha256: str


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


def _open(url: str, seconds: float) -> Any:
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
