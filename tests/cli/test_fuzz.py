"""Files and values from strangers: refused in one line, soon, in little memory, or read for what
they say. Checkpoints are damaged by a seeded plan, everything else is drawn by hypothesis.

Run as a script this file is the worker that opens damaged checkpoints, in a process of its own
because a crash, a hang or a flood of memory must not take the tests along:
`python tests/cli/test_fuzz.py FOLDER FIRST STOP` judges those cases, a line of JSON each.
MLXGPT_FUZZ_CASES=10000 is the long run.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from mlx_randygpt.checkpoint import (
    Checkpoint,
    CheckpointError,
    Progress,
    load_checkpoint,
    peek_step,
    save_checkpoint,
)
from mlx_randygpt.cli import group
from mlx_randygpt.cli.commands.train import command
from mlx_randygpt.cli.training import run
from mlx_randygpt.cli.training.request import TrainRequest
from mlx_randygpt.config import ConfigError, ModelConfig, TrainConfig, parse_interval
from mlx_randygpt.data import DataError
from mlx_randygpt.data.corpus import encode_corpus
from mlx_randygpt.data.reading import read_text
from mlx_randygpt.data.windows import batch_of_passes, eval_batches, sample_batch
from mlx_randygpt.progress import Plateau
from mlx_randygpt.recipes import PRESETS
from mlx_randygpt.sampling.filters import SampleConfig, penalise, pick, probabilities
from mlx_randygpt.settings import resolve_new
from mlx_randygpt.state import IGNORED, Batch, Params, TrainState
from mlx_randygpt.tokenizers import tokenizer_from_json
from mlx_randygpt.tokenizers.chars import MAX_CHARS, CharTokenizer

set_hypothesis_home_dir(tempfile.gettempdir())  # its tables of characters, not its examples

N_CASES = int(os.environ.get("MLXGPT_FUZZ_CASES", "1500"))
CPU_SECONDS = 2.0  # of one case; a hang dies of SIGPROF
SPARE_BYTES = 8 << 20  # of address space, besides twice the file
LONGEST = 400  # characters of a message
MOST_DEATHS = 10  # of workers, then the rest is not tried

# Damaged checkpoints: each of DAMAGES makes a file from a whole one; the case number decides all

Index = dict[str, Any]  # the JSON of a safetensors file
Damage = Callable[[bytes, bytes, Random], bytes]  # (this file, another whole file, random)

SPELLED = {  # what `json` would not write; stands in the tree as a string
    '"<deep>"': "[" * 10_000 + "]" * 10_000,
    '"<deep object>"': '{"a":' * 10_000 + "1" + "}" * 10_000,
    '"<long number>"': "9" * 5_000,
    '"<1e999>"': "1e999",
}
STRANGE: list[Any] = [
    None, True, False, 0, 1, -1, 5, 2.0, 0.5, -0.5, 10**9, 2**31, -(2**63), 2**63, 2**64, 10**30,
    10**400, 1e308, math.nan, math.inf, "", "x", "x" * 5_000, "a\nb\x1b", "\ud800", "mini", "60s",
    [], {}, [0], ["a"], ["b", "a"], {"a": 1}, [None] * 1000, [[1, 2], [3, 4]], *map(
        json.loads, SPELLED
    ),
]  # fmt: skip
METADATA = ["format", "format_version", "header", "sha256"]
DTYPES = ["F16", "BF16", "I32", "U32", "F64", "BOOL", "F8_E4M3", "C64", "O", ""]


def opened(raw: bytes) -> tuple[Index, bytes]:
    """The JSON and the data of a whole file."""
    start = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:start]), raw[start:]


def spelled(tree: Any) -> str:
    """JSON text; long, deep and infinite where the tree asks for it."""
    text = json.dumps(tree)
    for word, spelling in SPELLED.items():
        text = text.replace(word, spelling)
    return text


def closed(index: Any, data: bytes) -> bytes:
    """The file of an index, whatever that is."""
    text = spelled(index).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def sealed(index: Index, data: bytes, header: str) -> bytes:
    """The file of this header under a checksum that holds; docs/checkpoint-format.md in code."""
    digest = hashlib.sha256(header.encode())
    numpy_names = {"F32": "<f4", "I32": "<i4", "U32": "<u4", "F16": "<f2"}
    for name in sorted(index.keys() - {"__metadata__"}):
        dtype, shape = numpy_names[index[name]["dtype"]], tuple(index[name]["shape"])
        digest.update(f"\n{name} {dtype} {shape}\n".encode("utf-8", "replace"))
        digest.update(data[slice(*index[name]["data_offsets"])])
    metadata = index["__metadata__"] | {"header": header, "sha256": digest.hexdigest()}
    return closed(index | {"__metadata__": metadata}, data)


def flips(raw: bytes, _: bytes, random: Random) -> bytes:
    end = random.choice([len(raw), 8 + int.from_bytes(raw[:8], "little")])
    damaged = bytearray(raw)
    for _ in range(random.choice([1, 1, 1, 2, 8])):
        damaged[random.randrange(end)] ^= 1 << random.randrange(8)
    return bytes(damaged)


def runs_overwritten(raw: bytes, _: bytes, random: Random) -> bytes:
    at, size = random.randrange(len(raw)), random.choice([1, 4, 16, 512, 4096])
    fill = random.choice([bytes(size), b"\xff" * size, random.randbytes(size), b"9" * size])
    return (raw[:at] + fill + raw[at + size :])[: len(raw)]


def truncations(raw: bytes, _: bytes, random: Random) -> bytes:
    return raw[: random.choice([random.randrange(len(raw)), random.randrange(64), -1, -4])]


def insertions(raw: bytes, _: bytes, random: Random) -> bytes:
    at = random.choice([random.randrange(len(raw)), random.randrange(16), len(raw)])
    return raw[:at] + random.randbytes(random.choice([1, 2, 4, 8, 64, 4096])) + raw[at:]


def pieces_moved(raw: bytes, _: bytes, random: Random) -> bytes:
    a, b, c = sorted(random.sample(range(len(raw)), 3))
    return random.choice([raw[:a] + raw[b:c] + raw[a:b] + raw[c:], raw[:a] + raw[b:], raw + raw])


def lengths(raw: bytes, _: bytes, random: Random) -> bytes:
    n = int.from_bytes(raw[:8], "little")
    near = [n + random.randint(-16, 16), len(raw), len(raw) - 8, 0, 1, 2, random.randrange(1 << 20)]
    far = [1 << 31, 1 << 32, 1 << 63, (1 << 63) - 1, (1 << 64) - 1, 100_000_001, 1 << 40]
    return random.choice([*near, *far, random.getrandbits(64)]).to_bytes(8, "little") + raw[8:]


def headers_swapped(raw: bytes, other: bytes, random: Random) -> bytes:
    (mine, data), theirs = opened(raw), opened(other)[0]
    if random.random() < 0.3:
        return closed(theirs, data)
    if random.random() < 0.5:
        return closed(mine | {"__metadata__": theirs["__metadata__"]}, data)
    return sealed(mine, data, theirs["__metadata__"]["header"])


def indices_edited(raw: bytes, _: bytes, random: Random) -> bytes:
    """Valid JSON in place of the index: shapes, types, offsets, names, metadata."""
    index, data = opened(raw)
    name = random.choice([name for name in index if name != "__metadata__"])
    entry, huge = index[name], random.choice([1 << 31, 1 << 32, 1 << 62, 1 << 63, 1 << 64])
    edits: list[Callable[[], Any]] = [
        lambda: entry.update(shape=random.choice([[huge, huge], [0, huge], [huge], [], [0], [-1]])),
        lambda: entry.update(shape=[huge, 0], data_offsets=[0, 0]),
        lambda: entry.update(dtype=random.choice(DTYPES)),
        lambda: entry.update(data_offsets=random.choice([[0, huge], [huge, 0], [8, 4], [-1, 4]])),
        lambda: entry.update(data_offsets=[at - 4 for at in entry["data_offsets"]]),
        lambda: index.update({random.choice(["", "a\nb", "x" * 5_000, "\ud800"]): index.pop(name)}),
        lambda: index.update({"__metadata__": random.choice(STRANGE)}),
        lambda: index["__metadata__"].update({random.choice(METADATA): "x\n" * 300}),
        lambda: index.pop(name),
        lambda: index.update({name: random.choice(STRANGE)}),
    ]  # fmt: skip
    random.choice(edits)()
    return closed(index, data)


def any_part_replaced(raw: bytes, _: bytes, random: Random) -> bytes:
    """One value of the index, at any depth, becomes a strange one, is doubled or goes."""
    index, data = opened(raw)
    path = random.choice([path for path, _ in leaves(index)])
    if random.random() < 0.2:
        once = json.dumps(path[-1])
        text = json.dumps(index).replace(f"{once}:", f"{once}: 0, {once}:", 1).encode()
        return len(text).to_bytes(8, "little") + text + data
    edit(index, path, random)
    return closed(index, data)


def tensors_edited(raw: bytes, _: bytes, random: Random) -> bytes:
    """Tensors that the header does not speak of, under a checksum that holds."""
    index, data = opened(raw)
    name = random.choice([name for name in index if name != "__metadata__"])
    rows, columns = index[name]["shape"]
    edits: list[Callable[[], Any]] = [
        lambda: index[name].update(shape=[columns, rows]),
        lambda: index[name].update(shape=random.choice([[rows * columns], [rows, columns, 1]])),
        lambda: index[name].update(dtype=random.choice(["I32", "U32"])),
        lambda: index[name].update(dtype="F16", shape=[rows, 2 * columns]),
        lambda: index.update({odd_name(name, random): index.pop(name)}),
        lambda: index.update({odd_name(name, random): empty(len(data))}),
        lambda: index.update({f"optimizer.m.{n}": empty(len(data)) for n in range(20_000)}),
    ]
    random.choice(edits)()
    return sealed(index, data, index["__metadata__"]["header"])


def odd_name(name: str, random: Random) -> str:
    """A name of no weight, or of a moment of a weight that has none."""
    first = random.choice(
        ["optimizer.m.", "optimizer.v.", "optimizer.w.", "optimizer.", "", "h.9."]
    )
    return first + random.choice([name, "wte", "a\nb", "x" * 900, ".", "h.0.attn.c_proj.weight"])


def empty(at: int) -> Index:
    return {"dtype": "F32", "shape": [0, 8], "data_offsets": [at, at]}


def headers_edited(raw: bytes, _: bytes, random: Random) -> bytes:
    """Some values of the header become strange ones, under a checksum that holds."""
    index, data = opened(raw)
    header = json.loads(index["__metadata__"]["header"])
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        edit(header, random.choice([path for path, _ in leaves(header)]), random)
    return sealed(index, data, spelled(header))


def header_texts(raw: bytes, _: bytes, random: Random) -> bytes:
    """A header that is no object, or not even JSON, under a checksum that holds."""
    index, data = opened(raw)
    header = index["__metadata__"]["header"]
    at = random.randrange(len(header))
    texts = [
        spelled(random.choice(STRANGE)), header[:at], header[:at] + random.choice('",}]0x') +
        header[at:], header[:at] + header[at + 1 :], f"[{header}]", f"{header} {header}", "\ufeff" +
        header, header.replace("{", '{"step": "x", ', 1), json.dumps(header),
    ]  # fmt: skip
    return sealed(index, data, random.choice(texts))


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value of a JSON tree below the root, by its path; the first few of a list."""
    children: Any = tree.items() if isinstance(tree, dict) else ()
    children = list(enumerate(tree))[:3] if isinstance(tree, list) else children
    for key, value in children:
        yield (*path, key), value
        yield from leaves(value, (*path, key))


