"""`mlxgpt launch`: one command on several ranks, here or on other machines, as one program."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from mlx_randygpt.cli.options import Command
from mlx_randygpt.config import UserError

STARTING_PORT = 32323  # as mlx.launch has it
MOST_RANKS = 1024
HERE = ("127.0.0.1", "localhost", "::1")


class LaunchError(UserError):
    """Ranks that cannot be started."""


@dataclass(frozen=True)
class Host:
    """A machine for one rank: the name ssh knows it by, and its address in the ring."""

    name: str
    address: str

    @property
    def here(self) -> bool:
        return self.name in HERE


@dataclass(frozen=True)
class Hosts:
    """The machines of a run, in the order of the ranks, and what goes into their environment."""

    hosts: list[Host]
    environment: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> Hosts:
        """A hostfile of mlx.launch: [{"ssh": …, "ips": [ip]}, …], or an object that holds such a
        list as "hosts", with "envs" beside it."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise LaunchError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise LaunchError(f"{path} is not JSON: {error}") from error
        around = content if isinstance(content, dict) else {"hosts": content}
        if (backend := around.get("backend", "ring")) not in ("ring", "", "any"):
            raise LaunchError(
                f"{path} asks for the backend {backend!r}; mlxgpt launch starts the ring: give it "
                "to mlx.launch, which starts all, with `-- python -m mlx_randygpt train …`"
            )
        hosts = [_host(path, at) for at in _list(path, around.get("hosts"), "hosts")]
        if not hosts:
            raise LaunchError(f"{path} lists no hosts")
        pairs = [str(at).partition("=") for at in _list(path, around.get("envs", []), "envs")]
        return Hosts(hosts, {name: value for name, _, value in pairs})


def _list(path: Path, value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise LaunchError(f'{path} has no list of {what}, such as [{{"ssh": "a", "ips": ["ip"]}}]')
    return value


def _host(path: Path, value: Any) -> Host:
    try:
        name, addresses = value["ssh"], value.get("ips", [])
        address = addresses[0] if addresses else name if name in HERE else ""
    except (TypeError, KeyError, AttributeError, IndexError):
        name = address = None
    if not (isinstance(name, str) and isinstance(address, str) and name and name[0] != "-"):
        raise LaunchError(f'{path}: {json.dumps(value)[:80]} is not {{"ssh": name, "ips": [ip]}}')
    if not address:
        raise LaunchError(f"{path}: {name} has no ips; the ring needs an address of each host")
    return Host(name, address)


@click.command(
    "launch",
    cls=Command,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option("-n", "n", type=click.IntRange(1, MOST_RANKS), help="Ranks on this machine.")
@click.option(
    "--hostfile",
    type=click.Path(path_type=Path),
    help="One rank on each of these machines, by ssh; the format of mlx.launch.",
)
@click.option(
    "--starting-port",
    type=click.IntRange(1, 65535 - MOST_RANKS),
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
    from mlx_randygpt.cli.processes import Ranks

    if arguments[:1] != ("train",):
        given = f"not {arguments[0]}" if arguments else "and nothing was given"
        raise click.UsageError(f"launch starts train, {given}: mlxgpt launch -n 4 -- train …")
    if (n is None) == (hostfile is None):
        raise click.UsageError("give either -n or --hostfile")
    hosts = Hosts.read(hostfile) if hostfile else Hosts([Host(HERE[0], HERE[0])] * (n or 1))
    again = ["--hostfile", str(hostfile)] if hostfile else ["-n", str(n)]
    prefix = shlex.join(["mlxgpt", "launch", *again, "--"])
    with Ranks(hosts, starting_port, arguments, prefix) as ranks:
        code = ranks.wait()
    raise SystemExit(code)
