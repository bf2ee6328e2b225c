"""Which rows are whose, what an environment says about ranks, and which hosts a launch names."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from mlx_randygpt.backends.ranks.group import (
    RESYNC_STEPS,
    RankError,
    SingleRank,
    is_ranked,
    resync,
    share,
)
from mlx_randygpt.cli import group
from mlx_randygpt.cli.training.hosts import Host, Hosts, LaunchError
from mlx_randygpt.cli.training.launcher import remote_line
from mlx_randygpt.state import Batch

TOKENS = np.arange(100, dtype=np.int32)


def batch(n: int) -> Batch:
    return Batch(TOKENS, np.arange(n, dtype=np.int64), 8)


@given(n=st.integers(1, 40), size=st.integers(1, 9))
def test_every_row_is_of_one_rank(n: int, size: int) -> None:
    whole = batch(n)
    shares = [share(whole, rank, size) for rank in range(size)]
    assert sum(part.n_targets() for part in shares) == whole.n_targets()
    held = [part for part in shares if part.n_targets()]
    np.testing.assert_array_equal(np.concatenate([p.starts for p in held]), whole.starts)
    assert all(whole.starts[part.row] == part.starts[0] for part in held)
    counts = [len(part.starts) if part.n_targets() else 0 for part in shares]
    assert max(counts) - min(counts) <= 1


def test_a_rank_without_rows_has_nothing_to_predict() -> None:
    empty = share(batch(1), 0, 2)
    assert empty.n_targets() == 0
    assert empty.y().shape == (1, 8)


def test_ranks_go_on_from_rank_0_now_and_then() -> None:
    restored: list[int] = []
    for step in range(2 * RESYNC_STEPS):
        state = lambda step=step: step  # noqa: E731
        resync(SimpleNamespace(step=step, state=state, restore=restored.append))  # type: ignore[arg-type]
    assert restored == [0, RESYNC_STEPS]


def test_the_only_rank_stops_when_it_is_asked() -> None:
    alone = SingleRank()
    assert not alone.should_stop()
    alone.requested_exit_code = lambda: 130
    assert alone.should_stop()
    assert alone.agreed_exit_code == 130


def ring(tmp_path: Path, content: object) -> dict[str, str]:
    path = tmp_path / "ring.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return {"MLX_RANK": "1", "MLX_HOSTFILE": str(path)}


def test_an_environment_says_whether_there_are_other_ranks(tmp_path: Path) -> None:
    assert is_ranked(ring(tmp_path, [["10.0.0.1:5000"], ["10.0.0.2:5000"]]))
    assert is_ranked({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"})
    assert not is_ranked({})
    assert not is_ranked({"PMI_RANK": "0", "PMI_SIZE": "1"})
    assert not is_ranked({"PMIX_RANK": "0", "SLURM_NTASKS": "1"})
    several = ring(tmp_path, [["127.0.0.1:5000"], ["127.0.0.1:5001"]])
    assert is_ranked({**several, "SLURM_NTASKS": "1"})  # a launcher inside a job of one task
    assert not is_ranked({**ring(tmp_path, "\n"), "MLX_RANK": "0"})  # mlx.launch -n 1


@pytest.mark.parametrize(
    ("content", "rank", "why"),
    [
        ([["a:1"], ["b:1"]], "x", "MLX_RANK='x' is not a number"),
        ([["a:1"], ["b:1"]], "2", "lists 2 ranks: 0 to 1"),
        ("[[", "0", "is not JSON"),
        ({"hosts": []}, "0", "is not a list such as"),
        ([["a:1"], []], "0", "is not a list such as"),
        ([["a:1"], [1]], "0", "is not a list such as"),
    ],
)
def test_a_ring_that_mlx_would_wait_for_is_refused(
    tmp_path: Path, content: object, rank: str, why: str
) -> None:
    with pytest.raises(RankError, match=why):
        is_ranked({**ring(tmp_path, content), "MLX_RANK": rank})


def test_a_hostfile_of_mlx_launch_is_read(tmp_path: Path) -> None:
    path = tmp_path / "hosts.json"
    hosts = [{"ssh": "mac-1", "ips": ["10.0.0.1"], "rdma": []}, {"ssh": "127.0.0.1"}]
    path.write_text(json.dumps({"backend": "ring", "envs": ["A=b=c"], "hosts": hosts}))
    found = Hosts.read(path)
    assert found.hosts == [Host("mac-1", "10.0.0.1"), Host("127.0.0.1", "127.0.0.1")]
    assert [host.here for host in found.hosts] == [False, True]
    assert found.environment == {"A": "b=c"}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "is not JSON"),
        ("[]", "lists no hosts"),
        ("3", "has no list of hosts"),
        ('[{"ips": ["10.0.0.1"]}]', 'is not {"ssh": name, "ips"'),
        ('[{"ssh": "-oProxyCommand=x", "ips": ["10.0.0.1"]}]', 'is not {"ssh": name'),
        ('[{"ssh": "mac-1"}]', "mac-1 has no ips"),
        ('{"backend": "jaccl", "hosts": []}', "asks for the backend 'jaccl'"),
    ],
)
def test_a_hostfile_that_does_not_fit_is_refused(tmp_path: Path, content: str, why: str) -> None:
    path = tmp_path / "hosts.json"
    path.write_text(content)
    with pytest.raises(LaunchError, match=why):
        Hosts.read(path)


def test_a_shell_elsewhere_gets_words_as_they_were(tmp_path: Path) -> None:
    words = ["printf", "%s|", "it's", '$HOME "x"', "a;b"]
    line = remote_line(words, {"TOLD": "a b"}, '[["h:1"]]').replace("exec", "cat $ring; exec")
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == '[["h:1"]]it\'s|$HOME "x"|a;b|'


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "launch starts train, and nothing was given"),
        (["-n", "2", "--", "sample"], "launch starts train, not sample"),
        (["--", "train"], "give either -n or --hostfile"),
        (["-n", "2", "--hostfile", "x", "--", "train"], "give either -n or --hostfile"),
        (["-n", "0", "--", "train"], "0 is not in the range"),
    ],
)
def test_a_launch_of_nothing_is_wrong_usage(words: list[str], why: str) -> None:
    done = CliRunner().invoke(group, ["launch", *words])
    assert done.exit_code == 2
    assert why in done.stderr


@pytest.mark.parametrize("metal", [True, False])
def test_sums_are_made_in_one_order_and_on_metal_no_gpu_waits_for_them(
    metal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metal ends a program whose GPU waits for another rank; a sine is the sum over two here."""
    mx = pytest.importorskip("mlx.core", exc_type=ImportError)
    from mlx_randygpt.backends.ranks import ring

    monkeypatch.setattr(mx.distributed, "all_sum", lambda array, group: mx.sin(array))
    monkeypatch.setattr(ring, "BUCKET", 6)
    ranks = ring.RingGroup(SimpleNamespace(rank=lambda: 0, size=lambda: 2))
    ranks._metal = metal
    grads = {"a": mx.ones((2, 3)), "b": mx.ones(4) * 2, "c": mx.ones((5, 1)) * 3}
    loss, means = ranks.mean(mx.array(4.0), grads, 0.5)
    mx.export_to_dot(str(tmp_path / "graph.dot"), loss, *means.values())
    graph = (tmp_path / "graph.dot").read_text()
    assert ("Sin" in graph, "Depends" in graph) == (not metal, not metal)
    assert [*means] == [*grads]
    for name, value in {"a": 1.0, "b": 2.0, "c": 3.0}.items():
        assert means[name].shape == grads[name].shape
        np.testing.assert_allclose(means[name], np.full(grads[name].shape, np.sin(value / 2)), 1e-6)
    assert float(loss) == pytest.approx(np.sin(2.0))
