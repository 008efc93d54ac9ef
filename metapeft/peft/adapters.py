"""Adapters on disk and in use: saving one, loading one onto a model, and a model that carries its adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from metapeft.backbones.forward import PrefixCache, keys_values, width
from metapeft.errors import UserError
from metapeft.peft import adalora, checkpoints, lora
from metapeft.peft.adalora import AdaLoRA, AdaLoRAConfig
from metapeft.peft.base import Adapter
from metapeft.peft.lora import LoRAConfig, MatrixAdapter
from metapeft.peft.matrices import linear_layers, shape
from metapeft.peft.prefix import Prefix, PrefixConfig, one_shape
from metapeft.peft.saved import ROOT, Saved, layer_of, renamed, within_layer
from metapeft.peft.stack import Stack
from metapeft.peft.virtual import Table, VirtualTokens
from metapeft.runtime import mx, nn


def save(adapter: Adapter, folder: Path, metadata: dict[str, Any]) -> None:
    """Writes an adapter folder (Hugging Face PEFT format plus metapeft.json and a manifest), replacing an older one."""
    checkpoints.write(folder, take(adapter, metadata))


def take(adapter: Adapter, metadata: dict[str, Any]) -> Saved:
    """An adapter's present weights as data; encoders are reduced to the virtual tokens they make."""
    if isinstance(adapter, Stack):
        return replace(take(adapter.matrices, metadata), virtual=take(adapter.virtual, {}))
    if isinstance(adapter, AdaLoRA):
        # A rank is in force where E is not zero: `kept` may be newer than restored best weights.
        deltas = adapter.deltas if adapter.kept is not None else {}
        masks = {path: (delta.e[:, 0] != 0).tolist() for path, delta in deltas.items()}
        return Saved(adapter.config, adalora.tensors(adapter), metadata, rank_pattern=masks)
    if isinstance(adapter, MatrixAdapter):
        return Saved(adapter.config, lora.tensors(adapter), metadata)
    if isinstance(adapter, Prefix):
        metadata = metadata | {"layers": len(adapter.kv_heads), "kv_heads": adapter.kv_heads[0]}
    return Saved(adapter.config, {"prompt_embeddings": adapter.module()}, metadata)


def load(folder: Path, model: nn.Module) -> Adapter:
    """The adapter of a folder in any format that `checkpoints.read` knows, in float32, not yet attached.

    Raises UserError when the folder is damaged or was made for another backbone.
    """
    return build(checkpoints.read(folder), model, str(folder))


def build(saved: Saved, model: nn.Module, name: str = "the adapter") -> Adapter:
    """An adapter for `model`, in float32, not yet attached. Raises UserError, naming `name`, when it does not fit."""
    config = saved.config
    if saved.virtual is not None:
        matrices, virtual = build(replace(saved, virtual=None), model, name), build(saved.virtual, model, name)
        assert isinstance(matrices, MatrixAdapter)
        return Stack(matrices, virtual)
    if isinstance(config, LoRAConfig | AdaLoRAConfig):
        saved = renamed(saved, _own_names(saved, model, name))
        config = saved.config
    if isinstance(config, LoRAConfig):
        return lora.from_tensors(config, _fitted(saved, model, name))
    if isinstance(config, AdaLoRAConfig):
        adapter = adalora.from_tensors(config, _fitted(saved, model, name))
        masks = {path: mx.array(mask)[:, None] for path, mask in saved.rank_pattern.items()}
        whole = mx.ones((config.initial_rank, 1), dtype=mx.bool_)  # of a module that lost no rank
        adapter.kept = {path: masks.get(path, whole) for path in adapter.deltas} if masks else None
        return adapter
    table = saved.tensors["prompt_embeddings"].astype(mx.float32)
    if isinstance(config, PrefixConfig):
        return _prefix(config, saved, table, model, name)
    if table.shape[1] != width(model):
        raise UserError(
            f"{name} was made for another backbone: its tokens are {table.shape[1]} wide, this one's {width(model)}"
        )
    return VirtualTokens(config, Table(table))