def edit(tree: Any, path: tuple[Any, ...], random: Random) -> None:
    """Replace what is at `path`, or take it away, or put something unknown beside it."""
    for key in path[:-1]:
        tree = tree[key]
        if not isinstance(tree, dict | list):
            return  # an edit before this one took the path away
    kind = random.random()
    if kind < 0.85 and (isinstance(tree, dict) or path[-1] < len(tree)):
        tree[path[-1]] = copy.deepcopy(random.choice(STRANGE))
    elif kind < 0.95 and isinstance(tree, dict):
        tree.pop(path[-1], None)
    elif isinstance(tree, dict):
        tree[random.choice(["colour", "a\nb", "x" * 5_000, ""])] = random.choice(STRANGE)


def fields_replaced(number: int) -> Damage:
    """In turn, every value of the header becomes every strange one, under a checksum that holds."""

    def damage(raw: bytes, _: bytes, random: Random) -> bytes:
        index, data = opened(raw)
        header = json.loads(index["__metadata__"]["header"])
        pairs = list(product([path for path, _ in leaves(header)], STRANGE))
        Random(0).shuffle(pairs)
        path, value = pairs[number % len(pairs)]
        here = header
        for key in path[:-1]:
            here = here[key]
        here[path[-1]] = value
        return sealed(index, data, spelled(header))

    return damage


