"""The five methods: a configuration in, an adapter attached to a frozen model out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from metapeft.errors import UserError
from metapeft.peft.base import METHODS, Adapter, MethodConfig
from metapeft.settings import brief

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from metapeft.runtime import nn

T = TypeVar("T")

__all__ = ["METHODS", "Adapter", "MethodConfig", "config_class", "create", "parse", "validator"]


def config_class(method: str) -> type[MethodConfig]:
    """The dataclass of a method's hyperparameters. Raises UserError on an unknown method."""
    from metapeft.peft.adalora import AdaLoRAConfig
    from metapeft.peft.lora import LoRAConfig
    from metapeft.peft.p_tuning import PTuningConfig
    from metapeft.peft.prefix import PrefixConfig
    from metapeft.peft.prompt import PromptConfig

    classes = (LoRAConfig, AdaLoRAConfig, PromptConfig, PrefixConfig, PTuningConfig)
    found = {c.method: c for c in classes}.get(method)
    if found is None:
        raise UserError(f"unknown method {brief(repr(method), 60)}; choose from {', '.join(METHODS)}")
    return found


LARGEST = 2**31  # no size of a model comes near it, and MLX counts in 32 bits


def finite(what: str, value: Any) -> None:
    """Raises UserError where a number is NaN, infinite, or of no size that can be computed with."""
    if isinstance(value, dict):
        for key, inner in value.items():
            finite(f"{what}.{brief(key, 60)}", inner)
    elif isinstance(value, int | float) and not abs(value) < LARGEST:  # not: NaN compares false
        raise UserError(f"{what}={brief(value, 30)} must be a finite number below {LARGEST:.0e}")


_validators: dict[type, Any] = {}


def validator(cls: type[T]) -> TypeAdapter[T]:
    """pydantic's checks of a dataclass, kept: building one takes milliseconds."""
    from pydantic import TypeAdapter

    found: TypeAdapter[T] = _validators.get(cls) or TypeAdapter(cls)
    _validators[cls] = found
    return found


def parse(method: str, values: dict[str, Any]) -> MethodConfig:
    """Checked hyperparameters of a method. Raises UserError naming the wrong key or value."""
    from pydantic import ValidationError

    cls = config_class(method)
    unknown = sorted(set(values) - cls.names())
    if unknown:
        raise UserError(
            f"{method} has no hyperparameter {brief(unknown[0], 60)!r}; it has {', '.join(sorted(cls.names()))}"
        )
    try:
        config: MethodConfig = validator(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{method} hyperparameter {where}={brief(repr(first['input']), 60)}: {brief(first['msg'].lower())}"
        ) from error
    for name in cls.names():
        finite(f"{method} hyperparameter {name}", getattr(config, name))
    for name in ("rank", "initial_rank", "target_rank", "tokens", "interval", "width"):
        if getattr(config, name, 1) < 1:
            raise UserError(f"{method} hyperparameter {name}={getattr(config, name)} must be at least 1")
    for module, rank in (getattr(config, "rank_pattern", None) or {}).items():
        if rank < 1:
            raise UserError(f"{method} hyperparameter rank_pattern: {brief(module, 60)}={rank} must be at least 1")
    if not 0 <= getattr(config, "dropout", 0.0) < 1:
        raise UserError(f"{method} hyperparameter dropout={config.dropout} must be in [0, 1)")  # type: ignore[attr-defined]
    return config


def create(
    config: MethodConfig, model: nn.Module, *, seed: int, text_ids: Sequence[int] = (), vocabulary: int | None = None
) -> Adapter:
    """A fresh adapter (not yet attached).

    text_ids: tokens that "text" initialisations start from; vocabulary: how many token ids may be sampled (default: the
    backbone's embedding size). Equal arguments give equal weights.
    """
    from metapeft.backbones.forward import anatomy, width
    from metapeft.peft import adalora, lora, p_tuning, prefix, prompt
    from metapeft.peft.virtual import embed
    from metapeft.runtime import mx

    if isinstance(config, lora.LoRAConfig):
        return lora.create(config, model, seed)
    if isinstance(config, adalora.AdaLoRAConfig):
        return adalora.create(config, model, seed)
    if vocabulary is None:
        parts = anatomy(model)
        vocabulary = int(getattr(parts.body, parts.embed).weight.shape[0])
    if getattr(config, "initialisation", "") == "text" and not text_ids:
        raise UserError(f"{config.method} starts from a text: give text_ids, or another initialisation")
    if isinstance(config, prompt.PromptConfig):
        return prompt.create(config, model, seed, text_ids, vocabulary)
    if isinstance(config, prefix.PrefixConfig):
        return prefix.create(config, model, seed, text_ids or [0], width(model))
    assert isinstance(config, p_tuning.PTuningConfig)
    sample = embed(model, mx.random.randint(0, vocabulary, (256,), key=mx.random.key(0)))
    return p_tuning.create(config, seed, sample.shape[1], float(mx.std(sample)))
