"""An adapter as data: what every checkpoint format is read into and written from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from metapeft.peft.base import MethodConfig
from metapeft.runtime import mx

Format = Literal["metapeft", "peft", "mlx-lm"]
ROOT = "base_model.model."  # what Hugging Face PEFT puts before every module path


@dataclass(frozen=True)
class Saved:
    """A trained adapter without the model it belongs to.

    `tensors` have Hugging Face PEFT's names and shapes: `base_model.model.PATH.lora_A.weight` (rank, inputs),
    `….lora_B.weight` (outputs, rank); AdaLoRA `….lora_A`, `….lora_E` (rank, 1), `….lora_B`; the others one
    `prompt_embeddings`, (tokens, width) or for prefix tuning (tokens, 2 * layers * kv_heads * head width).

    `metadata` is JSON of the caller's choice. Formats that have a place for them read these keys: `backbone` (the base
    model's name), `layers` (its depth), `kv_heads` (prefix tuning), `steps` (AdaLoRA's whole schedule).
    `rank_pattern` (AdaLoRA): module path -> which of the initial ranks are in force; empty before the first pruning.
    `virtual`: virtual tokens that go with the changed matrices (`metapeft.peft.stack`).
    """

    config: MethodConfig
    tensors: dict[str, mx.array]
    metadata: dict[str, Any] = field(default_factory=dict)
    format: Format = "metapeft"
    rank_pattern: dict[str, list[bool]] = field(default_factory=dict)
    virtual: Saved | None = None

    def modules(self) -> dict[str, dict[str, mx.array]]:
        """Module path -> its matrices by "A", "B" and for AdaLoRA "E" (empty for the prompt-like methods)."""
        found: dict[str, dict[str, mx.array]] = {}
        for name, value in self.tensors.items():
            path, _, part = name.removeprefix(ROOT).removesuffix(".weight").rpartition(".lora_")
            if path:
                found.setdefault(path, {})[part] = value
        return found


def layer_of(path: str) -> int | None:
    """The transformer layer a module path lies in: its first number."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def within_layer(path: str) -> str:
    """The path below its layer: model.layers.3.self_attn.q_proj -> self_attn.q_proj (the whole path outside layers)."""
    parts = path.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return path if index is None else ".".join(parts[index + 1 :])


def renamed(saved: Saved, names: Mapping[str, str]) -> Saved:
    """The same adapter with other module paths (those that `names` has), also where its configuration names them."""
    if not any(old != new for old, new in names.items()):
        return saved
    tensors = {}
    for name, value in saved.tensors.items():
        path, mark, part = name.removeprefix(ROOT).rpartition(".lora_")
        tensors[f"{ROOT}{names.get(path, path)}{mark}{part}" if path else name] = value
    config: dict[str, Any] = {}
    for field_name in ("rank_pattern", "alpha_pattern"):
        if found := getattr(saved.config, field_name, None):
            config[field_name] = {names.get(path, path): value for path, value in found.items()}
    if found := getattr(saved.config, "targets", ()):
        config["targets"] = tuple(names.get(target, target) for target in found)
    masks = {names.get(path, path): mask for path, mask in saved.rank_pattern.items()}
    return replace(saved, config=replace(saved.config, **config), tensors=tensors, rank_pattern=masks)
