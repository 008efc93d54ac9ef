"""Running part of a backbone: from embeddings or a middle layer, with a prefix, with logits at chosen positions only.

mlx-lm has one file per architecture, each with its own `__call__`. Instead of rewriting them, `run` swaps, for the
duration of one call, the embedding, the list of layers and the last norm of the model's body for small stand-ins. That
keeps every architecture's own details (embedding scale, masks, logit soft-capping) and works for any model whose body
is "embed, then `for layer, cache in zip(layers, cache): h = layer(h, mask, cache)`, then norm".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from metapeft.backbones.activations import vectorised
from metapeft.errors import UserError
from metapeft.runtime import mx, nn


@dataclass(frozen=True)
class Anatomy:
    """Where a model keeps its parts. `body` owns the attributes named by the three strings."""

    body: nn.Module
    embed: str
    layers: str
    norm: str

    @property
    def depth(self) -> int:
        return len(getattr(self.body, self.layers))


_NAMES = (("embed_tokens", "layers", "norm"), ("wte", "h", "ln_f"), ("word_embeddings", "layers", "norm"))


def anatomy(model: nn.Module) -> Anatomy:
    """Finds embedding, layers and last norm. Raises UserError naming the architecture when it is not of that shape."""
    candidates = [model]
    for name in ("model", "language_model", "transformer"):
        candidates += [getattr(c, name) for c in list(candidates) if isinstance(getattr(c, name, None), nn.Module)]
    for body in reversed(candidates):
        for embed, layers, norm in _NAMES:
            if embed in body and layers in body and norm in body:
                return Anatomy(body, embed, layers, norm)
    kind = getattr(model, "model_type", type(model).__name__)
    raise UserError(f"architecture {kind} is not supported: its embedding, layers and last norm were not found")


def precision(model: nn.Module) -> mx.Dtype:
    """What the model computes in."""
    parts = anatomy(model)
    found: mx.Dtype = getattr(parts.body, parts.norm)["weight"].dtype
    return found


def width(model: nn.Module) -> int:
    """Width of the hidden state, whatever the precision or quantization of the embedding."""
    parts = anatomy(model)
    return int(getattr(parts.body, parts.embed)(mx.array([[0]])).shape[-1])


CLOSED = 1e-26  # the weight that counts as zero
Prefix = list[tuple[mx.array, mx.array]]  # per layer keys and values, each (1, kv_heads, tokens, head width)


class Gated(list[tuple[mx.array, mx.array]]):
    """A prefix whose first `tokens` weigh only `weight` (0 to 1) of what they would in the softmax: with 0 it is as if
    they were not there. dtype: what the model computes in, which a mask must have."""

    def __init__(self, layers: Prefix, tokens: int, weight: float, dtype: mx.Dtype):
        super().__init__(layers)
        self.tokens, self.weight, self.dtype = tokens, weight, dtype

    def like(self, layers: Prefix) -> Gated:
        """The same gate before other keys and values."""
        return Gated(layers, self.tokens, self.weight, self.dtype)

    @property
    def bias(self) -> float:
        """What is added to their logits."""
        return math.log(max(self.weight, CLOSED))


def caches(prefix: Prefix) -> list[PrefixCache]:
    gate = prefix if isinstance(prefix, Gated) else None
    return [PrefixCache(keys, values, gate) for keys, values in prefix]


class PrefixCache:
    """Keys and values that every token of the batch attends to before its own. Gradients flow into them."""

    gate: Gated | None = None

    def __init__(self, keys: mx.array, values: mx.array, gate: Gated | None = None):
        self.prefix = (keys, values)  # (1 or batch, kv_heads, virtual tokens, head width)
        self.gate = gate
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset: int = keys.shape[2]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.keys is None or self.values is None:
            first_keys, first_values = self.prefix
            batch = keys.shape[0]
            self.keys = mx.broadcast_to(first_keys, (batch, *first_keys.shape[1:])).astype(keys.dtype)
            self.values = mx.broadcast_to(first_values, (batch, *first_values.shape[1:])).astype(values.dtype)
        self.keys = mx.concatenate([self.keys, keys], axis=2)
        self.values = mx.concatenate([self.values, values], axis=2)
        self.offset = self.keys.shape[2]
        return self.keys, self.values

    def held(self) -> tuple[mx.array, mx.array]:
        """Keys and values so far, (batch, kv_heads, tokens, head width) each; something must have been fetched."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        if self.gate is not None:
            closed = mx.where(_causal(n, self.offset, window_size), 0.0, -mx.inf)
            closed[:, : self.gate.tokens] += self.gate.bias
            return closed.astype(self.gate.dtype)
        if n == 1 and not return_array and window_size is None:
            return None
        if return_array or window_size is not None:
            return _causal(n, self.offset, window_size)
        return "causal"


class RecordingCache(PrefixCache):
    """An empty prefix that keeps what passes through it: the keys and values of the tokens of this call."""

    def __init__(self) -> None:
        self.keys = self.values = None
        self.offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values, self.offset = keys, values, keys.shape[2]
        return keys, values