# By hand: (path in the header, value), each of them refused
REFUSED: list[tuple[str, Any]] = [
    ("model.n_layer", 10**9), ("model.n_layer", 2**63), ("model.n_layer", 0),
    ("model.n_layer", True), ("model.n_layer", 1.0), ("model.n_layer", "1"),
    ("model.vocab_size", -1), ("model.vocab_size", 10**9), ("model.vocab_size", None),
    ("model.n_embd", 0), ("model.n_embd", 8.0), ("model.n_embd", 10**400), ("model.n_head", 3),
    ("model.position", ["rope"]), ("model.position", "x" * 5_000), ("model.final_norm", None),
    ("model.qk_norm", "yes"), ("model.dropout", "<1e999>"), ("model.init_scale", "big"),
    ("model", []), ("model", None), ("model.a\nb", 1), ("model." + "x" * 5_000, 1),
    ("train", [["lr", 1]]), ("train.preset", 7), ("train.preset", "huge"), ("train.recipe", []),
    ("train.lr", math.nan), ("train.lr", True), ("train.adam_eps", "x"), ("train.momentum", None),
    ("train.iters", "<long number>"), ("train.iters", 10**400), ("train.save_every", 60),
    ("train.seed", 0.5), ("train.prompt", None), ("train.batch_size", {}),
    ("progress", None), ("progress.best_loss", "x"), ("progress.val_loss", []),
    ("progress.tokens", "9"), ("progress.tokens", 1.5), ("progress.seconds", "<1e999>"),
    ("progress.plateau", "x"), ("progress.plateau", []), ("progress.plateau.best_loss", "x"),
    ("progress.plateau.reductions", "1"), ("progress.plateau.reductions", 10**400),
    ("progress.plateau.reductions", -1), ("progress.rollbacks", -9),
    ("step", "x"), ("step", "7"), ("step", -1), ("step", 7.5), ("step", True),
    ("step", "<1e999>"), ("step", 10**400), ("backend", None), ("backend", 7),
    ("tokenizer", None), ("tokenizer", "char"), ("tokenizer.type", "bpe"),
    ("tokenizer.chars", "abc"), ("tokenizer.chars", ["a", "a"]), ("tokenizer.chars", ["a"]),
    ("tokenizer.chars", ["\ud800"]), ("tokenizer", "<deep>"), ("data", None), ("data", "<deep>"),
    ("data.paths", "text.txt"), ("data.paths", [1]), ("data.characters", "99"), ("data.sha256", 1),
]  # fmt: skip


