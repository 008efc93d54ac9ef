"""Trained adapters as starts for new ones: in the forms that training goes on from, averaged, and mixed.

AdaLoRA goes on as LoRA (its singular values folded in), P-tuning as prompt tuning (its encoder's output). Several LoRAs
add up exactly to one whose matrices are theirs side by side; a singular value decomposition brings its rank down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from metapeft.errors import UserError
from metapeft.peft.adalora import AdaLoRAConfig
from metapeft.peft.lora import LoRAConfig, pattern
from metapeft.peft.p_tuning import PTuningConfig
from metapeft.peft.prefix import PrefixConfig
from metapeft.peft.prompt import PromptConfig
from metapeft.peft.saved import ROOT, Saved
from metapeft.runtime import mx

RANK = 16  # of a mixture, at most
Factors = dict[str, tuple[np.ndarray, np.ndarray]]  # module path -> B (outputs, rank), A (rank, inputs): the change B A


def start_method(method: str) -> str:
    """The method that training goes on with."""
    return {"adalora": "lora", "p_tuning": "prompt"}.get(method, method)


def start(saved: Saved) -> Saved:
    """The adapter in float32 and in a form that training goes on from: LoRA, prompt tuning or prefix tuning."""
    if isinstance(saved.config, AdaLoRAConfig):
        return from_factors(factors(saved), layers=saved.config.layers)
    tensors = {name: value.astype(mx.float32) for name, value in saved.tensors.items()}
    if isinstance(saved.config, PTuningConfig):
        tokens = int(tensors["prompt_embeddings"].shape[0])
        return replace(saved, config=PromptConfig(tokens=tokens, initialisation="random"), tensors=tensors)
    if isinstance(saved.config, PrefixConfig):
        return replace(saved, config=replace(saved.config, projection=0), tensors=tensors)
    return replace(saved, tensors=tensors)


def average(saved: Sequence[Saved], weights: Sequence[float]) -> Saved:
    """The weighted sum of adapters of one method: of the changes they make, where they change matrices, else of their
    virtual tokens. Raises UserError when they do not match."""
    if all(isinstance(s.config, LoRAConfig | AdaLoRAConfig) for s in saved):
        return from_factors(mixed([factors(s) for s in saved], weights), layers=top_layers(saved))
    tables = [s.tensors["prompt_embeddings"] for s in saved if "prompt_embeddings" in s.tensors]
    if len({(s.config.method, t.shape) for s, t in zip(saved, tables, strict=False)}) != 1 or len(tables) < len(saved):
        raise UserError("only adapters of one method, with as many virtual tokens, can be averaged")
    summed = sum((w * t.astype(mx.float32) for w, t in zip(weights, tables, strict=True)), mx.array(0.0))
    return start(replace(saved[0], tensors={"prompt_embeddings": summed}))


def top_layers(saved: Sequence[Saved]) -> int:
    """How many top layers some of these change (0: all)."""
    layers = [s.config.layers for s in saved if isinstance(s.config, LoRAConfig | AdaLoRAConfig)]
    return 0 if 0 in layers else max(layers)


def factors(saved: Saved) -> Factors:
    """What a LoRA or AdaLoRA changes, module by module. Raises UserError for other methods."""
    config = saved.config
    found: Factors = {}
    for path, parts in saved.modules().items():
        a, b = (np.array(parts[name].astype(mx.float32), dtype=np.float64) for name in "AB")
        if isinstance(config, AdaLoRAConfig):
            a = a * np.array(parts["E"].astype(mx.float32), dtype=np.float64)
            scale = config.alpha / (config.initial_rank + 1e-5)
        elif isinstance(config, LoRAConfig):
            alpha = pattern(config.alpha_pattern, path, config.alpha)
            scale = alpha / len(a) ** (0.5 if config.rslora else 1.0)
        found[path] = (b * scale, a)
    if not found:
        raise UserError(f"{config.method} changes no matrices; only LoRA and AdaLoRA can be mixed")
    return found


def mixed(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The weighted sum of changes; a module that only some of them change is changed by those."""
    summed: Factors = {}
    for path in sorted({path for part in parts for path in part}):
        here = [(w, part[path]) for w, part in zip(weights, parts, strict=True) if path in part]
        b = np.concatenate([w * b for w, (b, _) in here], axis=1)
        summed[path] = (b, np.concatenate([a for _, (_, a) in here]))
    return summed


def owners(parts: Sequence[Factors]) -> dict[str, np.ndarray]:
    """Which part each rank of `mixed` is from, module by module: (ranks,)."""
    paths = {path for part in parts for path in part}
    counts = {path: [len(part[path][1]) if path in part else 0 for part in parts] for path in paths}
    return {path: np.repeat(np.arange(len(parts)), count) for path, count in counts.items()}


def whole(given: Factors, layers: int = 0) -> Saved:
    """A LoRA that makes exactly this change, at whatever rank it has."""
    rank = max(len(a) for _, a in given.values())
    return _lora({path: _padded(b, a, rank) for path, (b, a) in given.items()}, rank, layers)


def from_factors(given: Factors, rank: int = RANK, layers: int = 0) -> Saved:
    """A LoRA that makes the same change, as nearly as its rank allows (Eckart and Young 1936), both matrices of one
    size. The rank is that of the fullest module, at most `rank`. layers: how many top layers the modules are (0: all).
    """
    rank = min(rank, max(len(a) for _, a in given.values()))
    found: Factors = {}
    for path, (b, a) in given.items():
        left, right = np.linalg.qr(b), np.linalg.qr(a.T)
        u, values, v = np.linalg.svd(left.R @ right.R.T, full_matrices=False)
        root = np.sqrt(values)
        found[path] = _padded((left.Q @ u * root)[:, :rank], ((right.Q @ v.T) * root).T[:rank], rank)
    return _lora(found, rank, layers)


def _padded(b: np.ndarray, a: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    missing = rank - len(a)
    return np.pad(b, ((0, 0), (0, missing))), np.pad(a, ((0, missing), (0, 0)))


def _lora(given: Factors, rank: int, layers: int) -> Saved:
    tensors: dict[str, mx.array] = {}
    for path, (b, a) in given.items():
        tensors[f"{ROOT}{path}.lora_A.weight"] = mx.array(a.astype(np.float32))
        tensors[f"{ROOT}{path}.lora_B.weight"] = mx.array(b.astype(np.float32))
    return Saved(LoRAConfig(rank=rank, alpha=float(rank), layers=layers), tensors)