def _causal(n: int, offset: int, window_size: int | None) -> mx.array:
    columns = mx.arange(offset + n)[None]
    rows = mx.arange(offset, offset + n)[:, None]
    mask = rows >= columns
    return mask if window_size is None else mask & (rows < columns + window_size)


class _Embedding(nn.Module):
    """Gives ready embeddings in place of a look-up; still usable as the output head of tied models."""

    def __init__(self, base: nn.Module, value: mx.array):
        super().__init__()
        self._base, self._value = base, value

    def __call__(self, ids: mx.array) -> mx.array:
        return self._value.reshape(self._value.shape)  # an array of its own: GPT-2 adds to it in place

    def as_linear(self, x: mx.array) -> mx.array:
        return self._base.as_linear(x)


class _Layer(nn.Module):
    """Stands for a layer that is not run: passes its input on, or gives the hidden state that was computed before."""

    def __init__(self, base: nn.Module, hidden: mx.array | None = None):
        super().__init__()
        object.__setattr__(self, "_stand_in", (base, hidden))

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        hidden = self._stand_in[1]
        return x if hidden is None else hidden

    def __getattr__(self, name: str) -> Any:  # models read flags such as `use_sliding` from their layers
        return getattr(self._stand_in[0], name)


class _Norm(nn.Module):
    """The last norm on chosen rows only, or no norm at all."""

    def __init__(self, base: nn.Module | None, rows: mx.array | None):
        super().__init__()
        self._base = base
        object.__setattr__(self, "_rows", rows)

    def __call__(self, x: mx.array) -> mx.array:
        if self._rows is not None:
            x = x.reshape(-1, x.shape[-1])[self._rows][None]
        return x if self._base is None else self._base(x)


class _Checkpointed(nn.Module):
    """Recomputes the layer in the backward pass instead of keeping its activations."""

    def __init__(self, base: nn.Module):
        super().__init__()
        object.__setattr__(self, "_stand_in", base)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None, **kwargs: Any) -> mx.array:
        base = self._stand_in

        def forward(parameters: Any, x: mx.array, prefix: Any) -> mx.array:
            base.update(parameters)
            with vectorised():  # also when the backward pass calls it again
                return base(x, mask, cache=None if prefix is None else PrefixCache(*prefix), **kwargs)

        before = base.trainable_parameters()
        out = mx.checkpoint(forward)(before, x, None if cache is None else cache.prefix)
        base.update(before)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stand_in, name)


def run(
    model: nn.Module,
    ids: mx.array,
    *,
    embeddings: mx.array | None = None,
    cache: Sequence[Any] | None = None,
    rows: mx.array | None = None,
    start: int = 0,
    hidden: mx.array | None = None,
    stop: int | None = None,
    logits: bool = True,
    checkpoint: bool = False,
) -> mx.array:
    """Runs layers [start, stop) of `model` and returns logits, or the hidden state before the last norm.

    ids: (batch, tokens); only their shape matters when `embeddings` (batch, tokens, width) or `hidden` (the input of
    layer `start`, same shape) is given. rows: indices into the flattened (batch * tokens) positions; the result is then
    (1, len(rows), …) instead of (batch, tokens, …). `checkpoint` trades time for memory in the backward pass.
    """
    parts = anatomy(model)
    body = parts.body
    embed, layers, norm = (getattr(body, name) for name in (parts.embed, parts.layers, parts.norm))
    stop = len(layers) if stop is None else stop
    chosen = [_Checkpointed(layer) if checkpoint else layer for layer in layers]
    for index in range(len(layers)):
        if index < start or index >= stop:
            chosen[index] = _Layer(layers[index], hidden if index == 0 and start > 0 else None)
    try:
        setattr(body, parts.layers, chosen)
        setattr(body, parts.norm, _Norm(norm if logits else None, rows))
        if embeddings is not None:
            setattr(body, parts.embed, _Embedding(embed, embeddings))
        arguments = {} if cache is None else {"cache": list(cache)}
        with vectorised():
            out = (model if logits else body)(ids, **arguments)
        return out.logits if hasattr(out, "logits") else out
    finally:
        setattr(body, parts.embed, embed)
        setattr(body, parts.layers, layers)
        setattr(body, parts.norm, norm)


def extended(
    model: nn.Module, prefix: Prefix | None, ids: Sequence[int], start: int, hidden: mx.array | None
) -> Prefix:
    """`prefix`, then the keys and values of `ids`, from layer `start` on (`hidden`: that layer's input, if not 0)."""
    depth = anatomy(model).depth
    before = [RecordingCache() for _ in range(depth)] if prefix is None else caches(prefix)
    run(model, mx.array([list(ids)]), cache=before, start=start, hidden=hidden, logits=False)
    # Layers that were not run hold nothing; masks still read the length from them.
    held = [before[max(i, start)].held() for i in range(depth)]
    return prefix.like(held) if isinstance(prefix, Gated) else held


def keys_values(model: nn.Module, ids: mx.array, embeddings: mx.array | None = None) -> Prefix:
    """Per layer (keys, values) of a sequence, each (batch, kv_heads, tokens, head width), position-encoded from 0."""
    empty = [RecordingCache() for _ in range(anatomy(model).depth)]
    run(model, ids, embeddings=embeddings, cache=empty, logits=False)
    return [cache.held() for cache in empty]
