"""Beside PyTorch on one device: ours and nanoGPT, each in its own process, taking turns.

Two processes, since the CUDA libraries of MLX and of PyTorch need not bear each other in one, and
PyTorch may live under another interpreter. A peer says what it is when it is ready, then runs as
often as each line of its input says and answers with the seconds that took.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from turns import rows

Found = Iterator[tuple[str, dict[str, Any]]]
Run = Callable[[int], object]
TURNS = 5
WHICH = "import torch as t; c = t.cuda; m = t.backends.mps; v = t.__version__; "
WHICH += "print('cuda' if c.is_available() else 'mps' if m.is_available() else 'cpu', v)"


def beside_torch(options: argparse.Namespace) -> Found:
    """Training at 6/6/384 × 256 and gpt2, and one stream of text."""
    from gpu_training import DEFAULT, GPT2, LARGE, TINY, attempt, goal

    from mlx_randygpt.backends.mlx.backend import probe

    where, why = torch_device(options.torch_python, probe().has_gpu)
    if why:
        yield "skipped", {"why": why}
        return
    spec = {"device": where, "small": options.small}
    both = ("modern", "classic")  # the first is what nanoGPT is compared with
    kinds = [(TINY, 2, 1.0, both)]
    if not options.small:
        kinds = [(LARGE, 10, 1.0, both), (GPT2, 3, 0.9, both[::-1])]  # GPT-2: the same model, AdamW
    for case, n, least, recipes in kinds:
        more = {**spec, "mode": "train", **shape(case)}
        peers = {f"ours {recipe}": {**more, "recipe": recipe} for recipe in recipes}
        peers["nanoGPT"] = {**more, "recipe": ""}

        def measure(case: Any = case, n: int = n, peers: Any = peers,
                    least: float = least) -> Found:  # fmt: skip
            found = turns(options, peers, n)
            yield from table("training", case.name, found)
            ratio = found["nanoGPT"]["first_is_times_as_fast"]
            yield "goals", goal(f"{case.name}, bfloat16: × nanoGPT's tokens/s", ratio, least)

        yield from attempt("training", {"model": case.name}, measure)

    def decode() -> Found:
        more = {**spec, "mode": "decode", **shape(TINY if options.small else DEFAULT)}
        peers = {"ours": {**more, "recipe": "modern"}, "PyTorch, KV cache": {**more, "recipe": ""}}
        found = turns(options, peers, 4 if options.small else 100)
        yield from table("decoding", "one stream", found)
        ratio = found["PyTorch, KV cache"]["first_is_times_as_fast"]
        yield "goals", goal("one stream of text: × a PyTorch KV loop", ratio, 3.0)

    yield from attempt("decoding", {"model": "one stream"}, decode)


def shape(case: Any) -> dict[str, Any]:
    """What a peer must know of it: ours its options, PyTorch, which may lack this program's
    libraries, its numbers."""
    model, train = case.settings()
    sizes = (model.vocab_size, model.block_size, model.n_layer, model.n_head, model.n_embd)
    return {
        "given": case.given, "vocab_size": case.vocab_size, "sizes": sizes,
        "batch_size": train.batch_size,
    }  # fmt: skip


def torch_device(python: str, mlx_has_gpu: bool) -> tuple[str, str]:
    """PyTorch's device there, or "" and why there is nothing to compare with."""
    try:
        asked = subprocess.run([python, "-c", WHICH], capture_output=True, text=True, check=False)
    except OSError as error:
        return "", f"{python} does not run: {error.strerror}"
    if asked.returncode:
        return "", f"{python} has no PyTorch; name one that has with --torch-python"
    device = asked.stdout.split()[0]
    if mlx_has_gpu != (device != "cpu"):
        return "", f"MLX {'has' if mlx_has_gpu else 'has no'} GPU here, PyTorch takes {device}"
    return device, ""


def table(name: str, model: str, found: dict[str, dict[str, float]]) -> Found:
    yield from ((name, {"model": model, "who": who, **row}) for who, row in found.items())


