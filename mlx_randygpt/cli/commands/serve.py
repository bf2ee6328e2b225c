"""`mlxgpt serve`: serve a trained model over HTTP until Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.loading import build, parse_biases, read
from mlx_randygpt.cli.options import (
    backend_option,
    check_options,
    checkpoint_option,
    quantize_option,
    require_check,
    sampling_options,
)
from mlx_randygpt.cli.output import echo
from mlx_randygpt.config import UserError, missing

if TYPE_CHECKING:
    from mlx_randygpt.backends.base import Scorer
    from mlx_randygpt.checkpoint import Checkpoint
    from mlx_randygpt.config import ModelConfig
    from mlx_randygpt.serve import ServedModel
    from mlx_randygpt.serve.api import Api
    from mlx_randygpt.tokenizers import Tokenizer

SWITCH_SECONDS = 0.0005  # for which a thread that computes can keep the event loop waiting
NOTICE_SECONDS = 1.0  # of preparation that are not worth a line
N_POINTS = 1000  # of a loss curve on the page


class ServeError(UserError, RuntimeError):
    """The server cannot start."""


@click.command("serve", cls=Command)
@checkpoint_option
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Listen on this address; 0.0.0.0 is all networks.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Listen on this port; 0 is a free one.",
)
@click.option(
    "--api-key",
    default="",
    help="Ask for this key; MLXGPT_SERVE_API_KEY keeps it out of the process list.",
)
@click.option("--name", help="Give the model this name.  [default: the folder of the run]")
@click.option(
    "--batch-size",
    type=click.IntRange(1, 4096),
    default=64,
    show_default=True,
    help="Decode at most this many texts together.",
)
@click.option(
    "--queue",
    type=click.IntRange(0, 100_000),
    default=256,
    show_default=True,
    help="Let this many texts wait; more are refused with 503.",
)
@sampling_options
@check_options
@quantize_option
@backend_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    checkpoint: Path | None,
    host: str,
    port: int,
    api_key: str,
    name: str | None,
    batch_size: int,
    queue: int,
    stop: tuple[str, ...],
    logit_bias: tuple[str, ...],
    check: bool,
    data: tuple[str, ...],
    backend: str,
    quantize: int | None,
    **filters: Any,
) -> None:
    """Serve a trained model: the OpenAI API, and a page in the browser."""
    from mlx_randygpt.sampling.filters import SampleConfig

    require_check(check, data)
    SampleConfig(stop=stop, **filters)  # check the options before loading anything
    _require_extra()
    from mlx_randygpt.serve import Settings
    from mlx_randygpt.serve.api import Api
    from mlx_randygpt.serve.engine import Engine
    from mlx_randygpt.serve.http import is_loopback
    from mlx_randygpt.serve.metrics import Metrics

    path, saved, tokenizer = read(checkpoint)
    bias = parse_biases(logit_bias, tokenizer)
    seed_source = ctx.get_parameter_source("seed")
    settings = Settings(
        api_key=api_key,
        defaults=SampleConfig(stop=stop, logit_bias=bias, **filters),
        seed=None if seed_source is click.core.ParameterSource.DEFAULT else filters["seed"],
    )
    served, metrics = _describe_model(name, path, saved, tokenizer), Metrics()
    if check:
        served = replace(served, find_copies=_copies_finder(saved, tokenizer, data))
    if quantize is not None:
        options = (*served.options, "--quantize", str(quantize))
        served = replace(served, params={}, options=options)
    weights = [saved]  # handed to the engine; quantising then releases their memory
    del saved
    with _listen(host, port) as listening:
        engine = Engine(
            lambda: _warm_up(build(weights.pop(), backend, quantize, batch_size), served.model),
            served.model,
            metrics,
            n_streams=batch_size,
            n_waiting=queue,
        )
        engine.start()
        # a name for another machine is not checked: the server cannot know all of its own
        is_local = is_loopback(listening.getsockname()[0])
        names = ("localhost", host.lower()) if is_local else None
        settings = replace(settings, host_names=names)
        _serve(Api(served, settings, engine, metrics), listening)


def _warm_up(backend: Scorer, model: ModelConfig) -> Scorer:
    """Read one token, so that no request waits for libraries to load and compile."""
    from mlx_randygpt.sampling.generate import Streams

    message = "Preparing the decoder; the first start on a machine takes longest."
    notice = threading.Timer(NOTICE_SECONDS, echo, (message,), {"err": True})
    notice.daemon = True
    notice.start()
    backend.warm_up()
    Streams(backend, model, 1).join([[0]])
    notice.cancel()
    return backend


def _serve(api: Api, listening: socket.socket) -> None:
    from mlx_randygpt.serve.server import Server, connection_limit

    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    echo(f"Serving on http://{shown}:{port} (Ctrl-C stops)", err=True)
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()  # what is loaded by now stays; looking through it again would stop every thread
    server = Server(api.app(), listening, api.stop, connection_limit(), _exit_at_once)
    server.serve_until_signal()


def _exit_at_once(number: int) -> None:
    """End the process even if a thread is busy; a server writes no files, so nothing is lost."""
    echo("Stopped before a computation had ended.", err=True)
    os._exit(128 + number)


def _require_extra() -> None:
    try:
        import prometheus_client
        import pydantic
        import starlette
        import uvicorn

        del prometheus_client, pydantic, starlette, uvicorn
    except ImportError as error:
        raise missing("`mlxgpt serve`", str(error.name), "serve") from error


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; raise ServeError if the port is taken or not allowed."""
    if not host:
        raise ServeError("--host is empty; give an address such as 127.0.0.1, or 0.0.0.0 for all")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(1024)
    except (OSError, TypeError, ValueError) as error:  # the last two: not a host name
        listening.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ServeError(f"cannot listen on {host}:{port}: {reason}; try another --port") from error
    return listening


