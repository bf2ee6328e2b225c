"""From options to settings: what was given, over the checkpoint's own, over recipe and preset."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace
from typing import Any

from mlx_randygpt import settings
from mlx_randygpt.config import ARCHS, ConfigError, ModelConfig, TrainConfig, UserError
from mlx_randygpt.model import parameter_count, trained_count
from mlx_randygpt.recipes import DEFAULT_PRESET, PRESETS, RECIPES

MODEL_SIZES = ("n_layer", "n_head", "n_embd", "block_size")
LORA_FIELDS = ("lora_rank", "lora_alpha", "lora_targets")
PLATEAU_PATIENCE = 5  # evaluations, where --schedule plateau comes without --patience


class ResumeError(UserError, ValueError):
    """A setting that a resumed run cannot change."""


def resolve_new(
    given: dict[str, Any], vocab_size: int, n_tokens: int = 0
) -> tuple[ModelConfig, TrainConfig]:
    """The settings of a new run on `n_tokens` training tokens (0: not known): what was given,
    over recipe and preset, over the rules that follow from sizes."""
    recipe = RECIPES[given.get("recipe", "modern")]
    preset = asdict(PRESETS[given.get("preset", DEFAULT_PRESET)])
    batch_size = preset.pop("batch_size")
    sizes = {name: given.get(name, preset[name]) for name in MODEL_SIZES}
    defaults = TrainConfig.__dataclass_fields__
    chosen = {"batch_size": batch_size, **recipe["train"]}
    if given.get("optimizer", chosen["optimizer"]) != chosen["optimizer"]:
        chosen |= _rates_of(given["optimizer"])
    if "lr" in given and given["lr"] < chosen["min_lr"]:
        chosen["min_lr"] = 0.1 * given["lr"]
    if given.get("schedule") == "plateau":
        chosen["patience"] = PLATEAU_PATIENCE
    chosen |= {name: value for name, value in given.items() if name in defaults}
    switches = recipe["model"] | ARCHS[given.get("arch", "gpt")]
    model = ModelConfig(vocab_size=vocab_size, **switches, **sizes)
    return apply_rules(given, model, TrainConfig(**chosen), n_tokens)


def fine_tuning_options(given: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """What was given, the recipe among it, and how a trained model or its adapters are trained
    where it was not; ConfigError for adapters under Muon, whose steps are for whole matrices."""
    chosen = RECIPES[given["recipe"]]["train"]
    if model.lora_rank:
        if given.get("optimizer", "adamw") != "adamw":
            raise ConfigError(
                f"optimizer={given['optimizer']} does not go with lora_rank={model.lora_rank}; "
                "adapters are trained by adamw: leave --optimizer out"
            )
        chosen = {"optimizer": "adamw", "min_lr": 0.0, "weight_decay": 0.0}
        given = chosen | given
    if given.get("optimizer", chosen["optimizer"]) == "adamw":
        given = {"lr": settings.fine_tuning_rate(model)} | given
    return given


def apply_rules(
    given: dict[str, Any], model: ModelConfig, train: TrainConfig, n_tokens: int
) -> tuple[ModelConfig, TrainConfig]:
    """The settings with what follows from sizes and text where it was not given."""
    if "warmup" not in given:
        train = replace(train, warmup=settings.warmup_steps(train.warmup, train.iters))
    if "weight_decay" not in given:
        train = replace(train, weight_decay=settings.weight_decay(model, train, n_tokens))
    dropout = given.get("dropout", settings.dropout(model, train, n_tokens))
    return replace(model, dropout=dropout), train


def resolve_resume(
    given: dict[str, Any], model: ModelConfig, train: TrainConfig
) -> tuple[ModelConfig, TrainConfig]:
    """The checkpoint's own settings with what was given on top; ResumeError where it can't be."""
    wanted = dict(given)
    if "preset" in given:
        preset = asdict(PRESETS[given["preset"]])
        wanted = {name: preset[name] for name in MODEL_SIZES} | wanted
    for name in ("n_layer", "n_head", "n_embd", "block_size"):
        if wanted.get(name, getattr(model, name)) != getattr(model, name):
            raise ResumeError(
                f"Checkpoint {name} {getattr(model, name)} != model {name} {wanted[name]}; "
                "a run goes on with its own architecture: leave the option out, or start anew "
                "with another --out"
            )
    if given.get("arch", model.arch) != model.arch:
        raise ResumeError(
            f"Checkpoint arch {model.arch} != arch {given['arch']}; leave the option out"
        )
    for name in LORA_FIELDS:
        if given.get(name, getattr(model, name)) != getattr(model, name):
            raise ResumeError(
                f"Checkpoint {name} {getattr(model, name)} != {name} {given[name]}; leave "
                "the option out, or start anew with --init-from and another --out"
            )
    for name in ("recipe", "optimizer"):
        if given.get(name, getattr(train, name)) != getattr(train, name):
            raise ResumeError(
                f"Checkpoint {name} {getattr(train, name)} != {name} {given[name]}; "
                f"its weights go with its own {name}: leave the option out"
            )
    known = {field.name for field in fields(TrainConfig)}
    changes = {name: value for name, value in given.items() if name in known}
    if given.get("schedule") == "plateau" and not train.patience:
        changes.setdefault("patience", PLATEAU_PATIENCE)
    dropout = given.get("dropout", model.dropout)
    return replace(model, dropout=dropout), replace(train, **changes)


def to_toml(values: dict[str, Any]) -> str:
    """Flat `key = value` lines that `--config` reads back."""
    return "".join(f"{key} = {_toml(value)}\n" for key, value in values.items())


def _toml(value: Any) -> str:
    """JSON is TOML but for two spellings: pairs of surrogates, and DEL as it is."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _rates_of(optimizer: str) -> dict[str, Any]:
    """The rates of the recipe that uses this optimizer."""
    names = ("optimizer", "lr", "min_lr", "weight_decay", "beta1", "beta2")
    found = next(r["train"] for r in RECIPES.values() if r["train"]["optimizer"] == optimizer)
    return {name: found[name] for name in names}


