"""`mlxgpt launch`: start one training run on several ranks, here or on other machines."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.training.hosts import HERE, Host, Hosts
from mlx_randygpt.cli.values import FilePath

STARTING_PORT = 32323  # the default of mlx.launch
MAX_RANKS = 1024


@click.command(
    "launch",
    cls=Command,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option(
    "-n", "n", type=click.IntRange(1, MAX_RANKS), help="Start this many ranks on this machine."
)
@click.option(
    "--hostfile",
    type=FilePath(path_type=Path),
    help="Start one rank on each machine of this file by ssh (format of mlx.launch).",
)
@click.option(
    "--starting-port",
    type=click.IntRange(1, 65535 - MAX_RANKS),
    default=STARTING_PORT,
    show_default=True,
    help="Use ports from this one on between machines; ranks on one machine use free ports.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="-- train [OPTIONS]")
def command(
    n: int | None, hostfile: Path | None, starting_port: int, arguments: tuple[str, ...]
) -> None:
    """Train one model on several ranks or machines.

    Example: mlxgpt launch -n 4 -- train --data book.txt

    Each rank computes its share of every batch. --batch-size is the size of the whole batch, so
    the same command on any number of ranks is the same run.
    """
    from mlx_randygpt.cli.training.launcher import RankProcesses

    if arguments[:1] != ("train",):
        problem = f"not {arguments[0]}" if arguments else "and nothing was given"
        raise click.UsageError(f"launch starts train, {problem}: mlxgpt launch -n 4 -- train …")
    if (n is None) == (hostfile is None):
        raise click.UsageError("give either -n or --hostfile")
    hosts = Hosts.read(hostfile) if hostfile else Hosts([Host(HERE[0], HERE[0])] * (n or 1))
    host_options = ["--hostfile", str(hostfile)] if hostfile else ["-n", str(n)]
    prefix = shlex.join(["mlxgpt", "launch", *host_options, "--"])
    with RankProcesses(hosts, starting_port, arguments, prefix) as ranks:
        code = ranks.wait()
    raise SystemExit(code)
