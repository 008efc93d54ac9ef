"""A configuration: one flat JSON dict that holds the method, its hyperparameters and the trainer's."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from metapeft.errors import UserError
from metapeft.peft.base import MethodConfig
from metapeft.settings import brief


@dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters of the trainer (AdamW, linear warm-up, then cosine to a tenth, constant, or linear decay).

    warmup: fraction of the steps. clip: largest global norm of the gradient (0: none). accumulate: micro-batches per
    step; it lowers memory, not the result. patience: evaluations without improvement before stopping (0: never).
    evaluations: how often a sample of the validation split is scored during training.
    """

    learning_rate: float = 1e-3
    batch_size: int = 8
    warmup: float = 0.1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    checkpoint: bool = False
    patience: int = 0
    evaluations: int = 4


# Where a method's learning rate usually lies; methods can only be compared with each one's tuned.
LEARNING_RATES = {"lora": 1e-3, "adalora": 3e-3, "prompt": 1e-2, "prefix": 1e-2, "p_tuning": 3e-3}


STEPS_PER_LOOK = 10  # a look at 64 validation examples costs as much as several steps


def looks(steps: int) -> int:
    """Evaluations of a trial that is one of many, where nothing else is asked for: short ones take fewer."""
    return max(1, min(TrainConfig.evaluations, steps // STEPS_PER_LOOK))


def split(configuration: dict[str, Any]) -> tuple[MethodConfig, TrainConfig]:
    """Checked halves of a configuration. Raises UserError naming the wrong key or value."""
    from pydantic import ValidationError

    from metapeft.peft import config_class, finite, parse, validator

    values = dict(configuration)
    method = values.pop("method", None)
    if method is None:
        raise UserError("a configuration needs a method")
    names = {f.name for f in fields(TrainConfig)}
    known = names | config_class(method).names()
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key)[:60], known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(sorted(known))}"
            raise UserError(f"{method} has no hyperparameter {brief(key, 60)!r}; {hint}")
    train = {"learning_rate": LEARNING_RATES[method]} | {k: v for k, v in values.items() if k in names}
    try:
        config = validator(TrainConfig).validate_python(train)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"hyperparameter {first['loc'][0]}={brief(repr(first['input']), 60)}: {brief(first['msg'].lower())}"
        ) from error
    for name in names:
        finite(f"hyperparameter {name}", getattr(config, name))
    for name, low in (("batch_size", 1), ("accumulate", 1), ("evaluations", 1), ("patience", 0), ("clip", 0)):
        if getattr(config, name) < low:
            raise UserError(f"hyperparameter {name}={getattr(config, name)} must be at least {low}")
    if not config.learning_rate > 0 or not 0 <= config.warmup < 1:
        raise UserError("learning_rate must be above 0 and warmup in [0, 1)")
    return parse(method, {k: v for k, v in values.items() if k not in names}), config


def full(configuration: dict[str, Any]) -> dict[str, Any]:
    """The configuration with every default written out (what a trial records)."""
    method, train = split(configuration)
    return method.to_json() | asdict(train)
