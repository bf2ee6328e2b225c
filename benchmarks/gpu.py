"""The proof on this machine's GPU, in one command: correctness first, then speed.

    python benchmarks/gpu.py [--data FILE] [--json FILE] [--markdown FILE] [--parts NAME ...]
                             [--torch-python PATH] [--device cpu] [--small]

Every part runs in a process of its own on the device MLX finds, has a time of its own, and ends
alone: one that fails or is stopped is a line of the report and keeps the rows it had, the others
go on. All of them together end within eight minutes. `learning` needs the text that --data names.
`torch` needs PyTorch, here or under the interpreter that --torch-python names. --small takes tiny
sizes, to try the program. Exit code 1 where a part fails or a proof does not hold.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turns import save

Row = dict[str, Any]
Tables = dict[str, list[Row]]


@dataclass(frozen=True)
class Part:
    """One part: the module with the function of its name, its longest time, what it is about."""

    module: str
    seconds: int
    about: str
    function: str = ""  # where it is not the part's name
    env: dict[str, str] = field(default_factory=dict)  # what MLX reads when it is imported


PARTS = {
    "device": Part("gpu_training", 20, "What this machine is, and its rate in matrix products."),
    "gradients": Part(
        "gpu_proof", 40, "Every gradient against NumPy, the worst tensor of each; TF32 off.",
        env={"MLX_ENABLE_TF32": "0"},
    ),
    "tf32": Part(
        "gpu_proof", 30, "The same with TF32, as MLX trains by default.", "gradients_tf32",
        {"MLX_ENABLE_TF32": "1"},
    ),
    "resume": Part(
        "gpu_proof", 50, "Stopped, saved, loaded and finished, beside an undisturbed run and that "
        "run made again; without cuDNN's attention, whose gradient is added in no fixed order.",
        env={"MLX_CUDA_USE_CUDNN_SDPA": "0"},
    ),
    "training": Part(
        "gpu_training", 120, "Optimizer steps as `mlxgpt train` takes them, the loss read one step "
        "late; the fraction is of the device's own matrix rate in that type. The profile is in "
        "milliseconds, each piece alone and waited for.",
    ),
    "decoding": Part("gpu_training", 40, "Streams of text; `drawn` is what `mlxgpt sample` does."),
    "learning": Part("gpu_learning", 70, "6/6/384 × 256, modern, bfloat16, evaluated as it goes."),
    "torch": Part(
        "gpu_torch", 105, "nanoGPT's model, compiled, bfloat16 autocast, fused AdamW, in turns "
        "with ours, each in its own process.", "beside_torch",
    ),
}  # fmt: skip
TITLES = {"tf32": "gradients with TF32", "torch": "beside PyTorch"}


def main() -> int:
    options = parse(None)
    if options.part:
        return run_part(options)
    started = time.monotonic()
    found = {}
    for name in options.parts:
        found[name] = watched(name, options)
        print(f"{name}: {outcome(found[name])}, {found[name]['seconds']} s", file=sys.stderr)
    report = {
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/gpu.py " + " ".join(sys.argv[1:]),
        "seconds": round(time.monotonic() - started, 1),
        "small": options.small,
        "passed": all(outcome(part) in ("passed", "done", "skipped") for part in found.values()),
        "parts": found,
    }
    save(options.json, **report)
    text = markdown(report)
    if options.markdown:
        options.markdown.write_text(text)
    print(text)
    return 0 if report["passed"] else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--data", help="tiny Shakespeare, for `learning`")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto")
    parser.add_argument("--torch-python", default=sys.executable, metavar="PATH")
    parser.add_argument("--small", action="store_true", help="tiny sizes, a few seconds each")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def watched(name: str, options: argparse.Namespace) -> Row:
    """The part in a process of its own: its tables, and an `error` or `skipped` that says why."""
    part = PARTS[name]
    env = os.environ | part.env
    command = [sys.executable, __file__, "--part", name, "--device", options.device]
    command += ["--torch-python", options.torch_python]
    command += ["--data", options.data] * bool(options.data) + ["--small"] * options.small
    started, result = time.monotonic(), {}
    with tempfile.TemporaryFile("w+") as lines, tempfile.TemporaryFile("w+") as complaints:
        child = subprocess.Popen(
            command, env=env, stdout=lines, stderr=complaints, start_new_session=True
        )
        try:
            code = child.wait(part.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, 9)  # with the processes it may have started
            child.wait()
            code, result["error"] = 0, f"stopped after {part.seconds} s; the rows until then"
        tables, said = collect(lines), last_line(complaints)
    if code:
        result["error"] = f"ended with code {code}: {said}"
    skipped = [row["why"] for row in tables.pop("skipped", [])]
    if skipped:
        result["skipped"] = skipped[0]
    holds = [row["holds"] for rows in tables.values() for row in rows if "holds" in row]
    if holds:
        result["holds"] = all(holds)
    return {"seconds": round(time.monotonic() - started, 1), **result, "tables": tables}


def collect(lines: Any) -> Tables:
    """The rows that a part has written, by table; a line cut short by its end is left out."""
    lines.seek(0)
    tables: Tables = {}
    for line in lines:
        if line.endswith("\n"):
            table, row = json.loads(line)
            tables.setdefault(table, []).append(row)
    return tables


def last_line(complaints: Any) -> str:
    complaints.seek(0)
    return next((line.strip() for line in reversed(complaints.readlines()) if line.strip()), "")


def run_part(options: argparse.Namespace) -> int:
    """In the part's own process: its rows to stdout, each as soon as it is there."""
    part = PARTS[options.part]
    rows = sys.stdout
    sys.stdout = sys.stderr  # what a library prints is no row
    if options.device == "cpu":
        import mlx.core as mx

        mx.set_default_device(mx.cpu)
    measure = getattr(importlib.import_module(part.module), part.function or options.part)
    for table, row in measure(options):
        print(json.dumps([table, row]), file=rows, flush=True)
    return 0


def outcome(part: Row) -> str:
    """One word for it."""
    if "error" in part or any("failed" in row for rows in part["tables"].values() for row in rows):
        return "failed"
    if "skipped" in part:
        return "skipped"
    return {True: "passed", False: "does not hold", None: "done"}[part.get("holds")]


def markdown(report: Row) -> str:
    """The report for people: the goals, then every part with its tables."""
    parts = report["parts"]
    lines = [f"# GPU benchmark, {report['date']}", "", f"`{report['command']}`", ""]
    lines.append(
        f"{report['seconds']} s in all.{' Tiny sizes: no figure counts.' * report['small']}"
    )
    goals = [goal for part in parts.values() for goal in part["tables"].get("goals", [])]
    if goals:
        lines += ["", "## goals", "", *table(goals)]
    for name, part in parts.items():
        why = part.get("error") or part.get("skipped") or ""
        lines += ["", f"## {TITLES.get(name, name)}: {outcome(part)}", ""]
        lines += [PARTS[name].about, *[f"\n{why}"] * bool(why)]
        for title, rows in part["tables"].items():
            if title != "goals":
                lines += ["", *table(rows)]
    return "\n".join(lines) + "\n"


def table(rows: list[Row]) -> list[str]:
    """Rows as a Markdown table whose columns are all their keys."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[cell(row.get(name, "")) for name in names] for row in rows]
    lines = [[name.replace("_", " ") for name in names], ["---"] * len(names), *cells]
    return [f"| {' | '.join(line)} |" for line in lines]


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if value is None:
        return "never"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/")


if __name__ == "__main__":
    raise SystemExit(main())