def _own_names(saved: Saved, model: nn.Module, name: str) -> dict[str, str]:
    """The adapter's module paths -> what this model calls them."""
    layers = linear_layers(model)
    by_place = {_place(path): path for path in layers}
    found = {}
    for path in saved.modules():
        own = path if path in layers else by_place.get(_place(path))
        if own is None:
            raise UserError(f"{name} adapts {path}, which is no linear layer of this backbone's transformer layers")
        found[path] = own
    return found


def _fitted(saved: Saved, model: nn.Module, name: str) -> dict[str, mx.array]:
    """The tensors in float32, checked against the model's linear layers; AdaLoRA's at full rank."""
    layers = linear_layers(model)
    suffix = "" if isinstance(saved.config, AdaLoRAConfig) else ".weight"
    tensors: dict[str, mx.array] = {}
    for path, parts in saved.modules().items():
        outputs, inputs = shape(layers[path])
        found = (int(parts["B"].shape[0]), int(parts["A"].shape[1]))
        if found != (outputs, inputs):
            raise UserError(
                f"{name} was made for another backbone: its {path} is {found[1]} -> {found[0]},"
                f" this one's {inputs} -> {outputs}"
            )
        if mask := saved.rank_pattern.get(path):
            parts = _full_rank(parts, mask)
        tensors |= {f"{ROOT}{path}.lora_{part}{suffix}": value.astype(mx.float32) for part, value in parts.items()}
    return tensors


def _place(path: str) -> tuple[int | None, str]:
    """Where a module is, whatever an implementation calls the way there: (layer, path within it)."""
    return layer_of(path), within_layer(path)


def _full_rank(parts: dict[str, mx.array], mask: list[bool]) -> dict[str, mx.array]:
    """Trimmed AdaLoRA matrices with zeros where ranks were removed, so that each rank is where its mask says."""
    if parts["A"].shape[0] == len(mask):
        return parts
    kept = mx.array([index for index, keep in enumerate(mask) if keep], dtype=mx.int32)
    full = {}
    for part, value in parts.items():
        rows = mx.zeros((len(mask), value.shape[0] if part == "B" else value.shape[1]), dtype=value.dtype)
        rows = rows.at[kept].add(value.T if part == "B" else value) if kept.size else rows
        full[part] = rows.T if part == "B" else rows
    return full


def _prefix(config: PrefixConfig, saved: Saved, table: mx.array, model: nn.Module, name: str) -> Adapter:
    real = keys_values(model, mx.array([[0]]))
    heads, head_width = one_shape(real)
    expected = (len(real), heads, 2 * len(real) * heads * head_width)
    found = (saved.metadata.get("layers"), saved.metadata.get("kv_heads"), int(table.shape[1]))
    if found != expected:
        raise UserError(
            f"{name} was made for another backbone: (layers, key-value heads, width) are {found}, this one's {expected}"
        )
    return Prefix(config, Table(table), [heads] * len(real), head_width)


class Prefixed(nn.Module):
    """A model whose every sequence attends to an adapter's virtual tokens first. Logits are for the real tokens only.

    With mlx_lm.generate the key-value cache starts filled with the virtual tokens.
    """

    def __init__(self, model: nn.Module, prefix: list[tuple[mx.array, mx.array]]):
        super().__init__()
        self.inner = model
        object.__setattr__(self, "virtual", prefix)

    def __call__(self, inputs: mx.array, cache: Any = None, **kwargs: Any) -> mx.array:
        if cache is None:
            cache = [PrefixCache(keys, values) for keys, values in self.virtual]
        return self.inner(inputs, cache=cache, **kwargs)

    def make_cache(self) -> list[Any]:
        from mlx_lm.models.cache import make_prompt_cache

        caches = make_prompt_cache(self.inner)
        for cache, (keys, values) in zip(caches, self.virtual, strict=True):
            cache.update_and_fetch(keys, values)
        return list(caches)

    @property
    def layers(self) -> Any:
        return self.inner.layers

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            return super().__getattr__(name)
        return getattr(self.inner, name)


def with_adapter(model: nn.Module, adapter: Adapter) -> nn.Module:
    """`model` carrying `adapter` (attached in place): called like any mlx-lm model."""
    adapter.attach(model)
    prefix = adapter.prefix(model)
    if prefix is None:
        return model
    mx.eval(prefix)
    return Prefixed(model, prefix)