class Peer:
    """One of them in its process; `ready` before anything is timed."""

    def __init__(self, python: str, spec: dict[str, Any]) -> None:
        command = [python, __file__, json.dumps(spec)]
        env = dict(os.environ)
        if not spec["recipe"]:  # PyTorch's interpreter may lack this package
            env["PYTHONPATH"] = str(Path(__file__).parents[1])
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)

    def ready(self) -> int:
        """Waits until it is; the tokens of one run."""
        return int(self.answer()["tokens"])

    def run(self, n: int) -> float:
        """Seconds of n runs."""
        assert self.process.stdin
        self.process.stdin.write(f"{n}\n")
        self.process.stdin.flush()
        return float(self.answer()["seconds"])

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a peer ended with code {self.process.wait()}")
        return dict(json.loads(line))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def turns(
    options: argparse.Namespace, specs: dict[str, dict[str, Any]], n: int
) -> dict[str, dict[str, float]]:
    """Medians and ratios over turns of n runs each; the first of a turn is not counted."""
    with contextlib.ExitStack() as stack:
        peers = {}
        for who, spec in specs.items():
            python = sys.executable if spec["recipe"] else options.torch_python
            spec = {**spec, "cpu": options.device == "cpu"}
            peers[who] = stack.enter_context(contextlib.closing(Peer(python, spec)))
        tokens = {who: peer.ready() for who, peer in peers.items()}
        seconds: dict[str, list[float]] = {who: [] for who in peers}
        for _ in range(2 if options.small else TURNS):
            for who, peer in peers.items():
                peer.run(1)
                seconds[who].append(peer.run(n) / n)
        return rows(seconds, tokens)


def peer(spec: dict[str, Any]) -> None:
    """The other end: prepare, then run when told."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    prepare = {"train": (their_training, our_training), "decode": (their_text, our_text)}
    run, tokens = prepare[spec["mode"]][bool(spec["recipe"])](spec)
    run(3)
    print(json.dumps({"tokens": tokens}), file=answers, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        run(int(line))
        print(json.dumps({"seconds": time.perf_counter() - start}), file=answers, flush=True)


def our_training(spec: dict[str, Any]) -> tuple[Run, int]:
    import gpu_training as speed

    backend, model, train = ours(spec)
    tokens = speed.random_tokens(model)
    per_step = train.batch_size * model.block_size
    return lambda n: speed.steps(backend, train, tokens, n), per_step


def our_text(spec: dict[str, Any]) -> tuple[Run, int]:
    from mlx_randygpt.sampling.filters import SampleConfig, pick, probabilities
    from mlx_randygpt.sampling.generate import Streams
    from mlx_randygpt.state import rng

    backend, model, _ = ours(spec)
    configs, random = [SampleConfig(seed=1)], rng(1, "sample", 0)

    def run(n: int) -> None:
        streams = Streams(backend, model, 1)
        logits = streams.join([[0]])
        for _ in range(n):
            logits = streams.append(pick(probabilities(logits, configs), random.random(1)).tolist())

    return run, 1


def ours(spec: dict[str, Any]) -> tuple[Any, Any, Any]:
    import gpu_training as speed
    import mlx.core as mx

    if spec["cpu"]:
        mx.set_default_device(mx.cpu)
    case = speed.Case("", spec["given"], spec["vocab_size"])
    model, train = case.settings(recipe=spec["recipe"], dtype="bfloat16")
    return speed.built(model, train), model, train


def their_training(spec: dict[str, Any]) -> tuple[Run, int]:
    import nanogpt
    import numpy as np
    import torch

    torch.set_float32_matmul_precision("high")  # TF32, as MLX has it by default
    vocab_size, block_size, *_ = spec["sizes"]
    trainer = nanogpt.NanoGPT(
        *spec["sizes"], spec["batch_size"], 10_000, 1, spec["device"], "bfloat16",
        not spec["small"],
    )  # fmt: skip
    tokens = np.random.default_rng(0).integers(vocab_size, size=2**18, dtype=np.int32)

    def run(n: int) -> None:
        for i in range(n):
            trainer.step(i, tokens)
        next(trainer.model.parameters()).sum().item()  # waits for the device

    return run, spec["batch_size"] * block_size


def their_text(spec: dict[str, Any]) -> tuple[Run, int]:
    import nanogpt
    import torch
    from torch_decode import torch_kv

    net = nanogpt.Model(*spec["sizes"]).eval().to(spec["device"])

    def run(n: int) -> None:
        torch_kv(net, n)
        if spec["device"] == "cuda":
            torch.cuda.synchronize()

    return run, 1


if __name__ == "__main__":
    peer(json.loads(sys.argv[1]))
