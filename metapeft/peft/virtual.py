"""What the prompt-like methods share: trained keys and values in front of every sequence.

Attention is causal and the virtual tokens come first, so their hidden states are the same for every example of a batch:
they are computed once per step and shared, which is the same mathematics as prepending them to each example.
"""

from __future__ import annotations

from collections.abc import Sequence

from metapeft.backbones.forward import anatomy, keys_values
from metapeft.peft.base import Adapter, MethodConfig
from metapeft.runtime import mx, nn


class VirtualTokens(Adapter):
    """Prompt tuning and P-tuning: `module()` gives embeddings (tokens, width) that are run through the backbone."""

    def __init__(self, config: MethodConfig, module: nn.Module):
        self.config = config
        self.module = module

    def attach(self, model: nn.Module) -> None:
        model.freeze()

    def detach(self, model: nn.Module) -> None:
        pass

    def embeddings(self) -> mx.array:
        """(tokens, width)"""
        return self.module()

    def prefix(self, model: nn.Module) -> list[tuple[mx.array, mx.array]]:
        embeddings = self.embeddings()[None]
        return keys_values(model, mx.zeros(embeddings.shape[:2], dtype=mx.int32), embeddings)


class Table(nn.Module):
    """A trained (tokens, width) table."""

    def __init__(self, value: mx.array):
        super().__init__()
        self.value = value

    def __call__(self) -> mx.array:
        return self.value


def embed(model: nn.Module, ids: Sequence[int]) -> mx.array:
    """Embeddings of real tokens, (tokens, width), float32."""
    parts = anatomy(model)
    return getattr(parts.body, parts.embed)(mx.array([list(ids)]))[0].astype(mx.float32)


def repeat_to(ids: Sequence[int], length: int) -> list[int]:
    """`ids` cut or repeated to `length`."""
    return [ids[i % len(ids)] for i in range(length)]
