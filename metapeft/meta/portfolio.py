"""Sensible defaults: a few configurations of each method, with what is believed of them before anything was tried.

A belief is the expected gain: the share of what the untuned backbone gets wrong that tuning puts right (0 nothing, 1
all of it). The numbers are a prior, not results. They come from a few dozen short trainings of SmolLM2-135M (40 steps
of 8, spam detection and English past tense: prefix tuning .93 and .75, prompt tuning .89 and .76, LoRA .87 and .37,
AdaLoRA .91, P-tuning .95 and 0), in which the learning rate moved a method more than the choice of method did, and from
the methods' papers (arXiv:2106.09685, 2303.10512, 2104.08691, 2101.00190, 2103.10385), which tune LoRA and AdaLoRA near
1e-4…1e-3 for long and prompts at 1e-2 and more. Hence several rates per method, and small differences between methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Default:
    """A configuration and the gain expected of it. `top_third`: only the upper third of the layers is adapted."""

    configuration: dict[str, Any]
    gain: float
    top_third: bool = False


def _default(gain: float, method: str, learning_rate: float, *, top_third: bool = False, **values: Any) -> Default:
    return Default({"method": method, "learning_rate": learning_rate, "batch_size": 8, **values}, gain, top_third)


def portfolio(depth: int) -> list[dict[str, Any]]:
    """The configurations for a backbone of `depth` layers, best belief first."""
    return [
        {**d.configuration, "layers": max(1, round(depth / 3))} if d.top_third else dict(d.configuration)
        for d in PORTFOLIO
    ]


# Where two are believed equal, the cheaper one comes first.
PORTFOLIO: tuple[Default, ...] = (
    _default(0.55, "prefix", 5e-3, tokens=16),
    _default(0.55, "lora", 1e-3, rank=8, alpha=16.0, top_third=True),
    _default(0.55, "lora", 1e-3, rank=8, alpha=16.0),
    _default(0.52, "adalora", 3e-3, initial_rank=12, target_rank=8),
    _default(0.52, "prefix", 1e-2, tokens=16),
    _default(0.50, "prompt", 1e-2, tokens=16),
    _default(0.50, "lora", 3e-4, rank=8, alpha=16.0),
    _default(0.47, "prefix", 2e-3, tokens=16),
    _default(0.45, "prompt", 3e-2, tokens=16),
    _default(0.45, "adalora", 1e-3, initial_rank=12, target_rank=8),
    _default(0.42, "p_tuning", 1e-3, tokens=16, encoder="mlp"),
    _default(0.40, "lora", 2e-3, rank=8, alpha=16.0, top_third=True),
    _default(0.40, "prompt", 3e-3, tokens=16),
    _default(0.35, "p_tuning", 3e-3, tokens=16, encoder="mlp"),
    _default(0.35, "p_tuning", 3e-4, tokens=16, encoder="mlp"),
)
