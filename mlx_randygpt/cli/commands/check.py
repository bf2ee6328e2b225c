"""`mlxgpt check`: check the gradients on this machine."""

from __future__ import annotations

import os
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.options import json_option
from mlx_randygpt.cli.output import echo, print_json
from mlx_randygpt.cli.values import FilePath

if TYPE_CHECKING:
    from mlx_randygpt.check import Finding


@click.command("check", cls=Command)
@click.option(
    "--checkpoint",
    type=FilePath(path_type=Path),
    help="Check at the weights of this checkpoint or run, instead of small models.",
)
@json_option
@click.pass_context
def command(ctx: click.Context, checkpoint: Path | None, json: bool) -> None:
    """Check the gradients on this machine, tensor by tensor; exit with code 1 if a check fails.

    Finite differences check NumPy, NumPy checks MLX if it is installed, and a short trajectory
    checks the optimizers. The largest errors come first.
    """
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # read when mlx is imported
    from mlx_randygpt.backends import mlx_device
    from mlx_randygpt.check import SUBJECTS, check_checkpoint, check_recipe
    from mlx_randygpt.checkpoint import load_checkpoint

    device, reason = mlx_device()
    other = "mlx" if device is not None else None
    subjects: dict[str, list[Finding]] = {}
    if checkpoint is not None:
        saved = load_checkpoint(checkpoint, weights_only=True)
        at_weights = check_checkpoint(saved.model, saved.train, saved.state.params, other)
        subjects[str(checkpoint)] = list(at_weights)
    else:
        subjects = {subject: list(check_recipe(subject, other)) for subject in SUBJECTS}
    for findings in subjects.values():
        findings.sort(key=lambda f: (f.check, -f.error))
    n_failed = sum(not f.holds for findings in subjects.values() for f in findings)
    if json:
        rows = [_row(subject, f) for subject, findings in subjects.items() for f in findings]
        mlx = device.description if device is not None else None
        print_json({"passed": n_failed == 0, "mlx": mlx, "findings": rows})
    else:
        echo(f"MLX on {device.description}" if device else f"Without MLX: {reason}")
        for subject, findings in subjects.items():
            _print(subject, findings)
        echo(f"{n_failed} checks failed" if n_failed else "Every check holds.")
    ctx.exit(1 if n_failed else 0)


def _row(subject: str, finding: Finding) -> dict[str, Any]:
    return {
        "subject": subject,
        "check": finding.check,
        "tensor": finding.tensor,
        "error": finding.error,
        "bound": finding.bound,
        "passed": finding.holds,
    }


def _print(subject: str, findings: list[Finding]) -> None:
    echo(f"\n{subject}")
    for check, group in groupby(findings, key=lambda f: f.check):
        same_check = list(group)
        echo(f"  {check}, relative, at most {same_check[0].bound:.0e}")
        for f in same_check:
            echo(f"    {f.error:.1e} {'✓' if f.holds else '✗'} {f.tensor}")
