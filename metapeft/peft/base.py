"""The one small interface that every method implements, and the registry of methods.

Two places to put trained weights are enough for all five methods: linear layers that are replaced inside the model
(LoRA, AdaLoRA), and keys and values that every token attends to before the real ones (prefix tuning directly; prompt
tuning and P-tuning as the keys and values of virtual tokens, computed once per step and shared by the whole batch).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

METHODS = ("lora", "adalora", "prompt", "prefix", "p_tuning")


@dataclass(frozen=True)
class MethodConfig:
    """Hyperparameters of one method (subclasses add their own). Frozen and JSON-serialisable."""

    method: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        return {"method": self.method, **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}}

    @classmethod
    def names(cls) -> set[str]:
        return {f.name for f in fields(cls)}


class Adapter:
    """A method attached to a frozen model. `module` holds exactly the trained parameters (an `nn.Module`).

    Life cycle: `attach(model)` changes the model in place and freezes it; `prefix(model)` gives the per-layer keys and
    values to attend to (None for matrix methods); `before_step(step)` comes before each step; `extra_loss()` is added
    to the task loss; within `learning_from(examples)` the gradients of a step are taken; `after_step(step, gradients)`
    runs after each optimizer step; `detach(model)` restores the model exactly.
    """

    config: MethodConfig
    module: nn.Module
    penalty: Callable[[], mx.array] | None = None  # a loss of the parameters that whoever trains them adds

    def attach(self, model: nn.Module) -> None:
        raise NotImplementedError

    def detach(self, model: nn.Module) -> None:
        raise NotImplementedError

    def prefix(self, model: nn.Module) -> list[tuple[mx.array, mx.array]] | None:
        """Per layer (keys, values), each (1, kv_heads, virtual tokens, head width), or None."""
        return None

    def extra_loss(self) -> mx.array | None:
        """The method's own loss of its parameters, beside the task's."""
        return None

    def learning_from(self, examples: Sequence[int]) -> AbstractContextManager[None]:
        """While gradients are taken of these training examples (an adapter made of examples leaves them out)."""
        return nullcontext()

    def before_step(self, step: int) -> None:
        """Called with the zero-based step before it is taken (a prefix behind a gate opens here)."""

    def after_step(self, step: int, gradients: dict[str, Any]) -> None:
        """Called with the zero-based step and the flat gradients of `module` (AdaLoRA prunes here)."""

    def lowest_layer(self) -> int:
        """Index of the lowest transformer layer whose output the adapter changes: below it the trunk can be cached."""
        return 0

    def merge(self, model: nn.Module) -> None:
        """Fold the adapter into the base weights, where the method can be merged."""
        raise NotImplementedError
