"""The memory of training by kind, counted from the settings: what each backend allocates.

Pure functions of numbers; nothing is allocated here. NumPy is counted array by array, as
numpy_model and numpy_backend make them. MLX is lazy, so there it is what the backward pass holds on
to, and docs/scaling.md says how far that was compared.

Legend: B sequences, T time, C n_embd, H heads, D = C/H, V vocab, N = B·T, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from mlx_randygpt.backends.numpy.backend import CHUNK_TOKENS
from mlx_randygpt.backends.numpy.model import ATTENTION, LOGITS
from mlx_randygpt.backends.numpy.optimizer import STACK
from mlx_randygpt.config import LIMITS, ConfigError, ModelConfig, TrainConfig
from mlx_randygpt.model import parameter_count, parameter_shapes, parameters
from mlx_randygpt.training.loop import EVAL_BATCH_TOKENS

FLOAT = 4  # bytes
ON_HOST = ("program", "saving")  # kinds that a GPU with its own memory leaves to the machine's
Bytes = dict[str, int]  # by kind

KINDS = {  # and what each is, in words
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
    backend: str, model: ModelConfig, train: TrainConfig, sequences: int, threads: int,
    program: int = 0,
) -> Bytes:  # fmt: skip
    """Bytes by kind at the peak of `mlxgpt train` with `sequences` a micro-batch on this device;
    `program` is what the process holds before it."""
    n = parameter_count(model)
    parts = numpy_step if backend == "numpy" else mlx_step
    found = parts(model, train, sequences, threads)
    kept = FLOAT * (2 * n + adamw_count(model, train))  # weights and moments, as a file has them
    return {"program": program, **found, "saving": 4 * kept}


def adamw_count(model: ModelConfig, train: TrainConfig) -> int:
    """Weights that AdamW updates: all, or those that Muon leaves to it."""
    weights = parameters(model)
    return sum(w.size for w in weights if train.optimizer == "adamw" or not w.is_block_matrix)


def largest_batch(fits: Callable[[int], bool]) -> int:
    """The most sequences for which `fits` holds, 0 for none; what fits, fits with fewer too."""
    low, high = 0, LIMITS["batch_size"]
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def on_device(found: Bytes, unified: bool) -> Bytes:
    """The kinds that lie in a device's memory; of a GPU that has its own, not all do."""
    return {kind: n for kind, n in found.items() if unified or kind not in ON_HOST}


def micro_batch(
    backend: str, model: ModelConfig, train: TrainConfig, room: int, unified: bool = True
) -> int:
    """Sequences of a pass so that a step fits into `room` bytes; 0 is the whole micro-batch, and
    all that NumPy knows. ConfigError where not even one sequence fits."""
    if backend == "numpy":
        return 0

    def needs(sequences: int) -> int:
        return sum(on_device(footprint(backend, model, train, sequences, 1), unified).values())

    most = largest_batch(lambda sequences: needs(sequences) <= room)
    if most == 0:
        raise ConfigError(
            f"one sequence takes {needs(1) / 1e9:.1f} GB, and there are {room / 1e9:.1f} GB; try "
            "--checkpoint-activations, --dtype bfloat16, a smaller --block-size or model"
        )
    return 0 if most >= train.batch_size else most


# NumPy: every array of a chunk, one chunk a thread.


