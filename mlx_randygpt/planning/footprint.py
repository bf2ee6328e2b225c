"""The memory of training by kind, computed from the settings.

Nothing is allocated here. For NumPy it sums the arrays that the backend allocates. MLX is lazy:
for it the arrays are counted that the backward pass keeps; docs/scaling.md has measurements.

Legend: B sequences, T time, C n_embd, H heads, D = C/H, V vocab, N = B·T, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from mlx_randygpt.backends.numpy.backend import CHUNK_TOKENS
from mlx_randygpt.backends.numpy.model import chunk_shapes
from mlx_randygpt.backends.numpy.optimizer import STACK
from mlx_randygpt.config import LIMITS, ConfigError, ModelConfig, TrainConfig
from mlx_randygpt.model import parameter_count, parameters, second_moment_shapes
from mlx_randygpt.training.evaluation import EVAL_BATCH_TOKENS

FLOAT = 4  # bytes
ON_HOST = ("program", "saving")  # kinds in the machine's memory if the GPU has its own
Bytes = dict[str, int]  # by kind

KINDS = {  # with a description for tables
    "program": "Python and its libraries",
    "weights": "float32, and cast copies",
    "gradients": "before the update",
    "moments": "the optimizer's",
    "activations": "for the backward pass",
    "attention": "its probabilities, T²",
    "logits": "at once",
    "working": "scratch, and the update",
    "saving": "two snapshots, one a file",
}


def footprint(
    backend: str,
    model: ModelConfig,
    train: TrainConfig,
    sequences: int,
    threads: int,
    program: int = 0,
) -> Bytes:
    """Return bytes by kind at the peak of `mlxgpt train` with `sequences` in a micro-batch.

    `program` is the memory of the process before training.
    """
    n = parameter_count(model)
    step = numpy_step if backend == "numpy" else mlx_step
    file_bytes = FLOAT * (2 * n + second_moment_count(model, train))  # weights and moments
    step_bytes = step(model, train, sequences, threads)
    return {"program": program, **step_bytes, "saving": 4 * file_bytes}


def adamw_count(model: ModelConfig, train: TrainConfig) -> int:
    """Return how many weights AdamW updates: all, or those that Muon does not."""
    weights = parameters(model)
    return sum(w.size for w in weights if train.optimizer == "adamw" or not w.is_block_matrix)


def second_moment_count(model: ModelConfig, train: TrainConfig) -> int:
    """Return how many numbers the optimizer's second moments have."""
    return sum(prod(shape) for shape in second_moment_shapes(model, train).values())


def largest_batch(fits: Callable[[int], bool]) -> int:
    """Return the most sequences for which `fits` is true, or 0; fewer sequences must fit too."""
    low, high = 0, LIMITS["batch_size"]
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def on_device(by_kind: Bytes, unified: bool) -> Bytes:
    """Return the kinds in the device's memory; a GPU with its own memory does not hold them all."""
    return {kind: n for kind, n in by_kind.items() if unified or kind not in ON_HOST}