def by_hand(number: int) -> Damage:
    def damage(raw: bytes, _: bytes, random: Random) -> bytes:
        index, data = opened(raw)
        header = here = json.loads(index["__metadata__"]["header"])
        path, value = REFUSED[number]
        *above, last = path.split(".", 2)
        for key in above:
            here = here[key]
        here[last] = value
        return sealed(index, data, spelled(header))

    return damage


DAMAGES: list[Damage] = [
    flips, runs_overwritten, truncations, insertions, pieces_moved, lengths, headers_swapped,
    indices_edited, any_part_replaced, tensors_edited, headers_edited, header_texts,
]  # fmt: skip


def damaged(case: int, wholes: list[bytes]) -> tuple[str, bytes]:
    """What was done, and the file."""
    random = Random(f"case {case}")
    raw, other = wholes if case % 2 else wholes[::-1]
    if case < len(REFUSED):
        path, value = REFUSED[case]
        return f"by hand: {path[:40]} = {value!r:.40}", by_hand(case)(wholes[0], b"", random)
    rounds, turn = divmod(case, len(DAMAGES) + 4)
    if turn >= len(DAMAGES):
        return "fields_replaced", fields_replaced(4 * rounds + turn - len(DAMAGES))(
            raw, other, random
        )
    return DAMAGES[turn].__name__, DAMAGES[turn](raw, other, random)


# The worker


