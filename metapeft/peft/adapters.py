"""Adapters on disk and in use: saving one, loading one onto a model, and a model that carries its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metapeft.backbones.forward import PrefixCache, keys_values
from metapeft.errors import UserError
from metapeft.peft import adalora, checkpoints, lora
from metapeft.peft.adalora import AdaLoRA, AdaLoRAConfig
from metapeft.peft.base import Adapter
from metapeft.peft.lora import LoRAConfig, MatrixAdapter
from metapeft.peft.matrices import linear_layers, shape
from metapeft.peft.prefix import Prefix, PrefixConfig
from metapeft.peft.virtual import Table, VirtualTokens
from metapeft.runtime import mx, nn


def tensors(adapter: Adapter) -> dict[str, mx.array]:
    """What is stored, under Hugging Face PEFT's names; encoders are reduced to the virtual tokens they make."""
    if isinstance(adapter, AdaLoRA):
        return adalora.tensors(adapter)
    if isinstance(adapter, MatrixAdapter):
        return lora.tensors(adapter)
    return {"prompt_embeddings": adapter.module()}


def save(adapter: Adapter, folder: Path, metadata: dict[str, Any]) -> None:
    """Writes an adapter folder (Hugging Face PEFT format plus metapeft.json and a manifest), replacing an older one."""
    checkpoints.write(folder, adapter.config, tensors(adapter), metadata)


def load(folder: Path, model: nn.Module) -> Adapter:
    """The adapter of a folder in any format that `checkpoints.read` knows, not yet attached.

    Raises UserError when the folder is damaged or does not fit the model.
    """
    saved = checkpoints.read(folder)
    weights = {name: mx.array(value).astype(mx.float32) for name, value in saved.tensors.items()}
    if isinstance(saved.config, LoRAConfig | AdaLoRAConfig):
        build: Any = lora.from_tensors if isinstance(saved.config, LoRAConfig) else adalora.from_tensors
        adapter: MatrixAdapter = build(saved.config, weights)
        _check_matrices(adapter, model, folder)
        return adapter
    value = weights["prompt_embeddings"]
    probe = keys_values(model, mx.array([[0]]))
    heads, _, head_width = probe[0][0].shape[1:]
    if isinstance(saved.config, PrefixConfig):
        expected = 2 * len(probe) * heads * head_width
        if value.shape[1] != expected:
            raise UserError(f"adapter {folder} does not fit the backbone: its prefix is {value.shape[1]} wide, not {expected}")
        return Prefix(saved.config, Table(value), [heads] * len(probe), head_width)
    from metapeft.backbones.forward import width

    if value.shape[1] != width(model):
        raise UserError(f"adapter {folder} does not fit the backbone: it is {value.shape[1]} wide, not {width(model)}")
    return VirtualTokens(saved.config, Table(value))


def _check_matrices(adapter: MatrixAdapter, model: nn.Module, folder: Path) -> None:
    found = linear_layers(model)
    for path, delta in adapter.deltas.items():
        if path not in found:
            raise UserError(f"adapter {folder} does not fit the backbone: it changes {path}, which is not a linear layer there")
        outputs, inputs = shape(found[path])
        if (delta.b.shape[0], delta.a.shape[1]) != (outputs, inputs):
            raise UserError(
                f"adapter {folder} does not fit the backbone: {path} is {outputs}x{inputs} there, "
                f"{delta.b.shape[0]}x{delta.a.shape[1]} in the adapter"
            )


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
