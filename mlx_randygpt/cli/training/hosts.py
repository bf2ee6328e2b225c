"""The machines of a launch, from a hostfile in the format of mlx.launch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_randygpt.config import UserError
from mlx_randygpt.files import read_text

HERE = ("127.0.0.1", "localhost", "::1")


class LaunchError(UserError):
    """Ranks that cannot be started."""


@dataclass(frozen=True)
class Host:
    """A machine for one rank: its name for ssh, and its address in the ring."""

    name: str
    address: str

    @property
    def here(self) -> bool:
        """Whether this is the machine of the launcher."""
        return self.name in HERE


@dataclass(frozen=True)
class Hosts:
    """The machines of a run, in the order of the ranks, and their environment variables."""

    hosts: list[Host]
    environment: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> Hosts:
        """Read a hostfile of mlx.launch.

        It is a list, [{"ssh": name, "ips": [ip]}, …], or an object with such a list as "hosts" and
        with variables as "envs".
        """
        try:
            content = json.loads(read_text(path))
        except OSError as error:
            raise LaunchError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise LaunchError(f"{path} is not JSON: {error}") from error
        table = content if isinstance(content, dict) else {"hosts": content}
        if (backend := table.get("backend", "ring")) not in ("ring", "", "any"):
            raise LaunchError(
                f"{path} asks for the backend {backend!r}; mlxgpt launch only starts the ring. "
                "Use mlx.launch for the others, with `-- python -m mlx_randygpt train …`"
            )
        hosts = [_host(path, at) for at in _list(path, table.get("hosts"), "hosts")]
        if not hosts:
            raise LaunchError(f"{path} lists no hosts")
        pairs = [str(at).partition("=") for at in _list(path, table.get("envs", []), "envs")]
        return Hosts(hosts, {name: value for name, _, value in pairs})


def _list(path: Path, value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise LaunchError(f'{path} has no list of {name}, such as [{{"ssh": "a", "ips": ["ip"]}}]')
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
