"""What a message says to install an extra follows from how the package was installed."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from mlx_randygpt.config import install_command


class Installed:
    """The records of an installed package."""

    def __init__(self, installer: str, origin: dict[str, Any] | None) -> None:
        self.records = {"INSTALLER": installer + "\n"}
        if origin:
            self.records["direct_url.json"] = json.dumps(origin)

    def read_text(self, name: str) -> str | None:
        return self.records.get(name)


def advice(monkeypatch: pytest.MonkeyPatch, installer: str, origin: dict[str, Any] | None) -> str:
    monkeypatch.setattr(metadata, "distribution", lambda name: Installed(installer, origin))
    return install_command("serve")


def test_from_a_registry_it_is_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert advice(monkeypatch, "pip", None) == "pip install 'mlx-randygpt[serve]'"
    assert advice(monkeypatch, "uv", None) == "uv pip install 'mlx-randygpt[serve]'"


@pytest.mark.parametrize(("editable", "flag"), [(False, ""), (True, "-e ")])
def test_from_a_clone_it_is_the_clone(
    editable: bool, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "a clone"
    clone.mkdir()
    origin = {"url": clone.as_uri(), "dir_info": {"editable": editable}}
    assert advice(monkeypatch, "pip", origin) == f"pip install {flag}'{clone}[serve]'"
    monkeypatch.chdir(clone)
    assert advice(monkeypatch, "pip", origin) == f"pip install {flag}'.[serve]'"
    gone = origin | {"url": (tmp_path / "gone").as_uri()}
    assert advice(monkeypatch, "pip", gone) == "pip install 'mlx-randygpt[serve]'"


def test_from_a_repository_it_is_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    origin = {"url": "https://example.org/a.git", "vcs_info": {"vcs": "git"}}
    wanted = "pip install 'mlx-randygpt[serve] @ git+https://example.org/a.git'"
    assert advice(monkeypatch, "pip", origin) == wanted