def work(folder: Path, first: int, stop: int) -> None:
    """Judge the cases; each line is flushed before the next case begins."""
    paths = [folder / "modern", folder / "classic"]
    wholes, path = [path.read_bytes() for path in paths], folder / "damaged"
    intact = [described(load_checkpoint(whole)) for whole in paths]
    for case in range(first, stop):
        kind, content = damaged(case, wholes)
        path.write_bytes(content)
        verdict, detail = limited(lambda: judged(path, intact), len(content))
        print(json.dumps([case, kind, verdict, detail]), flush=True)  # noqa: T201


def limited(judge: Callable[[], tuple[str, str]], n_bytes: int) -> tuple[str, str]:
    """The verdict, in a limited time of the processor and, on Linux, in limited memory."""
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        if sys.platform != "linux":
            return judge()
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2 * n_bytes + SPARE_BYTES, hard))
        try:
            return judge()
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def judged(path: Path, intact: list[str]) -> tuple[str, str]:
    """ "refused", "same" or "other" (a whole checkpoint that says something else), or what is
    wrong about how it was read."""
    try:
        peek_step(path)
        loaded = load_checkpoint(path)
        load_checkpoint(path, weights_only=True)
    except CheckpointError as error:
        message = str(error)
        if len(message) >= LONGEST or not message.isprintable():
            return "bad message", f"{len(message)} characters: {message[:200]!r}"
        return "refused", message
    except BaseException as error:
        return "escaped", f"{type(error).__name__}: {str(error)[:200]}"
    if described(loaded) in intact:
        return "same", ""
    if problem := unfit(loaded):
        return "believed", problem
    return "other", ""


def described(saved: Checkpoint) -> str:
    """All of it, so that 8 and 8.0, or a bit of a weight, make a difference."""
    rest = (saved.model, saved.train, saved.progress, saved.tokenizer, saved.data, saved.backend)
    digest = hashlib.sha256(repr((saved.state.step, *rest)).encode("utf-8", "backslashreplace"))
    for group_ in (saved.state.params, *map(saved.state.moments.get, "mv")):
        for name, array in sorted((group_ or {}).items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


def unfit(saved: Checkpoint) -> str:
    """What docs/checkpoint-format.md says of a header and this one is not; "" where it fits."""
    types = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
    records = [saved.model, saved.train, saved.progress, saved.progress.plateau]
    open_ended = {"best_loss", "val_loss", "bits_per_byte"}
    for record in records:
        for field in fields(record):  # type: ignore[arg-type]
            value = getattr(record, field.name)
            if field.type in types and type(value) not in types[str(field.type)]:
                return f"{field.name}={value!r:.40} is not {field.type}"
            if type(value) is int and abs(value) >= 2**63:
                return f"{field.name} takes more than 64 bits"
            if type(value) is float and not math.isfinite(value) and field.name not in open_ended:
                return f"{field.name}={value} is not finite"
    counts = [saved.state.step, *asdict(saved.progress).values()]
    if min(n for n in counts if type(n) is int) < -1 or saved.progress.plateau.reductions < 0:
        return "a negative count"
    if type(saved.state.step) is not int or not 0 <= saved.state.step < 2**63:
        return f"step={saved.state.step!r:.40}"
    if not saved.backend.isprintable() or saved.train.preset not in PRESETS:
        return f"backend={saved.backend!r:.40}, preset={saved.train.preset!r:.40}"
    try:
        tokenizer = tokenizer_from_json(saved.tokenizer)
    except ValueError as error:
        return str(error)[:200]
    if tokenizer.vocab_size != saved.model.vocab_size:
        return f"{tokenizer.vocab_size} tokens for vocab_size={saved.model.vocab_size}"
    data: Any = saved.data
    if not isinstance(data, dict) or type(data.get("characters")) is not int:
        return f"data={data!r:.80}"
    paths = data.get("paths")
    if not isinstance(paths, list) or not all(isinstance(p, str) for p in paths):
        return f"paths={paths!r:.80}"
    return "" if isinstance(data.get("sha256"), str) else f"sha256={data.get('sha256')!r:.40}"


# The tests of checkpoints


@pytest.fixture(scope="module")
def wholes(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., ModelConfig],
    tiny_train: Callable[..., TrainConfig],
    lively: Callable[..., Params],
) -> Path:
    """A folder with two whole checkpoints that share little, `modern` and `classic`."""
    folder = tmp_path_factory.mktemp("wholes")
    data = {"paths": ["/tmp/é.txt"], "characters": 99, "sha256": "f" * 64}
    for recipe, layers in (("modern", 1), ("classic", 2)):
        model = tiny_model(recipe, n_layer=layers, n_embd=8, n_head=2, block_size=4)
        weights = lively(model)
        v = weights if recipe == "classic" else {"wte.weight": weights["wte.weight"] ** 2}
        state = TrainState(7, weights, {"m": lively(model, seed=2), "v": v})
        progress = Progress(900, 1.5, 2.25, 6, 2.5, 7, plateau=Plateau(2.25, 1, 2))
        tokenizer = CharTokenizer("abcdefghijklmnopqrstuvwxyé").to_json()
        train = tiny_train(recipe, prompt="naïve\n")
        saved = Checkpoint(model, train, progress, tokenizer, data, "numpy", state)
        save_checkpoint(folder / recipe, saved)
    return folder