def numpy_step(model: ModelConfig, train: TrainConfig, sequences: int, threads: int) -> Bytes:
    """Bytes by kind of a NumpyBackend whose batches, those of evaluations too, have been through
    all its threads."""
    n = parameter_count(model)
    rows = chunk_rows(model, max(sequences, EVAL_BATCH_TOKENS // model.block_size), threads)
    chunk = chunk_numbers(model, rows, train.checkpoint_activations)
    found = {kind: FLOAT * threads * count for kind, count in chunk.items()}
    found["working"] += (
        FLOAT * threads * (passing_numbers(model, rows) + muon_numbers(model, train, threads))
    )
    return {
        "weights": FLOAT * n, "gradients": FLOAT * n * threads, "moments": 2 * FLOAT * n, **found,
    }  # fmt: skip


def chunk_rows(model: ModelConfig, sequences: int, threads: int) -> int:
    """Sequences of a chunk, as NumpyBackend cuts a batch."""
    return max(1, min(CHUNK_TOKENS // model.block_size, -(-sequences // threads)))


def chunk_numbers(model: ModelConfig, rows: int, recompute: bool) -> dict[str, int]:
    """Numbers in the arrays of numpy_model.Chunk by kind, without its gradients."""
    t, c, h, v = model.block_size, model.n_embd, model.n_head, model.vocab_size
    n = rows * t
    apart = model.token_shift or model.is_gpt2  # what is read is not the norm itself
    streams = 10 + (2 if apart else 0) + (2 if model.dropout else 0)  # of (N, C)
    few = max(1, min(rows, ATTENTION // (h * t * t)))
    phases = 2 * 2 * t * 2 * h * (model.head_size // 2)  # both ways, complex
    largest = max(prod(shape) for shape in parameter_shapes(model).values())
    scratch = (4 + 1 + model.is_gpt2 + 4 + 3 + (1 if model.dropout else 0)) * n * c + n
    layers = 1 if recompute else model.n_layer
    inputs = n * c * (model.n_layer - 1) if recompute else 0
    return {
        "activations": layers * (streams * n * c + 2 * n + 2 * h * n) + inputs,
        "attention": layers * rows * h * t * t,
        "logits": max(1, min(n, LOGITS // v)) * v,
        "working": scratch + few * h * t * (t + model.head_size) + phases + largest,
    }


def passing_numbers(model: ModelConfig, rows: int) -> int:
    """The most that NumPy itself allocates for a moment inside a pass: the factors of query and
    key norms, spread over (N, 2C), or four arrays (N, F) of GELU's slope."""
    streams = 16 if model.is_gpt2 else 2 if model.qk_norm else 1
    return streams * rows * model.block_size * model.n_embd


def muon_numbers(model: ModelConfig, train: TrainConfig, threads: int) -> int:
    """Numbers in the largest stack of matrices that a thread orthogonalises: itself, its copy and
    a spare one, and two squares of the shorter side."""
    if train.optimizer != "muon":
        return 0
    most = 0
    for (rows, columns), count in muon_shapes(model).items():
        size = max(1, min(-(-count // threads), STACK // (rows * columns)))
        most = max(most, size * (3 * rows * columns + 2 * min(rows, columns) ** 2))
    return most


def muon_shapes(model: ModelConfig) -> dict[tuple[int, int], int]:
    """How many matrices of each shape Muon turns."""
    found: dict[tuple[int, int], int] = {}
    for weight in filter(lambda weight: weight.is_block_matrix, parameters(model)):
        matrix = (weight.shape[0] // weight.stacked, weight.shape[1])
        found[matrix] = found.get(matrix, 0) + weight.stacked
    return found


# MLX: what the graph of a step keeps alive.

STREAMS = 20  # (N, C) arrays that a layer's backward pass reads; 4 more with query and key norms


def mlx_step(model: ModelConfig, train: TrainConfig, sequences: int, threads: int) -> Bytes:
    """Bytes by kind of one MLX step. The update is functional: old and new weights and moments
    stand side by side, and Muon turns all matrices of a shape in one stack."""
    n, few = parameter_count(model), adamw_count(model, train)
    tokens, half = sequences * model.block_size, train.dtype == "bfloat16"
    width = 2 if half else FLOAT
    streams = STREAMS + 4 * model.qk_norm + 2 * model.token_shift + 2 * (model.dropout > 0)
    layers = 1 if train.checkpoint_activations else model.n_layer
    inputs = model.n_layer if train.checkpoint_activations else 0
    stacked = 4 * (n - few)
    return {
        "weights": (FLOAT + 2 * half) * n,
        "gradients": 2 * FLOAT * n,
        "moments": FLOAT * (n + few),
        "activations": width * (layers * streams + inputs) * tokens * model.n_embd,
        "attention": width * layers * tokens * model.n_head * model.block_size,
        "logits": 3 * FLOAT * tokens * model.vocab_size,
        "working": FLOAT * (2 * n + few + stacked),
    }
