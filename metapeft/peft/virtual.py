"""What the prompt-like methods share: trained keys and values in front of every sequence.

Attention is causal and the virtual tokens come first, so their hidden states are the same for every example of a batch:
they are computed once per step and shared, which is the same mathematics as prepending them to each example.
"""

from __future__ import annotations

from collections.abc import Sequence

from metapeft.backbones.forward import anatomy, keys_values, run
from metapeft.peft.base import Adapter, MethodConfig
from metapeft.runtime import mx, nn


class VirtualTokens(Adapter):
    """Prompt tuning and P-tuning: `module()` gives embeddings (tokens, width) that are run through the backbone.

    They are what Hugging Face's embedding layer would give: for Gemma that includes its scaling (see `scale`).
    """

    def __init__(self, config: MethodConfig, module: nn.Module):
        self.config = config
        self.module = module
        self._scale: float | None = None

    def attach(self, model: nn.Module) -> None:
        model.freeze()
        self._scale = scale(model)

    def detach(self, model: nn.Module) -> None:
        pass

    def embeddings(self) -> mx.array:
        """(tokens, width)"""
        return self.module()

    def prefix(self, model: nn.Module) -> list[tuple[mx.array, mx.array]]:
        assert self._scale is not None, "attach comes before prefix"
        embeddings = self.embeddings()[None] / self._scale
        return keys_values(model, mx.zeros(embeddings.shape[:2], dtype=mx.int32), embeddings)


class Table(nn.Module):
    """A trained (tokens, width) table."""

    def __init__(self, value: mx.array):
        super().__init__()
        self.value = value

    def __call__(self) -> mx.array:
        return self.value


def embed(model: nn.Module, ids: Sequence[int] | mx.array) -> mx.array:
    """Embeddings of real tokens, (tokens, width), float32."""
    return _looked_up(model, ids) * scale(model)


def scale(model: nn.Module) -> float:
    """What mlx-lm multiplies embeddings by after looking them up, where Hugging Face's embedding layer already does.

    That is Gemma's square root of the width, as mlx-lm rounds it; 1 for every other architecture.
    """
    if not str(getattr(model, "model_type", "")).startswith("gemma"):
        return 1.0
    before = _looked_up(model, [0])
    after = run(model, mx.array([[0]]), stop=0, logits=False)[0].astype(mx.float32)
    largest = int(mx.argmax(mx.abs(before)))
    return float(after.flatten()[largest] / before.flatten()[largest])


def _looked_up(model: nn.Module, ids: Sequence[int] | mx.array) -> mx.array:
    parts = anatomy(model)
    row = ids if isinstance(ids, mx.array) else mx.array(list(ids))
    return getattr(parts.body, parts.embed)(row[None])[0].astype(mx.float32)


def repeat_to(ids: Sequence[int], length: int) -> list[int]:
    """`ids` cut or repeated to `length`."""
    return [ids[i % len(ids)] for i in range(length)]
