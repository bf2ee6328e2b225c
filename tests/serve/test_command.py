"""`mlxgpt serve` as a process: where it listens, how it ends, what keeps it from starting."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client")
pytest.importorskip("pydantic")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from click.testing import CliRunner

from mlx_randygpt.checkpoint import Checkpoint, save_checkpoint
from mlx_randygpt.cli import group
from mlx_randygpt.config import install_command
from mlx_randygpt.progress import Progress


@pytest.fixture
def checkpoint(make_run: Callable[..., tuple], tmp_path: Path) -> Path:  # type: ignore[type-arg]
    run, backend = make_run("modern")
    path = tmp_path / "tale" / "checkpoints" / "checkpoint.safetensors"
    facts = (run.tokenizer.to_json(), run.data, "numpy", backend.state())
    save_checkpoint(path, Checkpoint(run.model, run.train, Progress(), *facts))
    reports = [{"step": 1, "loss": 3.0}, {"step": 2, "val_loss": 2.5}, {"step": 2, "loss": 2.0}]
    lines = [json.dumps(report) for report in reports]
    (path.parent / "metrics.jsonl").write_text("\n".join([*lines, '{"cut off']))
    return path


def words(checkpoint: Path) -> list[str]:
    return ["serve", "--checkpoint", str(checkpoint), "--backend", "numpy"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15)])
def test_it_serves_until_it_is_told_to_stop(number: int, code: int, checkpoint: Path) -> None:
    command = [sys.executable, "-m", "mlx_randygpt", *words(checkpoint), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        serving = next(line for line in process.stderr if line.startswith("Serving"))
        found = re.search(r"http://127\.0\.0\.1:(\d+) ", serving)
        assert found, serving
        url = f"http://127.0.0.1:{found[1]}"
        with urllib.request.urlopen(f"{url}/run") as answer:
            told = json.load(answer)
        body = json.dumps({"prompt": "The", "max_tokens": 9, "seed": 5}).encode()
        asked = urllib.request.Request(f"{url}/v1/completions", body)
        with urllib.request.urlopen(asked) as answer:
            text = json.load(answer)["choices"][0]["text"]
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == code, rest
    assert "Traceback" not in rest
    assert told["name"] == "tale"
    assert told["curve"] == {"loss": [[1.0, 3.0], [2.0, 2.0]], "val_loss": [[2.0, 2.5]]}
    written = ["--prompt", "The", "--max-tokens", "9", "--seed", "5", "--no-echo"]
    sampled = CliRunner().invoke(group, ["sample", *words(checkpoint)[1:], *written])
    assert sampled.stdout == text + "\n"


def test_the_decoder_is_compiled_before_the_first_request(make_run: Callable[..., Any]) -> None:
    pytest.importorskip("numba")
    from mlx_randygpt.cli.commands import serve as command

    run, backend = make_run("modern")
    assert backend.decoding == "NumPy without numba"
    assert command._warm_up(backend, run.model).decoding == "compiled by numba"


def test_a_port_that_is_taken_is_one_line(checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = CliRunner().invoke(group, [*words(checkpoint), "--port", port])
    assert done.exit_code == 1
    assert done.stderr == (
        f"Error: cannot listen on 127.0.0.1:{port}: Address already in use; try another --port\n"
    )


@pytest.mark.parametrize("library", ["prometheus_client", "pydantic", "starlette", "uvicorn"])
def test_without_the_extra_one_line_says_how_to_install_it(
    library: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    done = CliRunner().invoke(group, [*words(checkpoint), "--port", "0"])
    assert (done.exit_code, done.stderr.splitlines()[1:]) == (1, [])
    assert f"needs the library {library}" in done.stderr
    assert install_command("serve") in done.stderr


def test_the_wheel_holds_the_page(tmp_path: Path) -> None:
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder
    root = Path(__file__).parents[2]
    [wheel] = builder(str(root)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(wheel).namelist())
    page = {f"mlx_randygpt/serve/page/{name}" for name in ("index.html", "app.js", "style.css")}
    assert page < names


def test_an_empty_host_is_one_line(checkpoint: Path) -> None:
    done = CliRunner().invoke(group, [*words(checkpoint), "--host", "", "--port", "0"])
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith("Error: --host is empty; give an address")


def test_a_short_form_of_a_loopback_address_is_one(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was bound decides which hosts are accepted, not how it was written."""
    from mlx_randygpt.cli.commands import serve as command

    names: list[object] = []
    monkeypatch.setattr(
        command, "_serve", lambda api, listening: names.append(api._settings.host_names)
    )
    for host in ("127.1", "127.0.0.1", "0.0.0.0"):
        done = CliRunner().invoke(group, [*words(checkpoint), "--host", host, "--port", "0"])
        assert done.exit_code == 0, done.output
    assert names == [("localhost", "127.1"), ("localhost", "127.0.0.1"), None]