MEMORY_PASSES = 0.5  # of the text, over which Muon's weights forget
MAX_FORGOTTEN = 0.05  # of a weight in one step at the full rate
MUON_RATE = 0.02  # the full rate; at a lower --lr weights are written and forgotten more slowly
DROPOUT_FROM = 100.0  # passes × parameters per training token
DROPOUT = 0.1
FINE_RATE = 1e-3  # AdamW's on a trained model, up to a width of FINE_WIDTH
ADAPTER_RATE = 1e-2  # the same on adapters
FINE_WIDTH = 128


# Parameters, and bytes of text: the least that helps, what is better, and what it takes in.
TEXT_SIZES = (
    (0.11e6, 10e3, 50e3, 500e3),
    (1.2e6, 100e3, 500e3, 2e6),
    (4.8e6, 500e3, 2e6, 10e6),
    (38e6, 1e6, 5e6, 50e6),
)


def warmup_steps(longest: int, iters: int) -> int:
    """Steps of warmup: the recipe's, but at most a tenth of the run."""
    return min(longest, iters // 10)


def passes(model: ModelConfig, train: TrainConfig, n_tokens: int) -> float:
    """How often the run reads each of its `n_tokens` training tokens."""
    return train.iters / _steps_per_pass(model, train, n_tokens)


def weight_decay(model: ModelConfig, train: TrainConfig, n_tokens: int) -> float:
    """Muon's decoupled decay, per unit of rate: what a step wrote fades by 1/e in MEMORY_PASSES
    of the text (after Wang & Aitchison 2024, arXiv:2405.13698), so that the shorter the text,
    the less of it is learned by heart. AdamW keeps the recipe's; 0 tokens are not known yet."""
    if train.optimizer != "muon" or n_tokens == 0:
        return train.weight_decay
    per_step = 1 / (MEMORY_PASSES * _steps_per_pass(model, train, n_tokens))
    return float(f"{min(per_step, MAX_FORGOTTEN) / MUON_RATE:.2g}")


def fine_tuning_rate(model: ModelConfig) -> float:
    """AdamW's rate on a trained model; a wider one takes less (after Yang et al. 2022,
    arXiv:2203.03466). Muon keeps the recipe's."""
    rate = ADAPTER_RATE if model.lora_rank else FINE_RATE
    return float(f"{rate * min(1.0, FINE_WIDTH / model.n_embd):.2g}")


def dropout(model: ModelConfig, train: TrainConfig, n_tokens: int) -> float:
    """Dropout for a text of `n_tokens` training tokens, which may not be known yet (0): none
    until a model reads a text that is short for its size very often."""
    if n_tokens == 0:
        return 0.0
    strain = passes(model, train, n_tokens) * trained_count(model) / n_tokens
    return DROPOUT if strain > DROPOUT_FROM else 0.0


def text_advice(model: ModelConfig, n_bytes: int) -> str:
    """One line where a text is too short or too long for the model, by the table of the project's
    forerunners; else ""."""
    n = parameter_count(model)
    _, least, better, most = min(TEXT_SIZES, key=lambda row: abs(math.log(row[0] / n)))
    if n_bytes < least:
        return (
            f"Short text: {_bytes(n_bytes)} for {n:,} parameters, which ask for {_bytes(least)} at "
            f"least and better {_bytes(better)}; more text or a smaller --preset learns better."
        )
    if n_bytes > most:
        return (
            f"Long text: {_bytes(n_bytes)} for {n:,} parameters, which take in about "
            f"{_bytes(most)}; a larger --preset makes more of it."
        )
    return ""


def _bytes(n: float) -> str:
    return f"{n / 1e6:,.3g} MB" if n >= 1e6 else f"{n / 1e3:,.3g} kB"


def _steps_per_pass(model: ModelConfig, train: TrainConfig, n_tokens: int) -> float:
    return n_tokens / (train.sequences_per_step * model.block_size)
