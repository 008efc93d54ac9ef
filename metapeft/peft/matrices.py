"""What LoRA and AdaLoRA share: finding linear layers, and replacing them by ones with a trained change on top."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metapeft.backbones.forward import anatomy
from metapeft.errors import Unfit
from metapeft.runtime import mx, nn

ROUTERS = ("gate", "router")


class Adapted(nn.Module):
    """A linear layer (or an already adapted one) plus the change that `delta` computes from the same input."""

    def __init__(self, base: nn.Module, delta: nn.Module):
        super().__init__()
        self.base, self.delta = base, delta

    def __call__(self, x: mx.array) -> mx.array:
        return self.base(x) + self.delta(x).astype(x.dtype)


def shape(linear: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer, quantized or adapted or not."""
    while isinstance(linear, Adapted):
        linear = linear.base
    outputs, inputs = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        inputs = inputs * 32 // linear.bits
    return int(outputs), int(inputs)


def linear_layers(model: nn.Module, targets: Sequence[str] = (), layers: int = 0) -> dict[str, nn.Module]:
    """Path in the model -> linear layer, for the top `layers` transformer layers (0: all).

    `targets` are module names (`q_proj`), path endings (`self_attn.q_proj`) or paths; empty means every linear layer.
    Raises UserError when a target matches nothing.
    """
    parts = anatomy(model)
    depth = parts.depth
    if layers < 0 or layers > depth:
        raise Unfit(f"layers={layers} is out of range: the backbone has {depth} layers (0 means all of them)")
    prefix = next(name for name, module in model.named_modules() if module is parts.body)
    prefix = f"{prefix}.{parts.layers}." if prefix else f"{parts.layers}."
    found: dict[str, nn.Module] = {}
    matched: set[str] = set()
    for index in range(depth - layers if layers else 0, depth):
        layer = getattr(parts.body, parts.layers)[index]
        adapted: list[str] = []
        for name, module in sorted(layer.named_modules(), key=lambda item: item[0]):
            if any(name.startswith(f"{path}.") for path in adapted):
                continue  # inside a layer that an earlier adapter wraps
            if not isinstance(module, nn.Linear | nn.QuantizedLinear | Adapted):
                continue
            if isinstance(module, Adapted):
                adapted.append(name)
            path = f"{prefix}{index}.{name}"
            hits = {t for t in targets if path == t or path.endswith(f".{t}")}
            matched |= hits
            if hits or not targets:
                found[path] = module
    missing = [t for t in targets if t not in matched]
    if missing or not found:
        names = sorted({path.rsplit(".", 1)[-1] for path in (found or linear_layers(model))})
        what = f"target {missing[0]!r} matches no" if missing else "the backbone has no"
        raise Unfit(f"{what} linear layer; choose from {', '.join(names)}")
    return found


def adaptable(model: nn.Module, targets: Sequence[str] = (), layers: int = 0) -> dict[str, nn.Module]:
    """`linear_layers`, but "every linear layer" leaves the routers of mixtures of experts alone: a changed choice of
    experts does more harm than good, and Hugging Face PEFT cannot load an adapted router."""
    found = linear_layers(model, targets, layers)
    return found if targets else {path: m for path, m in found.items() if path.rsplit(".", 1)[-1] not in ROUTERS}


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` at a dotted path of `model`."""
    *parents, last = path.split(".")
    owner: Any = model
    for name in parents:
        owner = owner[int(name)] if isinstance(owner, list) else getattr(owner, name)
    if isinstance(owner, list):
        owner[int(last)] = module
    else:
        setattr(owner, last, module)


def layer_index(path: str) -> int:
    """The transformer layer that a path lies in."""
    return next(int(part) for part in path.split(".") if part.isdigit())


def merge_into(linear: nn.Module, delta: mx.array) -> nn.Module:
    """A linear layer with `delta` (outputs, inputs) added to its weight; a quantized one is quantized again."""
    if isinstance(linear, nn.QuantizedLinear):
        weight = mx.dequantize(
            linear.weight,
            linear.scales,
            linear.biases,
            group_size=linear.group_size,
            bits=linear.bits,
            mode=linear.mode,
        )
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in linear)
        dense.weight = weight + delta.astype(weight.dtype)
        if "bias" in linear:
            dense.bias = linear.bias
        return nn.QuantizedLinear.from_linear(dense, linear.group_size, linear.bits, mode=linear.mode)
    linear.weight = linear.weight + delta.astype(linear.weight.dtype)
    return linear
