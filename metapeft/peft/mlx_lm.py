"""mlx-lm's LoRA adapters: `adapters.safetensors` with `PATH.lora_a` (inputs, rank) and `.lora_b` (rank, outputs).

mlx-lm knows one rank and one scale for the whole adapter and applies them to the named modules of the top layers. What
does not fit is rewritten without changing the result: smaller ranks are padded with zeros, differing scales move into
`lora_b`, AdaLoRA's E into `lora_a`. Modules that are named but have no tensors stay as they are (`lora_b` starts at 0).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metapeft.errors import UserError
from metapeft.peft import huggingface, tensor_file
from metapeft.peft.adalora import AdaLoRAConfig
from metapeft.peft.lora import LoRAConfig, pattern
from metapeft.peft.saved import ROOT, Saved, layer_of, within_layer
from metapeft.runtime import mx
from metapeft.settings import brief

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings")


def encode(saved: Saved) -> dict[str, bytes]:
    """The two files of an mlx-lm adapter folder, by name. Raises UserError for methods that mlx-lm does not have."""
    config = saved.config
    if not isinstance(config, LoRAConfig | AdaLoRAConfig):
        raise UserError(f"mlx-lm has no {config.method} adapters; export this one with --to peft")
    low_rank = {path: _low_rank(saved, path, parts) for path, parts in _matrices(saved).items()}
    rank = max(1, *(a.shape[0] for a, _, _ in low_rank.values()))
    scale = Counter(scale for _, _, scale in low_rank.values()).most_common(1)[0][0]
    tensors = {}
    for path, (a, b, own) in low_rank.items():
        missing = rank - a.shape[0]
        tensors[f"{path}.lora_a"] = mx.pad(a.T, [(0, 0), (0, missing)])
        tensors[f"{path}.lora_b"] = mx.pad((b if own == scale else b * (own / scale)).T, [(0, missing), (0, 0)])
    lowest = min((layer for path in low_rank if (layer := layer_of(path)) is not None), default=0)
    depth = saved.metadata.get("layers")
    settings = {
        "fine_tune_type": "lora",
        "model": saved.metadata.get("backbone") or "",
        "num_layers": int(depth) - lowest if depth else -1,  # -1: every layer
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": config.dropout,
            "keys": sorted({within_layer(path) for path in low_rank}),
        },
    }
    return {WEIGHTS: tensor_file.encode(tensors), CONFIG: json.dumps(settings, indent=2, sort_keys=True).encode()}


def _matrices(saved: Saved) -> dict[str, dict[str, mx.array]]:
    if isinstance(saved.config, AdaLoRAConfig):
        saved = Saved(saved.config, huggingface.trimmed(saved))
    return saved.modules()


def _low_rank(saved: Saved, path: str, parts: Mapping[str, mx.array]) -> tuple[mx.array, mx.array, float]:
    """A, B and scale of the module's change scale * B A."""
    config = saved.config
    if isinstance(config, AdaLoRAConfig):
        return parts["A"] * parts["E"], parts["B"], config.alpha / (config.initial_rank + 1e-5)
    assert isinstance(config, LoRAConfig)
    rank = parts["A"].shape[0]
    alpha = pattern(config.alpha_pattern, path, config.alpha)
    return parts["A"], parts["B"], alpha / (math.sqrt(rank) if config.rslora else rank)


def decode(files: Mapping[str, bytes], folder: Path) -> Saved:
    """An adapter from the two files of an mlx-lm folder (`folder` only names it in errors). Raises UserError."""
    path, weights = folder / CONFIG, folder / WEIGHTS
    settings = huggingface.parse_json(files[CONFIG], path)
    kind = settings.get("fine_tune_type", "lora")
    if kind != "lora":
        raise UserError(
            f"{path}: fine_tune_type {brief(repr(kind), 60)} is not supported; metapeft reads mlx-lm's LoRA adapters"
        )
    parameters = settings.get("lora_parameters")
    try:
        rank, scale = int(parameters["rank"]), float(parameters["scale"])  # type: ignore[index]
        dropout = huggingface.probability(parameters.get("dropout", 0.0), path)  # type: ignore[union-attr]
    except (TypeError, KeyError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(
            f"{path} needs lora_parameters with a rank and a scale; save the adapter with mlx-lm again"
        ) from error
    stored = tensor_file.decode(files[WEIGHTS], weights)
    if not stored:
        raise UserError(f"{weights} holds no tensors; the adapter is empty")
    tensors: dict[str, mx.array] = {}
    for name, value in stored.items():
        module, _, part = name.rpartition(".")
        if part not in ("lora_a", "lora_b"):
            raise UserError(
                f"{weights} holds {brief(name, 90)}, which is no LoRA matrix; metapeft reads mlx-lm's LoRA adapters"
            )
        other = "lora_b" if part == "lora_a" else "lora_a"
        if f"{module}.{other}" not in stored:
            raise UserError(f"{weights}: {module} has no {other}; the file is incomplete")
        if value.ndim != 2 or module.rsplit(".", 1)[-1] in _EMBEDDINGS:
            raise UserError(f"{weights}: {module} is not a linear layer; metapeft adapts linear layers only")
        if value.shape[1 if part == "lora_a" else 0] != rank:
            raise UserError(f"{weights}: {name} has shape {list(value.shape)} and {CONFIG} says rank {rank}")
        tensors[f"{ROOT}{module}.{'lora_A' if part == 'lora_a' else 'lora_B'}.weight"] = value.T
    return Saved(_config(rank, scale, dropout, settings, tensors), tensors, _metadata(settings), "mlx-lm")


def _config(
    rank: int, scale: float, dropout: float, settings: dict[str, Any], tensors: dict[str, mx.array]
) -> LoRAConfig:
    names = settings["lora_parameters"].get("keys")
    targets = (
        names
        if isinstance(names, list) and settings.get("num_layers") == -1
        else Saved(LoRAConfig(), tensors).modules()
    )
    return LoRAConfig(rank=rank, alpha=scale * rank, dropout=dropout, targets=tuple(sorted(targets)))


def _metadata(settings: dict[str, Any]) -> dict[str, Any]:
    return {"backbone": settings["model"]} if settings.get("model") else {}