def verdicts(folder: Path, n_cases: int) -> Iterator[tuple[int, str, str, str]]:
    """(case, kind, verdict, detail) of each case; a worker that dies is a verdict too."""
    case = deaths = 0
    while case < n_cases and deaths < MOST_DEATHS:
        words = [sys.executable, __file__, str(folder), str(case), str(n_cases)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            number, kind, verdict, detail = json.loads(line)
            yield number, kind, verdict, detail
            case = number + 1
        if done.returncode:
            kind, _ = damaged(case, [(folder / r).read_bytes() for r in ("modern", "classic")])
            last = done.stderr.strip().rpartition("\n")[2]
            yield case, kind, "died", f"of {done.returncode}: {last[:200]}"
            deaths, case = deaths + 1, case + 1
    assert deaths < MOST_DEATHS or case >= n_cases, "too many workers died"


def test_a_damaged_checkpoint_is_refused_or_read_for_what_it_says(wholes: Path) -> None:
    found = list(verdicts(wholes, N_CASES))
    wrong = [one for one in found if one[2] not in ("refused", "same", "other")]
    wrong += [one for one in found if one[0] < len(REFUSED) and one[2] in ("same", "other")]
    shown = "\n".join(f"case {n}, {kind}: {verdict}: {why}" for n, kind, verdict, why in wrong[:40])
    assert not wrong, f"{len(wrong)} of {len(found)} cases:\n{shown}"
    assert len(found) == N_CASES
    told = Counter(verdict for _, _, verdict, _ in found)
    assert told["refused"] > 0.8 * N_CASES  # the rest says the same, or something else that fits


def test_the_damage_itself_is_sound(wholes: Path) -> None:
    """An edit that changes nothing gives a checkpoint that can be read."""
    for recipe in ("modern", "classic"):
        index, data = opened((wholes / recipe).read_bytes())
        again = sealed(index, data, spelled(json.loads(index["__metadata__"]["header"])))
        (wholes / "again").write_bytes(again)
        same = (load_checkpoint(wholes / name) for name in (recipe, "again"))
        assert len({described(saved) for saved in same}) == 1
        assert not unfit(load_checkpoint(wholes / recipe))


# Properties


def examples(n: int) -> settings:
    return settings(max_examples=n, derandomize=True, deadline=None, database=None)


any_text = st.text(st.characters(exclude_categories=()), max_size=60)  # lone surrogates as well
json_scalars = st.none() | st.booleans() | st.integers() | st.floats() | any_text
any_json = st.recursive(
    json_scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
    max_leaves=8,
)
nearly_tokenizers = st.fixed_dictionaries(
    {"chars": st.lists(any_text | st.characters(), max_size=4) | any_text | any_json},
    optional={"type": st.just("char") | any_json, "more": any_json},
)


def one_line(error: Exception) -> None:
    """A person and a log can read it."""
    message = str(error)
    assert 0 < len(message) < LONGEST
    assert message.isprintable(), repr(message)


@examples(150)
@given(any_text, st.integers(1, MAX_CHARS))
def test_a_tokenizer_gives_back_what_it_knows(text: str, max_chars: int) -> None:
    assume(any(not "\ud800" <= char <= "\udfff" for char in text))
    tokenizer = CharTokenizer.train(text, max_chars)
    ids = tokenizer.encode(text)
    known = "".join(char if char in tokenizer.chars else "\ufffd" for char in text)
    assert tokenizer.decode(ids) == known
    assert ((ids >= 0) & (ids < tokenizer.vocab_size)).all()
    assert sum(tokenizer.unknown(text).values()) == (ids == tokenizer.unk).sum()
    assert tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json()))) == tokenizer


