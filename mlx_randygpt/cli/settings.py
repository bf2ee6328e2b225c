"""From options to settings: what was given, over the checkpoint's own, over recipe and preset."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

from mlx_randygpt import rules
from mlx_randygpt.config import (
    ARCHS,
    DEFAULT_PRESET,
    PRESETS,
    RECIPES,
    ConfigError,
    ModelConfig,
    TrainConfig,
    UserError,
)

if TYPE_CHECKING:
    from mlx_randygpt.checkpoint import Checkpoint

MODEL_SIZES = ("n_layer", "n_head", "n_embd", "block_size")
LORA = ("lora_rank", "lora_alpha", "lora_targets")
PLATEAU_PATIENCE = 5  # evaluations, where --schedule plateau comes without --patience


class ResumeError(UserError, ValueError):
    """A setting that a resumed run cannot change."""


def fresh(
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
    return by_rule(given, model, TrainConfig(**chosen), n_tokens)


def fine_tuning(given: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
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
        given = {"lr": rules.fine_tuning_rate(model)} | given
    return given


def by_rule(
    given: dict[str, Any], model: ModelConfig, train: TrainConfig, n_tokens: int
) -> tuple[ModelConfig, TrainConfig]:
    """The settings with what follows from sizes and text where it was not given."""
    if "warmup" not in given:
        train = replace(train, warmup=rules.warmup_steps(train.warmup, train.iters))
    if "weight_decay" not in given:
        train = replace(train, weight_decay=rules.weight_decay(model, train, n_tokens))
    dropout = given.get("dropout", rules.dropout(model, train, n_tokens))
    return replace(model, dropout=dropout), train


def resumed(given: dict[str, Any], saved: Checkpoint) -> tuple[ModelConfig, TrainConfig]:
    """The checkpoint's own settings with what was given on top; ResumeError where it can't be."""
    wanted = dict(given)
    if "preset" in given:
        preset = asdict(PRESETS[given["preset"]])
        wanted = {name: preset[name] for name in MODEL_SIZES} | wanted
    for name in ("n_layer", "n_head", "n_embd", "block_size"):
        if wanted.get(name, getattr(saved.model, name)) != getattr(saved.model, name):
            raise ResumeError(
                f"Checkpoint {name} {getattr(saved.model, name)} != model {name} {wanted[name]}; "
                "a run goes on with its own architecture: leave the option out, or start anew "
                "with another --out"
            )
    if given.get("arch", saved.model.arch) != saved.model.arch:
        raise ResumeError(
            f"Checkpoint arch {saved.model.arch} != arch {given['arch']}; leave the option out"
        )
    for name in LORA:
        if given.get(name, getattr(saved.model, name)) != getattr(saved.model, name):
            raise ResumeError(
                f"Checkpoint {name} {getattr(saved.model, name)} != {name} {given[name]}; leave "
                "the option out, or start anew with --init-from and another --out"
            )
    for name in ("recipe", "optimizer"):
        if given.get(name, getattr(saved.train, name)) != getattr(saved.train, name):
            raise ResumeError(
                f"Checkpoint {name} {getattr(saved.train, name)} != {name} {given[name]}; "
                f"its weights go with its own {name}: leave the option out"
            )
    known = {field.name for field in fields(TrainConfig)}
    changes = {name: value for name, value in given.items() if name in known}
    if given.get("schedule") == "plateau" and not saved.train.patience:
        changes.setdefault("patience", PLATEAU_PATIENCE)
    train = replace(saved.train, **changes)
    return replace(saved.model, dropout=given.get("dropout", saved.model.dropout)), train


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