def _describe_model(
    name: str | None, path: Path, saved: Checkpoint, tokenizer: Tokenizer
) -> ServedModel:
    """Return the model's facts; its default name is the run folder's."""
    from mlx_randygpt.files import resolve
    from mlx_randygpt.serve import ServedModel

    digest = hashlib.sha256()
    for weight in saved.state.params.values():
        digest.update(weight.tobytes())
    folders = resolve(path).parents
    folder = next((f.name for f in folders if f.name not in ("", "checkpoints")), "model")
    return ServedModel(
        name=name or folder,
        model=saved.model,
        tokenizer=tokenizer,
        params=saved.state.params,
        created=int(path.stat().st_mtime),
        fingerprint=digest.hexdigest()[:12],
        step=saved.state.step,
        prompt=saved.train.prompt,
        options=("--checkpoint", str(path)),
        curve=_read_curve(path.parent / "metrics.jsonl"),
    )


def _copies_finder(
    saved: Checkpoint, tokenizer: Tokenizer, data: tuple[str, ...]
) -> Callable[[str], dict[str, Any]]:
    """Load the training text; return a function from a text to what it copies."""
    from mlx_randygpt.cli.copies import copies_json, load_training_text

    original = load_training_text(saved, tokenizer, data)
    return lambda text: copies_json(text, original.find([text])[0], original.changed)


def _read_curve(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Return the run's losses, at most N_POINTS of each; none if the file is missing.

    Damaged lines are skipped, a file that cannot be read is reported.
    """
    from mlx_randygpt.files import is_file
    from mlx_randygpt.screen.curve import Curve

    curves = {"loss": Curve(N_POINTS), "val_loss": Curve(N_POINTS)}
    try:
        with open(path if is_file(path) else os.devnull, "rb") as lines:
            for line in lines:
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    report = json.loads(line)
                    for name, curve in curves.items():
                        if name in report:
                            curve.add(float(report["step"]), float(report[name]))
    except OSError as error:
        echo(f"Left out: the curve; {path} cannot be read: {error.strerror}", err=True)
    return {name: curve.points for name, curve in curves.items()}
