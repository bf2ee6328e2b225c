"""`mlxgpt launch`: one command on several ranks, here or on other machines, as one program."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.training.hosts import HERE, Host, Hosts

STARTING_PORT = 32323  # as mlx.launch has it
MAX_RANKS = 1024


@click.command(
    "launch",
    cls=Command,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option("-n", "n", type=click.IntRange(1, MAX_RANKS), help="Ranks on this machine.")
@click.option(
    "--hostfile",
    type=click.Path(path_type=Path),
    help="One rank on each of these machines, by ssh; the format of mlx.launch.",
)
@click.option(
    "--starting-port",
    type=click.IntRange(1, 65535 - MAX_RANKS),
    default=STARTING_PORT,
    show_default=True,
    help="Of the ring, one up for each rank; among ranks here, free ones.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="-- train [OPTIONS]")
def command(
    n: int | None, hostfile: Path | None, starting_port: int, arguments: tuple[str, ...]
) -> None:
    """Train one model on several ranks: mlxgpt launch -n 4 -- train --data book.txt

    Each rank computes its share of every batch. --batch-size counts the whole batch: the same
    command on any number of ranks is the same run.
    """
    from mlx_randygpt.cli.training.launcher import RankProcesses

    if arguments[:1] != ("train",):
        given = f"not {arguments[0]}" if arguments else "and nothing was given"
        raise click.UsageError(f"launch starts train, {given}: mlxgpt launch -n 4 -- train …")
    if (n is None) == (hostfile is None):
        raise click.UsageError("give either -n or --hostfile")
    hosts = Hosts.read(hostfile) if hostfile else Hosts([Host(HERE[0], HERE[0])] * (n or 1))
    again = ["--hostfile", str(hostfile)] if hostfile else ["-n", str(n)]
    prefix = shlex.join(["mlxgpt", "launch", *again, "--"])
    with RankProcesses(hosts, starting_port, arguments, prefix) as ranks:
        code = ranks.wait()
    raise SystemExit(code)