@examples(300)
@given(any_json | nearly_tokenizers)
def test_any_json_is_a_tokenizer_or_one_line(data: Any) -> None:
    try:
        tokenizer = tokenizer_from_json(data)
    except ValueError as error:
        one_line(error)
    else:
        assert tokenizer.to_json() == {"type": "char", "chars": data["chars"]}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "a.txt"


marks = st.sampled_from([b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"\r", b"\0", b"\xed\xa0\x80"])
any_bytes = st.lists(marks | st.binary(max_size=20) | st.text(max_size=20).map(str.encode))


@examples(200)
@given(any_bytes)
def test_any_bytes_are_text_or_one_line(file: Path, parts: list[bytes]) -> None:
    raw = b"".join(parts)
    file.write_bytes(raw)
    try:
        text = read_text(file)
    except DataError as error:
        one_line(error)
        return
    assert text
    assert "\r" not in text
    assert "\0" not in text
    assert text == raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


@examples(100)
@given(st.lists(any_text, min_size=1, max_size=4), any_text)
def test_a_corpus_holds_every_character(texts: list[str], known: str) -> None:
    assume(any(not "\ud800" <= char <= "\udfff" for char in known))
    tokenizer = CharTokenizer.train(known)
    corpus = encode_corpus({str(i): text for i, text in enumerate(texts)}, tokenizer)
    assert len(corpus.tokens) == sum(map(len, texts)) + 2 * len(texts)
    assert corpus.characters == sum(map(len, texts))
    np.testing.assert_equal(np.concatenate([corpus.train, corpus.val]), corpus.tokens)
    ends = np.flatnonzero(corpus.tokens == tokenizer.eos)
    assert len(ends) == len(texts) == (corpus.tokens == tokenizer.bos).sum()


def inside(batch: Batch, n: int) -> None:
    """Inputs and targets are those of the tokens 0 to n-1 at their own places."""
    x, y = batch.x(), batch.y()
    assert x.shape == y.shape == (len(batch.starts), batch.block_size)
    assert ((x >= 0) & (x < n)).all()
    counted = y != IGNORED
    assert (y[counted] == x[counted] + 1).all()
    assert counted.sum() == batch.n_targets()


@examples(100)
@given(
    st.integers(1, 50), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**64),
    st.integers(0, 2**40), st.integers(0, 9),
)  # fmt: skip
def test_training_windows_stay_inside(
    spare: int, block_size: int, batch_size: int, seed: int, step: int, micro: int
) -> None:
    n = block_size + spare
    tokens = np.arange(n, dtype=np.int32)
    for batch in (
        sample_batch(tokens, batch_size, block_size, seed, step, micro),
        batch_of_passes(tokens, batch_size, block_size, seed, step),
    ):
        inside(batch, n)
        assert batch.n_targets() == batch_size * block_size


@examples(150)
@given(st.integers(2, 300), st.integers(1, 400), st.integers(1, 400), st.none() | st.integers(0))
def test_evaluation_windows_count_every_token_once(
    n: int, block_size: int, batch_size: int, max_tokens: int | None
) -> None:
    batches = list(eval_batches(np.arange(n, dtype=np.int32), block_size, batch_size, max_tokens))
    for batch in batches:
        inside(batch, n)
        assert len(batch.starts) == len(batches[0].starts) <= batch_size
    targets = np.concatenate([batch.y().ravel() for batch in batches])
    found = targets[targets != IGNORED]
    assert len(found) == len(set(found.tolist())) > 0
    if max_tokens is None:
        assert sorted(found.tolist()) == list(range(1, n))


numbers = st.integers().map(str) | st.floats().map(str) | any_text
intervals = st.builds("{}{}".format, numbers, st.sampled_from(["", "s", "m", "h", " ", "\n"]))


@examples(300)
@given(intervals)
def test_an_interval_is_steps_or_seconds_or_one_line(text: str) -> None:
    try:
        train = TrainConfig(save_every=text)
    except ConfigError as error:
        one_line(error)
        return
    steps, seconds = parse_interval(train.save_every)
    assert (steps > 0) != (seconds > 0)
    assert math.isfinite(seconds)


