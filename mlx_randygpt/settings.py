"""From options to configurations: recipe, preset, rules, and what a resumed run can change.

`resolve` is for Python: the same rules as the command line, with its options as keywords.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace
from typing import Any

from mlx_randygpt.config import ARCHS, ConfigError, ModelConfig, TrainConfig, UserError
from mlx_randygpt.model import parameter_count, trained_count
from mlx_randygpt.recipes import DEFAULT_PRESET, PRESETS, RECIPES
from mlx_randygpt.words import format_bytes

Options = dict[str, Any]  # by the names of the command line, with "_" for "-"
Configs = tuple[ModelConfig, TrainConfig]

MODEL_SIZES = ("n_layer", "n_head", "n_embd", "block_size")
LORA_FIELDS = ("lora_rank", "lora_alpha", "lora_targets")
TRAIN_FIELDS = tuple(field.name for field in fields(TrainConfig))
PLATEAU_PATIENCE = 5  # evaluations, for --schedule plateau without --patience

MEMORY_PASSES = 0.5  # of the text, after which Muon's weights have faded by 1/e
MAX_FORGOTTEN = 0.1  # share of a weight that one step at the full rate can remove
MUON_RATE = 0.02  # where a step has a token for WEIGHTS_PER_TOKEN weights of the blocks, or more
WEIGHTS_PER_TOKEN = 1024
MOST_PASSES = 50.0  # of a text with a token per parameter; fewer, by the root, of a shorter one
SMALL_TEXT = 45_000  # training tokens, below which SMALL_TEXT_PRESET learns more than the default
SMALL_TEXT_PRESET = "tiny"
LEAST_ITERS = 20
DROPOUT_FROM = 100.0  # passes × parameters per training token
DROPOUT = 0.1
FINE_RATE = 1e-3  # AdamW's for a trained model, up to a width of FINE_WIDTH
ADAPTER_RATE = 1e-2  # AdamW's for adapters
FINE_WIDTH = 128
TEXT_SIZES = (  # parameters; bytes of text: least useful, good, most useful
    (0.11e6, 10e3, 50e3, 500e3),
    (1.2e6, 100e3, 500e3, 2e6),
    (4.8e6, 500e3, 2e6, 10e6),
    (38e6, 1e6, 5e6, 50e6),
)


class ResumeError(UserError, ValueError):
    """A setting that a resumed run cannot change."""


def resolve(vocab_size: int, n_tokens: int = 0, **options: Any) -> Configs:
    """Return the configurations of a new run by the rules of `mlxgpt train`.

    `options` are those of the command line: `recipe`, `preset`, `arch`, the sizes, `dropout`, and
    every field of TrainConfig. Preset, number of steps, warmup, dropout, Muon's rate and its weight
    decay follow from the sizes and from `n_tokens`, the number of training tokens (0: unknown),
    unless they are given.

        model, train = resolve(tokenizer.vocab_size, len(corpus.train), preset="mini", iters=500)

    Raises ConfigError for an unknown option or an invalid value.
    """
    valid = ("arch", *MODEL_SIZES, "dropout", *TRAIN_FIELDS)
    if unknown := [name for name in options if name not in valid]:
        raise ConfigError(f"{unknown[0]} is not an option; it must be one of {', '.join(valid)}")
    for name, choices in (("recipe", RECIPES), ("preset", PRESETS), ("arch", ARCHS)):
        if options.get(name, next(iter(choices))) not in choices:
            value = options[name]
            raise ConfigError(f"{name}={value!r} is unknown; it is one of {', '.join(choices)}")
    return resolve_new(options, vocab_size, n_tokens)


def resolve_new(options: Options, vocab_size: int, n_tokens: int = 0) -> Configs:
    """Return the configurations of a new run: `options` over the recipe, preset and rules.

    Options that are not settings of a model or a run are ignored. `n_tokens` is the number of
    training tokens (0: unknown).
    """
    recipe = RECIPES[options.get("recipe", "modern")]
    options = options | {"preset": options.get("preset") or choose_preset(options, n_tokens)}
    preset = asdict(PRESETS[options["preset"]])
    batch_size = preset.pop("batch_size")
    sizes = {name: options.get(name, preset[name]) for name in MODEL_SIZES}
    train = {"batch_size": batch_size, **recipe["train"]}
    if options.get("optimizer", train["optimizer"]) != train["optimizer"]:
        train |= _rates_of(options["optimizer"])
    if "lr" in options and options["lr"] < train["min_lr"]:
        train["min_lr"] = 0.1 * options["lr"]
    if options.get("schedule") == "plateau":
        train["patience"] = PLATEAU_PATIENCE
    train |= {name: value for name, value in options.items() if name in TRAIN_FIELDS}
    switches = recipe["model"] | ARCHS[options.get("arch", "gpt")]
    model = ModelConfig(vocab_size=vocab_size, **switches, **sizes)
    config = TrainConfig(**train)
    if "iters" not in options:
        config = replace(config, iters=choose_iters(model, config, n_tokens))
    full_rate = choose_muon_rate(model, config)
    if config.optimizer == "muon" and "lr" not in options:
        config = replace(config, lr=full_rate)
    return apply_rules(options, model, config, n_tokens, full_rate)


def resolve_fine_tuning(
    options: Options, model: ModelConfig, train: TrainConfig, n_tokens: int
) -> Configs:
    """Return the configurations for training the weights of a model further, as a new run.

    `model` and `train` are those of its checkpoint: the architecture stays, the recipe is the
    default. Raises ResumeError for other sizes.
    """
    architecture = (*MODEL_SIZES, "arch", "preset", "recipe")
    resolve_resume({n: options[n] for n in architecture if n in options}, model, train)
    model = replace(model, **{name: options[name] for name in LORA_FIELDS if name in options})
    recipe = {"recipe": train.recipe, "preset": train.preset}
    options = fine_tuning_options(recipe | options, model)
    _, train = resolve_new(options, model.vocab_size)
    return apply_rules(options, model, train, n_tokens, MUON_RATE)


def fine_tuning_options(options: Options, model: ModelConfig) -> Options:
    """Return `options` (with a recipe) with the defaults for training a trained model or adapters.

    Raises ConfigError for adapters under Muon, whose steps are for whole matrices.
    """
    optimizer = options.get("optimizer", RECIPES[options["recipe"]]["train"]["optimizer"])
    if model.lora_rank:
        if options.get("optimizer", "adamw") != "adamw":
            raise ConfigError(
                f"optimizer={optimizer} does not work with lora_rank={model.lora_rank}; "
                "adapters are trained by adamw: omit --optimizer"
            )
        optimizer = "adamw"
        options = {"optimizer": "adamw", "min_lr": 0.0, "weight_decay": 0.0} | options
    rate = fine_tuning_rate(model) if optimizer == "adamw" else MUON_RATE
    return {"lr": rate} | options


def resolve_resume(options: Options, model: ModelConfig, train: TrainConfig) -> Configs:
    """Return the checkpoint's own configurations with `options` on top.

    Raises ResumeError for an option that would need other weights.
    """
    preset = asdict(PRESETS[options["preset"]]) if "preset" in options else {}
    for name in MODEL_SIZES:
        size, new = getattr(model, name), options.get(name, preset.get(name))
        if new not in (None, size):
            raise ResumeError(
                f"Checkpoint {name} {size} != model {name} {new}; a run keeps its architecture: "
                "omit the option, or start a new run with another --out"
            )
    if options.get("arch", model.arch) != model.arch:
        raise ResumeError(
            f"Checkpoint arch {model.arch} != arch {options['arch']}; omit the option"
        )
    for name in LORA_FIELDS:
        if options.get(name, getattr(model, name)) != getattr(model, name):
            raise ResumeError(
                f"Checkpoint {name} {getattr(model, name)} != {name} {options[name]}; omit "
                "the option, or start a new run with --init-from and another --out"
            )
    for name in ("recipe", "optimizer"):
        if options.get(name, getattr(train, name)) != getattr(train, name):
            raise ResumeError(
                f"Checkpoint {name} {getattr(train, name)} != {name} {options[name]}; "
                f"its weights need its own {name}: omit the option"
            )
    changes = {name: value for name, value in options.items() if name in TRAIN_FIELDS}
    if "iters" in options:
        changes.setdefault("minutes", 0.0)  # the run ends by steps from now on
    if options.get("schedule") == "plateau" and not train.patience:
        changes.setdefault("patience", PLATEAU_PATIENCE)
    dropout = options.get("dropout", model.dropout)
    return replace(model, dropout=dropout), replace(train, **changes)


def apply_rules(
    options: Options, model: ModelConfig, train: TrainConfig, n_tokens: int, full_rate: float
) -> Configs:
    """Return the configurations with what follows from sizes and text, unless `options` say it.

    `full_rate` is Muon's by rule: at a lower --lr, weights are written and forgotten more slowly.
    """
    if "warmup" not in options:
        train = replace(train, warmup=warmup_steps(train))
    if "weight_decay" not in options:
        decay = choose_weight_decay(model, train, n_tokens, full_rate)
        train = replace(train, weight_decay=decay)
    dropout = options["dropout"] if "dropout" in options else choose_dropout(model, train, n_tokens)
    return replace(model, dropout=dropout), train


def choose_preset(options: Options, n_tokens: int) -> str:
    """Return the default preset, or a smaller one for a short text of `n_tokens` (0: unknown).

    Whoever gives a size gets the default's other sizes.
    """
    is_short = 0 < n_tokens < SMALL_TEXT and not any(name in options for name in MODEL_SIZES)
    return SMALL_TEXT_PRESET if is_short else DEFAULT_PRESET


def choose_iters(model: ModelConfig, train: TrainConfig, n_tokens: int) -> int:
    """Return the default number of steps; fewer where the text would be learned by heart.

    A model with more parameters than the text has tokens can read it less often.
    """
    return min(train.iters, most_iters(model, train, n_tokens)) if n_tokens else train.iters


def most_iters(model: ModelConfig, train: TrainConfig, n_tokens: int) -> int:
    """Return the number of steps after which a model has memorised a text of `n_tokens`."""
    passes = MOST_PASSES * min(1.0, n_tokens / parameter_count(model)) ** 0.5
    steps = float(f"{passes * _steps_per_pass(model, train, n_tokens):.2g}")
    return max(LEAST_ITERS, int(steps))


def choices_note(options: Options, train: TrainConfig, n_tokens: int) -> str:
    """Return one line if the text has decided the preset or the number of steps, else ""."""
    chosen = []
    if "preset" not in options and train.preset != DEFAULT_PRESET:
        chosen.append(f"preset {train.preset}")
    if "iters" not in options and train.iters != TrainConfig.iters:
        chosen.append(f"{train.iters} steps")
    if not chosen:
        return ""
    return (
        f"Chosen for a text of {n_tokens:,} training tokens: {' and '.join(chosen)}; "
        "--preset and --iters decide otherwise."
    )


def choose_muon_rate(model: ModelConfig, train: TrainConfig) -> float:
    """Return Muon's full rate for a new run.

    It is less where a step has few tokens for the weights of the blocks, for then its gradients
    are mostly noise.
    """
    weights = 12 * model.n_layer * model.n_embd**2
    tokens = train.sequences_per_step * model.block_size
    share = min(1.0, WEIGHTS_PER_TOKEN * tokens / weights)
    return float(f"{MUON_RATE * share**0.5:.2g}")


def warmup_steps(train: TrainConfig) -> int:
    """Return the recipe's warmup, but at most a tenth of the run, or a fiftieth under Muon."""
    return min(train.warmup, train.iters // (50 if train.optimizer == "muon" else 10))


def count_passes(model: ModelConfig, train: TrainConfig, n_tokens: int) -> float:
    """Return how often the run reads each of its `n_tokens` training tokens."""
    return train.iters / _steps_per_pass(model, train, n_tokens)


def choose_weight_decay(
    model: ModelConfig, train: TrainConfig, n_tokens: int, full_rate: float
) -> float:
    """Return Muon's decoupled decay per unit of learning rate; AdamW keeps the recipe's.

    What a step wrote fades by 1/e in MEMORY_PASSES of the text (after Wang & Aitchison 2024,
    arXiv:2405.13698): the shorter the text, the less of it is memorised. With 0 tokens (unknown)
    the recipe's decay stays.
    """
    if train.optimizer != "muon" or n_tokens == 0:
        return train.weight_decay
    per_step = 1 / (MEMORY_PASSES * _steps_per_pass(model, train, n_tokens))
    return float(f"{min(per_step, MAX_FORGOTTEN) / full_rate:.2g}")


def choose_dropout(model: ModelConfig, train: TrainConfig, n_tokens: int) -> float:
    """Return the dropout for `n_tokens` training tokens (0: unknown).

    It is 0 unless the model reads a text that is short for its size very often.
    """
    if n_tokens == 0:
        return 0.0
    strain = count_passes(model, train, n_tokens) * trained_count(model) / n_tokens
    return DROPOUT if strain > DROPOUT_FROM else 0.0


def fine_tuning_rate(model: ModelConfig) -> float:
    """Return AdamW's learning rate for a trained model; a wider one needs a lower rate.

    After Yang et al. 2022, arXiv:2203.03466. Muon keeps the recipe's rate.
    """
    rate = ADAPTER_RATE if model.lora_rank else FINE_RATE
    return float(f"{rate * min(1.0, FINE_WIDTH / model.n_embd):.2g}")


def suitable_text(n_parameters: int) -> tuple[float, float, float]:
    """Return how many bytes of text such a model needs, learns well from, and can use.

    The sizes are those that the ancestor projects recommend.
    """
    _, *sizes = min(TEXT_SIZES, key=lambda row: abs(math.log(row[0] / n_parameters)))
    least, good, most = sizes
    return least, good, most


def text_advice(model: ModelConfig, n_bytes: int) -> str:
    """Return one line if a text is too short or too long for the model, else ""."""
    n = parameter_count(model)
    least, good, most = suitable_text(n)
    subject = f"text: {format_bytes(n_bytes)} for {n:,} parameters"
    if n_bytes < least:
        sizes = f"at least {format_bytes(least)}, better {format_bytes(good)}"
        return f"Short {subject} ({sizes}). Use more text or a smaller --preset."
    if n_bytes > most:
        sizes = f"at most about {format_bytes(most)} is of use"
        return f"Long {subject} ({sizes}). A larger --preset learns more from it."
    return ""


def to_toml(values: dict[str, Any]) -> str:
    """Return flat `key = value` lines that `--config` reads back."""
    return "".join(f"{key} = {_toml(value)}\n" for key, value in values.items())


def _toml(value: Any) -> str:
    """Return a TOML value; JSON differs only in surrogate pairs and in DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _rates_of(optimizer: str) -> Options:
    """Return the rates of the recipe that uses this optimizer."""
    names = ("optimizer", "lr", "min_lr", "weight_decay", "beta1", "beta2")
    recipes = (recipe["train"] for recipe in RECIPES.values())
    recipe = next(recipe for recipe in recipes if recipe["optimizer"] == optimizer)
    return {name: recipe[name] for name in names}


def _steps_per_pass(model: ModelConfig, train: TrainConfig, n_tokens: int) -> float:
    return n_tokens / (train.sequences_per_step * model.block_size)