def device_bytes(model: ModelConfig, train: TrainConfig, ranks: int, n_tokens: int) -> int:
    """Return what MLX holds on a device in training: one pass, and the text's tokens."""
    share = -(-train.batch_size // ranks)
    by_kind = footprint("mlx", model, train, min(share, train.micro_batch or share), 1)
    return sum(on_device(by_kind, unified=False).values()) + FLOAT * n_tokens


def micro_batch(
    backend: str, model: ModelConfig, train: TrainConfig, room: int, unified: bool = True
) -> int:
    """Return the sequences per pass so that a step fits into `room` bytes; 0 is the whole batch.

    NumPy always gets 0: its chunks have a bounded size. Raises ConfigError if not even one
    sequence fits.
    """
    if backend == "numpy":
        return 0

    def needs(sequences: int) -> int:
        return sum(on_device(footprint(backend, model, train, sequences, 1), unified).values())

    most = largest_batch(lambda sequences: needs(sequences) <= room)
    if most == 0:
        raise ConfigError(
            f"one sequence needs {needs(1) / 1e9:.1f} GB, only {room / 1e9:.1f} GB are available; "
            "try --checkpoint-activations, --dtype bfloat16, a smaller --block-size or model"
        )
    return 0 if most >= train.batch_size else most


# NumPy: the arrays of one chunk per thread


def numpy_step(model: ModelConfig, train: TrainConfig, sequences: int, threads: int) -> Bytes:
    """Return bytes by kind of a NumpyBackend after training and evaluation on all its threads."""
    n = parameter_count(model)
    rows = chunk_rows(model, max(sequences, EVAL_BATCH_TOKENS // model.block_size), threads)
    chunk = chunk_numbers(model, rows, train.checkpoint_activations)
    chunk["working"] += temporary_numbers(model, rows) + muon_numbers(model, train, threads)
    return {
        "weights": FLOAT * n,
        "gradients": FLOAT * n * threads,
        "moments": 2 * FLOAT * n,
        **{kind: FLOAT * threads * count for kind, count in chunk.items()},
    }


def chunk_rows(model: ModelConfig, sequences: int, threads: int) -> int:
    """Return how many sequences NumpyBackend puts into a chunk."""
    return max(1, min(CHUNK_TOKENS // model.block_size, -(-sequences // threads)))


def chunk_numbers(model: ModelConfig, rows: int, recompute: bool) -> dict[str, int]:
    """Return how many numbers the arrays of a `Chunk` hold, by kind; gradients do not count."""
    counts = dict.fromkeys(("activations", "attention", "logits", "working"), 0)
    for name, shape in chunk_shapes(model, rows, model.block_size, recompute).items():
        if name.endswith(".probs"):
            kind = "attention"
        elif name.startswith("h."):
            kind = "activations"
        else:
            kind = "logits" if name == "logits" else "working"
        counts[kind] += prod(shape)
    return counts


def temporary_numbers(model: ModelConfig, rows: int) -> int:
    """Return the most numbers that NumPy itself allocates for a moment inside a pass.

    These are the factors of query and key norms repeated to (N, 2C), or four arrays (N, F) of
    GELU's slope.
    """
    streams = 16 if model.is_gpt2 else 2 if model.qk_norm else 1
    return streams * rows * model.block_size * model.n_embd


def muon_numbers(model: ModelConfig, train: TrainConfig, threads: int) -> int:
    """Return the numbers needed for the largest stack of matrices that a thread orthogonalises.

    These are the stack, its copy and a spare one, and two squares of the shorter side.
    """
    if train.optimizer != "muon":
        return 0
    most = 0
    for (rows, columns), count in muon_shapes(model).items():
        size = max(1, min(-(-count // threads), STACK // (rows * columns)))
        most = max(most, size * (3 * rows * columns + 2 * min(rows, columns) ** 2))
    return most


def muon_shapes(model: ModelConfig) -> dict[tuple[int, int], int]:
    """Return how many matrices of each shape Muon orthogonalises."""
    counts: dict[tuple[int, int], int] = {}
    for weight in filter(lambda weight: weight.is_block_matrix, parameters(model)):
        matrix = (weight.shape[0] // weight.stacked, weight.shape[1])
        counts[matrix] = counts.get(matrix, 0) + weight.stacked
    return counts


# MLX: the arrays that the graph of a step keeps alive

STREAMS = 20  # (N, C) arrays that a layer's backward pass reads; 4 more with query and key norms


def mlx_step(model: ModelConfig, train: TrainConfig, sequences: int, threads: int) -> Bytes:
    """Return bytes by kind of one MLX step.

    The update is functional: old and new weights and moments are in memory together, and Muon
    orthogonalises all matrices of a shape in one stack.
    """
    n, n_adamw = parameter_count(model), adamw_count(model, train)
    tokens, half = sequences * model.block_size, train.dtype != "float32"
    width = 2 if half else FLOAT
    streams = STREAMS + 4 * model.qk_norm + 2 * model.token_shift + 2 * (model.dropout > 0)
    layers = 1 if train.checkpoint_activations else model.n_layer
    inputs = model.n_layer if train.checkpoint_activations else 0
    stacked = 4 * (n - n_adamw)
    return {
        "weights": (FLOAT + 2 * half) * n,
        "gradients": 2 * FLOAT * n,
        "moments": FLOAT * (n + second_moment_count(model, train)),
        "activations": width * (layers * streams + inputs) * tokens * model.n_embd,
        "attention": width * layers * tokens * model.n_head * model.block_size,
        "logits": 3 * FLOAT * tokens * model.vocab_size,
        "working": FLOAT * (2 * n + n_adamw + stacked),
    }