logits = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False) | st.just(-math.inf),
    min_size=1, max_size=40,
).filter(lambda row: max(row) > -math.inf)  # fmt: skip
filters = st.builds(
    SampleConfig,
    temperature=st.floats(0, 1e3), top_k=st.integers(0, 50), top_p=st.floats(0, 1),
    min_p=st.floats(0, 1), typical_p=st.floats(0, 1), repetition_penalty=st.floats(1e-3, 1e3),
    presence_penalty=st.floats(-100, 100), frequency_penalty=st.floats(-100, 100),
)  # fmt: skip


@examples(250)
@given(logits, filters, st.lists(st.integers(0, 39), max_size=5), st.integers(0, 9))
def test_probabilities_sum_to_one(
    row: list[float], config: SampleConfig, seen: list[int], seed: int
) -> None:
    scores, known = np.array(row), [i for i in seen if i < len(row)]
    penalise(scores, config, known, known)
    [p] = probabilities(scores[None], [config])
    assert p.shape == scores.shape
    assert (p >= 0).all()
    assert p.sum() == pytest.approx(1, rel=1e-12)
    assert (p[scores == -np.inf] == 0).all()
    assert p[pick(p[None], np.random.default_rng(seed).random(1))] > 0


# Settings


OPTIONS = [  # of `train`, but for those that name files
    "iters", "n-layer", "n_head", "n_embd", "block_size", "dropout", "batch_size", "grad_accum",
    "lr", "min_lr", "weight_decay", "grad_clip", "warmup", "patience", "eval_every", "save_every",
    "log_every", "keep_every", "threads", "seed", "prompt", "recipe", "preset", "optimizer",
    "schedule", "dtype", "backend", "plain", "overwrite", "data", "out", "resume", "config",
]  # fmt: skip
toml_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
likely = st.sampled_from(["1", "2.5", "true", '"10"', '"modern"', '"tiny"', '["a"]', '"60s"', "-1"])
toml_values = (
    likely | st.integers().map(str) | st.sampled_from(["inf", "nan", "-inf", "1e308", "{}", "[]"])
    | st.floats(allow_nan=False, allow_infinity=False).map(repr)
    | toml_text.map(json.dumps) | st.lists(toml_text).map(json.dumps)
    | st.sampled_from(["2024-01-01", "07:32:00", "{a = 1}", "9" * 5_000, "9" * 400, "1e999"])
)  # fmt: skip
toml_keys = st.sampled_from(OPTIONS) | toml_text.map(json.dumps)
toml_files = st.dictionaries(toml_keys, toml_values, max_size=4).map(
    lambda values: "".join(f"{key} = {value}\n" for key, value in values.items()).encode()
)


@pytest.fixture(scope="module")
def trains_nothing() -> Iterator[None]:
    """`mlxgpt train` ends where its settings are known."""

    def resolve(request: TrainRequest) -> int:
        resolve_new(request.options, 29)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "train_command", resolve)
        yield


def told(file: Path, content: bytes) -> tuple[int, str]:
    """Exit code and the line of `mlxgpt train --config` with such a file; "" where all is well."""
    file.write_bytes(content)
    words = ["train", "--config", str(file)]
    result = CliRunner().invoke(group, words, auto_envvar_prefix="MLXGPT")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    if result.exit_code == 0:
        return 0, ""
    usage, _, line = result.stderr.rpartition("Error: ")
    assert line.count("\n") == 1, line
    assert line.strip().isprintable(), line
    assert "--debug shows where" not in line, line
    assert bool(usage) == (result.exit_code == 2)
    assert len(line) < 2 * LONGEST  # click lists the choices
    return result.exit_code, line


@examples(250)
@given(toml_files | st.binary(max_size=60))
def test_any_config_file_gives_settings_or_one_line(
    file: Path, trains_nothing: None, content: bytes
) -> None:
    code, _ = told(file, content)
    assert code in (0, 1, 2)
    if code == 0:
        known = {str(option.name) for option in command.params}
        assert {key.replace("-", "_") for key in tomllib.loads(content.decode())} <= known


@pytest.mark.parametrize(
    "content",
    ["iters = " + "[" * 10_000, "iters = " + "9" * 5_000, 'iters = "' + "x" * 10**5 + '"'],
)
def test_a_config_file_of_extremes_is_one_line(
    content: str, file: Path, trains_nothing: None
) -> None:
    assert told(file, content.encode())[0] == 2


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
