"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): trained embeddings in front of the input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from metapeft.peft.base import MethodConfig
from metapeft.peft.virtual import Table, VirtualTokens, embed, repeat_to
from metapeft.runtime import mx, nn


@dataclass(frozen=True)
class PromptConfig(MethodConfig):
    """`initialisation`: the embeddings of a text, of random vocabulary entries, or random numbers of the same size."""

    method: ClassVar[str] = "prompt"
    tokens: int = 20
    initialisation: Literal["text", "vocabulary", "random"] = "text"
    text: str = ""


def create(
    config: PromptConfig, model: nn.Module, seed: int, text_ids: Sequence[int], vocabulary: int
) -> VirtualTokens:
    """A fresh prompt. text_ids: what "text" starts from, cut or repeated; vocabulary: tokens to sample from."""
    key = mx.random.key(seed)
    sample = embed(model, mx.random.randint(0, vocabulary, (max(config.tokens, 256),), key=key))
    if config.initialisation == "text":
        value = embed(model, repeat_to(text_ids, config.tokens))
    elif config.initialisation == "vocabulary":
        value = sample[: config.tokens]
    else:
        value = mx.std(sample) * mx.random.normal((config.tokens, sample.shape[1]), key=key)
    return VirtualTokens(config, Table(value))
