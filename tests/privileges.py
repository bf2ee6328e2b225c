"""A user whom permissions concern, for tests that may run as root."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Let permissions count for root too: lay down the two capabilities that overrule them."""
    if os.geteuid() != 0:
        yield
        return
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
    all_of_root, fewer = ((ctypes.c_uint32 * 6)() for _ in range(2))
    assert libc.capget(header, all_of_root) == libc.capget(header, fewer) == 0
    fewer[0] &= ~0b110  # of the effective ones CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, fewer) == 0
    try:
        yield
    finally:
        assert libc.capset(header, all_of_root) == 0
