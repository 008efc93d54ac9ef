"""P-tuning (Liu et al. 2021, arXiv:2103.10385): virtual tokens made by a small trained encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from metapeft.peft.base import MethodConfig
from metapeft.peft.virtual import VirtualTokens
from metapeft.runtime import mx, nn


@dataclass(frozen=True)
class PTuningConfig(MethodConfig):
    """`width` is the hidden width of the encoder."""

    method: ClassVar[str] = "p_tuning"
    tokens: int = 20
    encoder: Literal["mlp", "lstm"] = "mlp"
    width: int = 128


class MLPEncoder(nn.Module):
    """Embedding -> Linear -> ReLU -> Linear -> ReLU -> Linear."""

    def __init__(self, embedding: mx.array, width: int):
        super().__init__()
        tokens_width = embedding.shape[1]
        self.embedding = embedding
        self.layers = [nn.Linear(tokens_width, width), nn.Linear(width, width), nn.Linear(width, tokens_width)]

    def __call__(self) -> mx.array:
        first, second, third = self.layers
        return third(nn.relu(second(nn.relu(first(self.embedding)))))


class LSTMEncoder(nn.Module):
    """Embedding -> two-layer bidirectional LSTM -> Linear -> ReLU -> Linear."""

    def __init__(self, embedding: mx.array, width: int):
        super().__init__()
        tokens_width = embedding.shape[1]
        self.embedding = embedding
        self.forward_layers = [nn.LSTM(tokens_width, width), nn.LSTM(2 * width, width)]
        self.backward_layers = [nn.LSTM(tokens_width, width), nn.LSTM(2 * width, width)]
        self.layers = [nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, tokens_width)]

    def __call__(self) -> mx.array:
        x = self.embedding
        for ahead, back in zip(self.forward_layers, self.backward_layers, strict=True):
            x = mx.concatenate([ahead(x)[0], back(x[::-1])[0][::-1]], axis=-1)
        first, second = self.layers
        return second(nn.relu(first(x)))


def create(config: PTuningConfig, seed: int, width: int, scale: float) -> VirtualTokens:
    """A fresh encoder. width, scale: width and standard deviation of the backbone's own token embeddings.

    The last layer is scaled so that the first virtual tokens are as large as real ones: with the usual initialisation
    they start far too small or large for the backbone and the first steps are lost (or diverge).
    """
    mx.random.seed(seed)
    embedding = mx.random.normal((config.tokens, width))
    module = MLPEncoder(embedding, config.width) if config.encoder == "mlp" else LSTMEncoder(embedding, config.width)
    factor = scale / mx.maximum(mx.std(module()), 1e-6)
    last = module.layers[-1]
    last.weight, last.bias = last.weight * factor, last.bias * factor
    mx.eval(module.parameters())
    return VirtualTokens(config, module)
