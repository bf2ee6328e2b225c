"""Two processes of one number write one token cache, and none of its tokens is wrong.

python tests/chaos/twins.py FOLDER --attempts 100 tries it more often.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import twins


@pytest.mark.slow
def test_two_processes_of_one_number_write_no_wrong_token(tmp_path: Path) -> None:
    if reason := twins.why_not():
        pytest.skip(reason)
    counts = twins.attempt(tmp_path, 3)
    assert counts["overlapping"] >= 2
    failures = ("failed processes", "other output", "other names", "wrong tokens", "other bytes")
    assert [counts[name] for name in failures] == [0] * 5, counts
