"""`mlxgpt check`: the gradients proven on this machine."""

from __future__ import annotations

import os
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.options import json_option
from mlx_randygpt.cli.output import print_json

if TYPE_CHECKING:
    from mlx_randygpt.check import Finding


@click.command("check", cls=Command)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Check at this model's weights instead of those of small models.",
)
@json_option
@click.pass_context
def command(ctx: click.Context, checkpoint: Path | None, json: bool) -> None:
    """Prove the gradients: finite differences against NumPy, NumPy against MLX if it is here,
    tensor by tensor, worst first, and a short trajectory of the optimizer. Exit code 1 if one
    fails."""
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
    failed = sum(not f.holds for found in subjects.values() for f in found)
    if json:
        print_json({
            "passed": failed == 0,
            "mlx": device.description if device is not None else None,
            "findings": [
                {"subject": subject, "check": f.check, "tensor": f.tensor, "error": f.error,
                 "bound": f.bound, "passed": f.holds}
                for subject, found in subjects.items() for f in found
            ],
        })  # fmt: skip
    else:
        click.echo(f"MLX on {device.description}" if device else f"Without MLX: {reason}")
        for subject, findings in subjects.items():
            _print(subject, findings)
        click.echo(f"{failed} checks failed" if failed else "Every check holds.")
    ctx.exit(1 if failed else 0)


def _print(subject: str, found: list[Finding]) -> None:
    click.echo(f"\n{subject}")
    for check, group in groupby(found, key=lambda f: f.check):
        findings = list(group)
        click.echo(f"  {check}, relative, at most {findings[0].bound:.0e}")
        for f in findings:
            click.echo(f"    {f.error:.1e} {'✓' if f.holds else '✗'} {f.tensor}")
